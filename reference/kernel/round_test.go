package kernel

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestNearestOfBitsIsThatOfDivision compares the two ways to round, on numbers of
// all sizes, ties and their neighbours among them; in float32 also with Go's own
// conversion.
func TestNearestOfBitsIsThatOfDivision(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, f := range []Format{Float32, Float16, BFloat16} {
		for range 20_000 {
			x := math.Ldexp(2*r.Float64()-1, r.IntN(f.MaxExponent-f.MinExponent+30)+f.MinExponent-20)
			if r.IntN(2) == 0 { // a tie, or one float64 beside it
				x = math.Float64frombits(math.Float64bits(x) >> (52 - f.Digits) << (52 - f.Digits))
				x = math.Float64frombits(math.Float64bits(x) + uint64(r.IntN(3)) - 1)
			}
			require.Equal(t, f.nearest(x), f.Nearest(x), "%s of %v", f.Name, x)
			if f == Float32 {
				require.Equal(t, float64(float32(x)), f.Nearest(x), "float32 of %v", x)
			}
		}
		for _, x := range []float64{0, math.Copysign(0, -1), math.Inf(1), math.Inf(-1), f.Max(), 2 * f.Max(), -2 * f.Max()} {
			require.Equal(t, f.nearest(x), f.Nearest(x), "%s of %v", f.Name, x)
		}
		require.True(t, math.IsNaN(f.Nearest(math.NaN())))
	}
}
