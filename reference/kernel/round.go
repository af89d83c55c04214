package kernel

import "math"

// Format is a binary floating-point format, described by what rounding needs.
type Format struct {
	Name        string
	Digits      int // significand bits, the hidden one included
	MinExponent int // of the smallest normal number, 2^MinExponent
	MaxExponent int // of the largest binade, 2^MaxExponent
}

// The formats that gpt-oss runs in.
var (
	Float64  = Format{"float64", 53, -1022, 1023}
	Float32  = Format{"float32", 24, -126, 127}
	Float16  = Format{"float16", 11, -14, 15}
	BFloat16 = Format{"bfloat16", 8, -126, 127}
)

// UnitRoundoff is u = 2^-digits: rounding to nearest changes a normal number by
// at most u of itself.
func (f Format) UnitRoundoff() float64 { return math.Ldexp(1, -f.Digits) }

// Tiny is half the spacing of the subnormal numbers: the most that rounding can
// change a number below the normal range.
func (f Format) Tiny() float64 { return math.Ldexp(1, f.MinExponent-f.Digits) }

// Max is the largest finite number.
func (f Format) Max() float64 {
	return math.Ldexp(2-math.Ldexp(1, 1-f.Digits), f.MaxExponent)
}

// Nearest rounds x to the format, ties to even; overflow gives an infinity and
// NaN stays NaN. It rounds once, straight from float64.
func (f Format) Nearest(x float64) float64 {
	bits := math.Float64bits(x)
	exponent := int(bits>>52&0x7ff) - 1023
	if drop := 53 - f.Digits; drop > 0 && exponent >= f.MinExponent && exponent < f.MaxExponent {
		// A normal number that cannot overflow: add just under half of the last bit
		// that stays (half of it if that bit is odd), and cut. A carry goes into the
		// exponent, as it should.
		bits += 1<<(drop-1) - 1 + bits>>drop&1
		return math.Float64frombits(bits &^ (1<<drop - 1))
	}
	return f.nearest(x)
}

// nearest is Nearest for every number, by division and multiplication.
func (f Format) nearest(x float64) float64 {
	quantum := f.quantum(x)
	if quantum == 0 { // zero, infinite, NaN, or already as fine as float64 itself
		return x
	}
	return f.overflow(math.RoundToEven(x/quantum) * quantum)
}

// Stochastic rounds x to one of its two neighbours in the format, up with a
// probability equal to its distance from the lower one; uniform is in [0, 1).
// Monte Carlo arithmetic (Parker 1997) perturbs a computation this way to see
// how far rounding alone can move it.
func (f Format) Stochastic(x, uniform float64) float64 {
	quantum := f.quantum(x)
	if quantum == 0 {
		return x
	}
	return f.overflow(math.Floor(x/quantum+uniform) * quantum)
}

// quantum is the format's spacing at x, or 0 if there is nothing to round.
func (f Format) quantum(x float64) float64 {
	if x == 0 || math.IsInf(x, 0) || x != x || f.Digits >= 53 {
		return 0
	}
	exponent := max(math.Ilogb(x), f.MinExponent)
	return math.Ldexp(1, exponent+1-f.Digits)
}

func (f Format) overflow(x float64) float64 {
	if math.Abs(x) > f.Max() {
		return math.Inf(int(math.Copysign(1, x)))
	}
	return x
}
