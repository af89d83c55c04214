package exporter

import (
	"context"
	"fmt"
	"math"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// Float16Max is the largest finite float16: 2^15·(2 − 2^−10).
const Float16Max = 65504

// weightsFitFloat16 refuses a model with a weight that no float16 model has,
// because float16 ends before it. It says nothing of the activations: those are
// for the validation to see.
func weightsFitFloat16(ctx context.Context, m *checkpoint.Model) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	matrix := func(name string, w checkpoint.Matrix) {
		group.Go(func() error { return matrixFitsFloat16(ctx, m, name, w) })
	}
	vector := func(name string, values []float32) {
		matrix(name, checkpoint.Dense{RowCount: 1, ColCount: len(values), Data: values})
	}
	matrix("embedding.weight", m.Embedding)
	for n, b := range m.Blocks {
		name := func(rest string) string { return fmt.Sprintf("block.%d.%s", n, rest) }
		vector(name("attn.norm.scale"), b.AttnNorm)
		matrix(name("attn.qkv.weight"), b.QKV)
		vector(name("attn.qkv.bias"), b.QKVBias)
		vector(name("attn.sinks"), b.Sinks)
		matrix(name("attn.out.weight"), b.Out)
		vector(name("attn.out.bias"), b.OutBias)
		vector(name("mlp.norm.scale"), b.MLPNorm)
		matrix(name("mlp.gate.weight"), b.Gate)
		vector(name("mlp.gate.bias"), b.GateBias)
		for e := range b.MLP1 {
			expert := fmt.Sprintf(" of expert %d", e)
			matrix(name("mlp.mlp1_weight")+expert, b.MLP1[e])
			vector(name("mlp.mlp1_bias")+expert, b.MLP1Bias[e])
			matrix(name("mlp.mlp2_weight")+expert, b.MLP2[e])
			vector(name("mlp.mlp2_bias")+expert, b.MLP2Bias[e])
		}
	}
	vector("norm.scale", m.FinalNorm)
	matrix("unembedding.weight", m.Unembedding)
	return group.Wait()
}

// safeScale is the largest scale byte of MXFP4 with which no value exceeds
// float16: 6·2^(140−127) = 49,152.
const safeScale = 140

func matrixFitsFloat16(ctx context.Context, m *checkpoint.Model, name string, w checkpoint.Matrix) error {
	if packed, ok := w.(checkpoint.MXFP4); ok && allAtMost(packed.Scales, safeScale) {
		return nil
	}
	rows, cols := w.Dims()
	batch := max(1, (1<<18)/max(cols, 1)) // a mebibyte of float32 at a time
	values := make([]float32, min(batch, rows)*cols)
	for from := 0; from < rows; from += batch {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(batch, rows-from)
		w.Rows(values, from, n)
		for i, v := range values[:n*cols] {
			if math.Abs(float64(v)) > Float16Max {
				return fmt.Errorf("%s: %s is %g at [%d %d], and float16 ends at %d: export in bfloat16 or float32",
					m.Source.Path, name, v, from+i/cols, i%cols, Float16Max)
			}
		}
	}
	return nil
}

func allAtMost(values []byte, limit byte) bool {
	for _, v := range values {
		if v > limit {
			return false
		}
	}
	return true
}
