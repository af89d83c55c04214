package kernel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// with runs something with one instruction set, or with portable Go (nil).
func with(set *instructionSet, do func()) {
	keep := chosen
	defer func() { chosen = keep }()
	chosen = set
	do()
}

// TestAttentionSums compares both sums of attention, on every instruction set,
// with portable Go: in float64 to the bit, and in float32 within the bound of a
// sum against float64; there AVX2 and AVX-512 agree to the bit. The sizes do and
// do not fill the kernels' blocks of rows and columns.
func TestAttentionSums(t *testing.T) {
	for _, width := range []int{8, 24, 32, 64, 80, 96, 160} {
		for _, n := range []int{0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 21, 131} {
			for _, gap := range []int{0, 3, width} {
				t.Run(fmt.Sprintf("%dx%d+%d", n, width, gap), func(t *testing.T) {
					r := rand.New(rand.NewPCG(uint64(n), uint64(width)))
					stride := width + gap
					x, weights := normals[float32](r, width), normals[float32](r, n)
					rows := normals[float32](r, max(n*stride-gap, 0)) // no gap after the last row
					products, sums := attentionSums(nil, x, weights, rows, stride)
					wide, wideSums := attentionSums(nil, widened(x), widened(weights), widened(rows), stride)
					for i, v := range products {
						require.InDelta(t, wide[i], float64(v), accumulation(width)*magnitude(x, rows[i*stride:], 1))
					}
					for _, set := range instructionSets {
						got, gotSums := attentionSums(set, widened(x), widened(weights), widened(rows), stride)
						assert.Equal(t, wide, got, set.name)
						assert.Equal(t, wideSums, gotSums, set.name)
						single, singleSums := attentionSums(set, x, weights, rows, stride)
						first, firstSums := attentionSums(instructionSets[0], x, weights, rows, stride)
						assert.Equal(t, first, single, set.name)
						assert.Equal(t, firstSums, singleSums, set.name)
						for i := range single {
							require.InDelta(t, wide[i], float64(single[i]), accumulation(width)*magnitude(x, rows[i*stride:], 1))
						}
						for j := range singleSums {
							bound := accumulation(n) * magnitude(weights, rows[min(j, len(rows)):], stride)
							require.InDelta(t, wideSums[j], float64(singleSums[j]), bound)
							require.InDelta(t, wideSums[j], float64(sums[j]), bound)
						}
					}
				})
			}
		}
	}
}

// accumulation is the judge's bound of a float32 sum of n products, relative to
// the sum of their magnitudes (conformance/bounds.go).
func accumulation(n int) float64 {
	return min(float64(n), 7*math.Sqrt(float64(n))) * Float32.UnitRoundoff()
}

// magnitude is Σ|weights[i]·values[i·stride]|.
func magnitude(weights, values []float32, stride int) (sum float64) {
	for i, w := range weights {
		sum += math.Abs(float64(w) * float64(values[i*stride]))
	}
	return sum
}

func attentionSums[F Float](set *instructionSet, x, weights, rows []F, stride int) (products, sums []F) {
	products, sums = make([]F, len(weights)), make([]F, len(x))
	with(set, func() {
		InnerProducts(products, x, rows, stride, nil)
		WeightedSum(sums, weights, rows, stride, nil)
	})
	return products, sums
}

// TestAttentionSumsRefuseShortRows: rows that end too early stop the program, in
// assembly as in Go, before anything beyond them is read.
func TestAttentionSumsRefuseShortRows(t *testing.T) {
	for _, set := range append([]*instructionSet{nil}, instructionSets...) {
		x, rows := make([]float32, 32), make([]float32, 4*40-9)
		with(set, func() {
			assert.Panics(t, func() { InnerProducts(make([]float32, 4), x, rows, 40, nil) }, nameOf(set))
			assert.Panics(t, func() { WeightedSum(x, make([]float32, 4), rows, 40, nil) }, nameOf(set))
		})
	}
}

// TestAttentionSumsInAnotherOrder: a caller's inner product is what sums.
func TestAttentionSumsInAnotherOrder(t *testing.T) {
	seven := func([]float32, []float32) float32 { return 7 }
	dst := make([]float32, 32)
	InnerProducts(dst[:3], dst, make([]float32, 96), 32, seven)
	assert.Equal(t, []float32{7, 7, 7, 0}, dst[:4])
	WeightedSum(dst, dst[:3], make([]float32, 96), 32, seven)
	for _, v := range dst {
		assert.EqualValues(t, 7, v)
	}
}
