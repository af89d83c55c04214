package faults

import (
	"math"
	"sync"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// mxfp4 lists the faults of decoding the experts' packed weights, both layers
// in the same way.
//
// Most of them mistake where a value's scale is, and so have a meaning only for
// packed weights: matrices that come dense, from another layout, are packed
// again first. Nothing changes in those that MXFP4 can't hold.
func mxfp4() []Fault {
	all := []Fault{
		{
			ID:          "mxfp4-nibbles-swapped",
			Explanation: "Of the two values in a byte the high nibble's comes first.",
			Thread:      "https://github.com/triton-lang/triton/pull/5197",
			Checkpoint:  columns(func(c int) int { return c ^ 1 }),
		},
		{
			ID:          "mxfp4-nibbles-split",
			Explanation: "The low nibbles of a group are its first 16 values and the high nibbles its last 16, GGML's order.",
			Thread:      "https://github.com/kekzl/imp/pull/567",
			Related:     true,
			Checkpoint: columns(func(c int) int {
				group, i := c/groupValues*groupValues, c%groupValues
				return group + i%groupBytes*2 + i/groupBytes
			}),
		},
		{
			ID:          "mxfp4-scale-bias-126",
			Explanation: "The scale's exponent bias is 126 instead of 127: every weight is doubled.",
			Thread:      "https://github.com/vllm-project/vllm/pull/43557",
			Related:     true,
			Checkpoint:  multiplied(2),
		},
		{
			ID:          "mxfp4-scale-bias-125",
			Explanation: "The scale's exponent bias is 125 instead of 127: every weight is four times too large.",
			Thread:      "https://github.com/vllm-project/compressed-tensors/pull/538",
			Checkpoint:  multiplied(4),
		},
		{
			ID:          "mxfp4-scale-as-number",
			Explanation: "The scale byte is multiplied as a number, not as an exponent.",
			Thread:      "https://github.com/jundot/omlx/pull/2159",
			Related:     true,
			Checkpoint:  repacking(reading{power: func(scale byte) float64 { return float64(scale) }}),
		},
		{
			ID:          "mxfp4-groups-misread",
			Explanation: "The groups run along the outputs: 32 rows, not 32 columns, share a scale.",
			Thread:      "https://github.com/EfficientMoE/MoE-Infinity/pull/136",
			Related:     true,
			Checkpoint: repacking(reading{scale: func(rows, cols, r, c int) int {
				return r/groupValues*cols + c // the scales as [rows/32, cols]
			}}),
			Variants: []Fault{
				{
					Explanation: "The groups run along the outputs: the blocks are read as [cols, rows/32, 16].",
					Checkpoint: repacking(reading{
						code:  func(rows, cols, r, c int) int { return c*rows + r },
						scale: func(rows, cols, r, c int) int { return (c*rows + r) / groupValues },
					}),
				},
				{
					Explanation: "The groups run along the outputs: the blocks are read as [rows/32, cols, 16].",
					Checkpoint: repacking(reading{
						code:  func(rows, cols, r, c int) int { return (r/groupValues*cols+c)*groupValues + r%groupValues },
						scale: func(rows, cols, r, c int) int { return r/groupValues*cols + c },
					}),
				},
				{
					Explanation: "The groups run along the outputs: the blocks are read as [cols/32, rows, 16].",
					Checkpoint: repacking(reading{
						code:  func(rows, cols, r, c int) int { return (c/groupValues*rows+r)*groupValues + c%groupValues },
						scale: func(rows, cols, r, c int) int { return c/groupValues*rows + r },
					}),
				},
			},
		},
		{
			ID:          "mxfp4-scales-transposed",
			Explanation: "The scales, but not the blocks, are read in the other memory order: [cols/32, rows].",
			Thread:      "https://github.com/vllm-project/vllm/pull/42089",
			Related:     true,
			Checkpoint: repacking(reading{scale: func(rows, cols, r, c int) int {
				return c/groupValues*rows + r
			}}),
		},
		{
			ID:          "mxfp4-group-16",
			Explanation: "Groups have 16 values, as NVFP4's, instead of 32; past the row's last scale that one goes on.",
			Checkpoint: repacking(reading{scale: func(rows, cols, r, c int) int {
				groups := cols / groupValues
				return r*groups + min(c/16, groups-1)
			}}),
		},
		{
			ID:          "mxfp4-first-expert-scales",
			Explanation: "Every expert's values are decoded with the first expert's scales.",
			Checkpoint:  reweighted(firstExpertScales),
		},
		{
			ID:          "mxfp4-half-as-sixteenth",
			Explanation: "The table of values has 0.0625 where 0.5 belongs.",
			Thread:      "https://github.com/intel/neural-compressor/issues/1891",
			Related:     true,
			Checkpoint:  repacking(reading{values: [8]float64{0, 0.0625, 1, 1.5, 2, 3, 4, 6}}),
		},
		{
			ID:          "mxfp4-subnormals-as-normal",
			Explanation: "The codes without an exponent are decoded like the others: 0 as 0.5, and 0.5 as 0.75.",
			Thread:      "https://github.com/tile-ai/tilelang/issues/2704",
			Checkpoint:  repacking(reading{values: [8]float64{0.5, 0.75, 1, 1.5, 2, 3, 4, 6}}),
		},
	}
	for i := range all {
		all[i].Stage, all[i].Tap = stageExperts, taps.Prelinear
	}
	return all
}

// A group of 32 values along the inputs is 16 bytes and shares a scale byte.
const (
	groupValues = 32
	groupBytes  = groupValues / 2
	scaleBias   = 127
)

// eachMatrix changes the weights of every expert.
func eachMatrix(change func(checkpoint.Matrix) checkpoint.Matrix) func(*checkpoint.Model) *checkpoint.Model {
	all := func(matrices []checkpoint.Matrix) []checkpoint.Matrix {
		result := make([]checkpoint.Matrix, len(matrices))
		for e, m := range matrices {
			result[e] = change(m)
		}
		return result
	}
	return reweighted(func(_ config.Config, b *checkpoint.Block) { b.MLP1, b.MLP2 = all(b.MLP1), all(b.MLP2) })
}

// columns reads the experts' weights with their columns in another order: what
// is taken for column c is source(c), in the same group of 32.
func columns(source func(c int) int) func(*checkpoint.Model) *checkpoint.Model {
	return eachMatrix(func(m checkpoint.Matrix) checkpoint.Matrix {
		return perRow{m, func(row []float32) {
			var group [groupValues]float32
			for at := 0; at < len(row); at += groupValues {
				values := row[at:min(at+groupValues, len(row))]
				copy(group[:], values)
				for i := range values {
					values[i] = group[source(i)]
				}
			}
		}}
	})
}

// multiplied makes every weight of the experts larger by a power of two.
func multiplied(factor float32) func(*checkpoint.Model) *checkpoint.Model {
	return eachMatrix(func(m checkpoint.Matrix) checkpoint.Matrix {
		return perRow{m, func(row []float32) {
			for i := range row {
				row[i] *= factor
			}
		}}
	})
}

// reading says how packed weights are misread. What is not given is right.
type reading struct {
	// code and scale return where the value in row r and column c has its code
	// and its scale, counted from the matrix's first.
	code, scale func(rows, cols, r, c int) int
	values      [8]float64 // of the codes 0 to 7; the others are their negatives
	power       func(scale byte) float64
}

// repacking misreads the packed weights of every expert.
func repacking(how reading) func(*checkpoint.Model) *checkpoint.Model {
	if how.code == nil {
		how.code = func(_, cols, r, c int) int { return r*cols + c }
	}
	if how.scale == nil {
		how.scale = func(_, cols, r, c int) int { return (r*cols + c) / groupValues }
	}
	if how.values == [8]float64{} {
		how.values = e2m1
	}
	if how.power == nil {
		how.power = func(scale byte) float64 { return math.Ldexp(1, int(scale)-scaleBias) }
	}
	return eachMatrix(func(m checkpoint.Matrix) checkpoint.Matrix {
		return misread{m, sync.OnceValues(func() (checkpoint.MXFP4, bool) {
			packed, ok := checkpoint.Pack(m)
			return packed, ok && packed.RowCount%groupValues == 0 // else no group fits along the outputs
		}), how}
	})
}

// misread is a packed matrix that is decoded wrongly.
type misread struct {
	checkpoint.Matrix
	packed func() (checkpoint.MXFP4, bool)
	how    reading
}

// Rows decodes rows [from, from+n) into dst.
func (m misread) Rows(dst []float32, from, n int) {
	packed, ok := m.packed()
	if !ok {
		m.Matrix.Rows(dst, from, n)
		return
	}
	rows, cols := packed.Dims()
	for i := range n * cols {
		r, c := from+i/cols, i%cols
		at := m.how.code(rows, cols, r, c)
		code := packed.Blocks[at/2] >> (4 * (at % 2)) & 15
		scale := packed.Scales[m.how.scale(rows, cols, r, c)]
		value := m.how.values[code&7] * m.how.power(scale)
		if code > 7 {
			value = -value
		}
		dst[i] = float32(value)
	}
}

// firstExpertScales decodes every expert's blocks with the first one's scales.
func firstExpertScales(_ config.Config, b *checkpoint.Block) {
	all := func(matrices []checkpoint.Matrix) []checkpoint.Matrix {
		first := sync.OnceValues(func() (checkpoint.MXFP4, bool) { return checkpoint.Pack(matrices[0]) })
		result := make([]checkpoint.Matrix, len(matrices))
		for e, m := range matrices {
			own := sync.OnceValues(func() (checkpoint.MXFP4, bool) { return checkpoint.Pack(m) })
			result[e] = borrowed{m, sync.OnceValues(func() (checkpoint.MXFP4, bool) {
				mine, ok := own()
				lent, okLent := first()
				mine.Scales = lent.Scales
				return mine, ok && okLent
			})}
		}
		return result
	}
	b.MLP1, b.MLP2 = all(b.MLP1), all(b.MLP2)
}

// borrowed is a matrix whose packed form has another one's scales.
type borrowed struct {
	checkpoint.Matrix
	packed func() (checkpoint.MXFP4, bool)
}

// Rows decodes rows [from, from+n) into dst.
func (m borrowed) Rows(dst []float32, from, n int) {
	if packed, ok := m.packed(); ok {
		packed.Rows(dst, from, n)
		return
	}
	m.Matrix.Rows(dst, from, n)
}

// e2m1 has the values of the codes 0 to 7 (OCP Microscaling Formats 1.0).
var e2m1 = [8]float64{0, 0.5, 1, 1.5, 2, 3, 4, 6}
