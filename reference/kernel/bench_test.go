package kernel

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// BenchmarkMatMul multiplies 1 to 256 tokens with a matrix that fits in the
// cache, so that it shows what the arithmetic costs: bytes are of weights as they
// are stored.
func BenchmarkMatMul(b *testing.B) {
	const rows, cols = 960, 2880
	r := rand.New(rand.NewPCG(1, 2))
	w := randomMXFP4(r, rows, cols, usualScale(r))
	stored := []struct {
		name  string
		w     Rows
		bytes int64
	}{{"MXFP4", w, rows * cols * 17 / 32}, {"bfloat16", asBF16(w.dense), rows * cols * 2}, {"float32", w.dense, rows * cols * 4}}
	for _, set := range append([]*instructionSet{nil}, instructionSets...) {
		for _, s := range stored {
			for _, tokens := range []int{1, 4, 16, 128} {
				b.Run(fmt.Sprintf("%s/%s/%d", nameOf(set), s.name, tokens), func(b *testing.B) {
					benchmark(b, set, normals[float32](r, tokens*cols), s.w, s.bytes)
				})
			}
		}
		b.Run(nameOf(set)+"/float64/128", func(b *testing.B) {
			benchmark(b, set, normals[float64](r, 128*cols), Rows(w), stored[0].bytes)
		})
	}
}

func benchmark[F Float](b *testing.B, set *instructionSet, x []F, w Rows, bytes int64) {
	keep := chosen
	defer func() { chosen = keep }()
	chosen = set
	rows, cols := w.Dims()
	b.SetBytes(bytes)
	for b.Loop() {
		MatMul(x, w, nil)
	}
	operations := 2 * float64(rows) * float64(len(x)/cols*cols)
	b.ReportMetric(operations*float64(b.N)/b.Elapsed().Seconds()/1e9, "GFLOP/s")
}
