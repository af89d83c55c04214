package checkpoint

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// BenchmarkInner times the inner loops of conversion and digest on one core, per
// byte of bfloat16.
func BenchmarkInner(b *testing.B) {
	const rows, cols = 1024, 2880
	c := full(1)
	c.Experts, c.VocabSize = 1, 1024
	m := synthetic(c)
	mlp1 := decode(rowsOf(m.Blocks[0].MLP1[0], 0, rows)).(Dense)
	embedding := decode(rowsOf(m.Embedding, 0, rows)).(Dense)
	raw := make([]byte, 2*rows*cols)
	putBF16(raw, embedding.Data)
	bf16 := BF16{rows, cols, raw}
	packed := MXFP4{rows, cols, make([]byte, rows*cols/2), make([]byte, rows*cols/32)}
	for g := range packed.Scales {
		packed.Scales[g], _ = encodeMXFP4((*[16]byte)(packed.Blocks[16*g:]), (*[32]float32)(mlp1.Data[32*g:]))
	}
	turned := make([]byte, 2*rows*cols)
	values := make([]float32, rows*cols)
	var h leafHasher
	for _, test := range []struct {
		name string
		work func()
	}{
		{"decode-mxfp4", func() { packed.Rows(values, 0, rows) }},
		{"mxfp4-to-bf16", func() { packed.putBF16(turned) }},
		{"encode-mxfp4", func() {
			for g := range packed.Scales {
				encodeMXFP4((*[16]byte)(packed.Blocks[16*g:]), (*[32]float32)(mlp1.Data[32*g:]))
			}
		}},
		{"encode-bf16", func() { encode(tensor.BF16, turned, embedding.Data) }},
		{"widen-bf16", func() { bf16.Rows(values, 0, rows) }},
		{"turn", func() {
			for r := 0; r < rows; r += turnRows {
				turn(turned[2*r:], raw[2*r*cols:], turnRows, cols, rows, 2)
			}
		}},
		{"transposed", func() { Transposed{rows, cols, tensor.BF16, raw}.Rows(values, 0, rows) }},
		{"finite", func() { firstNonFinite(tensor.BF16, raw) }},
		{"digest-mxfp4", func() { h.sum(packed, 0, rows) }},
		{"digest-bf16", func() { h.sum(bf16, 0, rows) }},
		{"digest-dense-mxfp4", func() { h.sum(mlp1, 0, rows) }},
	} {
		b.Run(test.name, func(b *testing.B) {
			b.SetBytes(2 * rows * cols)
			for b.Loop() {
				test.work()
			}
		})
	}
}
