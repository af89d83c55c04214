package kernel

import (
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestExp compares float32 exponentials with math.Exp, which is far more accurate,
// over all magnitudes and signs: 4001 bit patterns apart, and densely where
// results begin to overflow, to be subnormal and to vanish. The error is below
// one unit in the last place; AVX2 and AVX-512 agree to the bit.
func TestExp(t *testing.T) {
	var x []float32
	for bits := uint64(0); bits < 1<<32; bits += 4001 {
		x = append(x, math.Float32frombits(uint32(bits)))
	}
	for _, edge := range []float32{-104, -103.9721, -103.2789, -87.3365, -0.34657359, 0, 0.34657359, 88.7228, 89} {
		for i := range uint32(2000) {
			x = append(x, math.Float32frombits(math.Float32bits(edge)+i-1000))
		}
	}
	var first []float32
	for _, set := range append(instructionSets, nil) {
		got := append([]float32(nil), x...)
		with(set, func() { Exp(got) })
		worst := 0.0
		for i, v := range x {
			want := math.Exp(float64(v))
			switch rounded := float32(want); {
			case math.IsNaN(want):
				require.True(t, math.IsNaN(float64(got[i])), "%s: e^%v", nameOf(set), v)
			case math.IsInf(float64(rounded), 0) || math.IsInf(float64(got[i]), 0):
				require.Equal(t, rounded, got[i], "%s: e^%v", nameOf(set), v)
			default:
				worst = max(worst, math.Abs(float64(got[i])-want)/spacing(want))
			}
		}
		t.Logf("%s: %.3f units in the last place", nameOf(set), worst)
		assert.Less(t, worst, 1.0, nameOf(set))
		if set != nil {
			if first == nil {
				first = got
			}
			requireSameBits(t, first, got)
		}
	}
}

// spacing is the distance of float32's numbers at x.
func spacing(x float64) float64 {
	return math.Ldexp(1, max(math.Ilogb(x), Float32.MinExponent)+1-Float32.Digits)
}

// requireSameBits compares floats that may be NaN.
func requireSameBits(t *testing.T, want, got []float32) {
	t.Helper()
	for i := range want {
		if math.Float32bits(want[i]) != math.Float32bits(got[i]) && want[i] == want[i] {
			require.Failf(t, "different bits", "element %d: %v, not %v", i, got[i], want[i])
		}
	}
}

// TestExpDoesNotDependOnItsNeighbours: the same value has the same exponential
// at every place of slices of every length, and float64 that of Exponential.
func TestExpDoesNotDependOnItsNeighbours(t *testing.T) {
	for _, set := range append([]*instructionSet{nil}, instructionSets...) {
		for n := range 40 {
			t.Run(fmt.Sprintf("%s/%d", nameOf(set), n), func(t *testing.T) {
				x, alone := make([]float32, n+1), make([]float32, n+1)
				wide := make([]float64, n)
				for i := range n {
					x[i] = float32(i-20) * 1.37
					alone[i], wide[i] = x[i], float64(x[i])
				}
				x[n] = 5 // beyond the end: must stay
				with(set, func() {
					Exp(x[:n])
					Exp(wide)
					for i := range n {
						Exp(alone[i : i+1])
					}
				})
				assert.Equal(t, alone[:n], x[:n])
				assert.EqualValues(t, 5, x[n])
				for i, v := range wide {
					assert.Equal(t, Exponential(float64(float32(i-20)*1.37)), v)
				}
			})
		}
	}
}
