package reference_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// BenchmarkActivate and BenchmarkAttention time the stages that are no matrix
// products, at gpt-oss-20b's width: their share of a long prompt.
func BenchmarkActivate(b *testing.B) {
	b.Run("float32", func(b *testing.B) { activate(b, reference.Single()) })
	b.Run("float64", func(b *testing.B) { activate(b, reference.Exact()) })
	b.Run("bfloat16", func(b *testing.B) { activate(b, reference.Short(kernel.BFloat16)) })
}

func activate[F reference.Float](b *testing.B, a reference.Arithmetic[F]) {
	l := layerOf(fixtures.GPTOSS20B(1), a)
	const tokens = 16
	x := normals[F](tokens * l.Config.ExpertsPerToken * 2 * l.Config.IntermediateSize)
	for b.Loop() {
		reference.Activate(l, x)
	}
	perItem(b, len(x)/2, "ns/pair")
}

func BenchmarkAttention(b *testing.B) {
	for _, size := range []struct{ queries, keys int }{{1, 128}, {1, 1024}, {512, 512}} {
		name := fmt.Sprintf("%dx%d", size.queries, size.keys)
		b.Run(name+"/float32", func(b *testing.B) { attention(b, reference.Single(), size.queries, size.keys) })
		b.Run(name+"/float64", func(b *testing.B) { attention(b, reference.Exact(), size.queries, size.keys) })
	}
}

func attention[F reference.Float](b *testing.B, a reference.Arithmetic[F], queries, keys int) {
	l := layerOf(fixtures.GPTOSS20B(2), a) // layer 1 has no window
	in := reference.AttentionInput[F]{
		Queries: normals[F](queries * l.Config.QueryWidth()), FirstQuery: keys - queries, QueryCount: queries,
		Keys: normals[F](keys * l.Config.KVWidth()), Values: normals[F](keys * l.Config.KVWidth()), KeyCount: keys,
	}
	pairs := 0
	for q := range queries {
		pairs += (in.FirstQuery + q + 1) * l.Config.Heads
	}
	for b.Loop() {
		reference.Attention(l, in)
	}
	perItem(b, pairs, "ns/score")
}

func layerOf[F reference.Float](c config.Config, a reference.Arithmetic[F]) reference.Layer[F] {
	weights := &checkpoint.Model{Config: c, Blocks: make([]checkpoint.Block, c.Layers)}
	for i := range weights.Blocks {
		weights.Blocks[i].Sinks = make([]float32, c.Heads)
	}
	m := reference.New(weights, a)
	return m.Layer(context.Background(), c.Layers-1)
}

func normals[F reference.Float](n int) []F {
	r := rand.New(rand.NewPCG(1, 2))
	x := make([]F, n)
	for i := range x {
		x[i] = F(r.NormFloat64())
	}
	return x
}

func perItem(b *testing.B, items int, unit string) {
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(items), unit)
}
