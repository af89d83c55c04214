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
// again first. Weights that MXFP4 can't hold only suffer from the others.
func mxfp4() []Fault {
	all := []Fault{
		{
			ID:          "mxfp4-nibbles-swapped",
			Explanation: "Of the two values in a byte the high nibble's comes first.",
			Thread:      "https://github.com/triton-lang/triton/pull/5197",
			Checkpoint:  repacking(reading{nibble: func(i int) int { return i ^ 1 }}),
		},
		{
			ID:          "mxfp4-nibbles-split",
			Explanation: "The low nibbles of a group are its first 16 values and the high nibbles its last 16, GGML's order.",
			Thread:      "https://github.com/kekzl/imp/pull/567",
			Related:     true,
			Checkpoint: repacking(reading{nibble: func(i int) int {
				return i%groupBytes*2 + i/groupBytes
			}}),
		},
		{
			ID:          "mxfp4-scale-bias-126",
			Explanation: "The scale's exponent bias is 126 instead of 127: every weight is doubled.",
			Thread:      "https://github.com/vllm-project/vllm/pull/43557",
			Related:     true,
			Checkpoint:  repacking(reading{factor: 2}),
		},
		{
			ID:          "mxfp4-scale-bias-125",
			Explanation: "The scale's exponent bias is 125 instead of 127: every weight is four times too large.",
			Thread:      "https://github.com/vllm-project/compressed-tensors/pull/538",
			Checkpoint:  repacking(reading{factor: 4}),
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
			Checkpoint:  repacking(reading{values: &[8]float64{0, 0.0625, 1, 1.5, 2, 3, 4, 6}}),
		},
		{
			ID:          "mxfp4-subnormals-as-normal",
			Explanation: "The codes without an exponent are decoded like the others: 0 as 0.5, and 0.5 as 0.75.",
			Thread:      "https://github.com/tile-ai/tilelang/issues/2704",
			Checkpoint:  repacking(reading{values: &[8]float64{0.5, 0.75, 1, 1.5, 2, 3, 4, 6}}),
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

// reading says how packed weights are misread. What is not given is right.
type reading struct {
	// code and scale return where the value in row r and column c has its code
	// and its scale, counted from the matrix's first.
	code, scale func(rows, cols, r, c int) int
	nibble      func(i int) int // which of a group's nibbles is taken for its i-th
	values      *[8]float64     // of the codes 0 to 7; the others are their negatives
	power       func(scale byte) float64
	factor      float64
}

// rightReading is how MXFP4 is defined.
var rightReading = reading{
	code:   func(_, cols, r, c int) int { return r*cols + c },
	scale:  func(_, cols, r, c int) int { return (r*cols + c) / groupValues },
	nibble: func(i int) int { return i },
	values: &[8]float64{0, 0.5, 1, 1.5, 2, 3, 4, 6},
	power:  func(scale byte) float64 { return math.Ldexp(1, int(scale)-scaleBias) },
	factor: 1,
}

// and returns how weights are read by who makes two mistakes.
func (how reading) and(other reading) reading {
	if other.code != nil {
		how.code = other.code
	}
	if other.scale != nil {
		how.scale = other.scale
	}
	if other.nibble != nil {
		first := how.nibble
		how.nibble = func(i int) int { return first(other.nibble(i)) }
	}
	if other.values != nil {
		how.values = other.values
	}
	if other.power != nil {
		how.power = other.power
	}
	if other.factor != 0 {
		how.factor *= other.factor
	}
	return how
}

// misread is a matrix whose packed form is decoded wrongly.
type misread struct {
	checkpoint.Matrix // as it should be read
	// packed returns the form that is misread. It is made when it is needed: few
	// of the matrices of a large model are, at a time.
	packed func() (checkpoint.MXFP4, bool)
	how    reading
}

// misreading returns a matrix that is read in the right way, or wrongly already,
// for some mistake to be added.
func misreading(m checkpoint.Matrix) misread {
	if m, ok := m.(misread); ok {
		return m
	}
	return misread{m, sync.OnceValues(func() (checkpoint.MXFP4, bool) {
		packed, ok := checkpoint.Pack(m)
		return packed, ok && packed.RowCount%groupValues == 0 // else no group fits along the outputs
	}), rightReading}
}

// repacking misreads the weights of every expert.
func repacking(how reading) func(*checkpoint.Model) *checkpoint.Model {
	return reweighted(func(_ config.Config, b *checkpoint.Block) {
		all := func(matrices []checkpoint.Matrix) []checkpoint.Matrix {
			result := make([]checkpoint.Matrix, len(matrices))
			for e, m := range matrices {
				wrong := misreading(m)
				wrong.how = wrong.how.and(how)
				result[e] = wrong
			}
			return result
		}
		b.MLP1, b.MLP2 = all(b.MLP1), all(b.MLP2)
	})
}

// firstExpertScales decodes every expert's blocks with the first one's scales.
func firstExpertScales(_ config.Config, b *checkpoint.Block) {
	all := func(matrices []checkpoint.Matrix) []checkpoint.Matrix {
		first := misreading(matrices[0]).packed
		result := make([]checkpoint.Matrix, len(matrices))
		for e, m := range matrices {
			wrong := misreading(m)
			own := wrong.packed
			wrong.packed = sync.OnceValues(func() (checkpoint.MXFP4, bool) {
				mine, ok := own()
				lent, okLent := first()
				mine.Scales = lent.Scales
				return mine, ok && okLent
			})
			result[e] = wrong
		}
		return result
	}
	b.MLP1, b.MLP2 = all(b.MLP1), all(b.MLP2)
}

// Rows decodes rows [from, from+n) into dst.
func (m misread) Rows(dst []float32, from, n int) {
	packed, ok := m.packed()
	if !ok {
		m.rowsOfDense(dst, from, n)
		return
	}
	rows, cols := packed.Dims()
	for i := range n * cols {
		r, c := from+i/cols, i%cols
		at := m.how.code(rows, cols, r, c)
		at += m.how.nibble(at%groupValues) - at%groupValues
		code := packed.Blocks[at/2] >> (4 * (at % 2)) & 15
		scale := packed.Scales[m.how.scale(rows, cols, r, c)]
		value := m.how.values[code&7] * m.how.power(scale) * m.how.factor
		if code > 7 {
			value = -value
		}
		dst[i] = float32(value)
	}
}

// rowsOfDense makes those mistakes that have a meaning for weights that MXFP4
// can't hold: values in the wrong order, and a wrong exponent.
func (m misread) rowsOfDense(dst []float32, from, n int) {
	_, cols := m.Dims()
	m.Matrix.Rows(dst, from, n)
	var group [groupValues]float32
	for at := 0; at < n*cols; at += groupValues {
		copy(group[:], dst[at:])
		for i := range min(groupValues, n*cols-at) {
			source := i
			if cols%groupValues == 0 {
				source = m.how.nibble(i)
			}
			dst[at+i] = group[source] * float32(m.how.factor)
		}
	}
}
