package kernel

import "math"

// The elementary functions of float64. Package math has assembly for some
// processors, and elsewhere Go may fuse a product with a sum; these give the same
// bits on every machine, because every product is converted before it is added
// to. They are off by less than one unit in the last place.

// ln2Hi is the first 33 bits of ln 2: its product with any exponent is exact.
const (
	ln2Hi = 0x1.62e42feep-1
	ln2Lo = math.Ln2 - ln2Hi

	halfPiHi = 0x1.921fb54442d18p+0 // π/2 in float64
	halfPiLo = math.Pi/2 - halfPiHi
)

// Exponential returns e^x.
func Exponential(x float64) float64 {
	const largest, smallest = 709.79, -745.2 // beyond, even rounding does not help
	switch {
	case x != x:
		return x
	case x > largest:
		return math.Inf(1)
	case x < smallest:
		return 0
	}
	// e^x = 2^k·e^r with |r| ≤ ln(2)/2; tail is what r lost in rounding.
	k := math.Floor(float64(x*math.Log2E) + 0.5)
	hi, lo := x-float64(k*ln2Hi), float64(k*ln2Lo)
	r := hi - lo
	tail := (hi - r) - lo
	// The series of (e^r - 1 - r)/r²: the first term that is missing, r^14/14!, is
	// 2^-58 of the result at most.
	z := float64(r * r)
	z2 := float64(z * z)
	low := (1./2 + float64(r*(1./6))) + float64(z*(1./24+float64(r*(1./120))))
	middle := (1./720 + float64(r*(1./5040))) + float64(z*(1./40320+float64(r*(1./362880))))
	high := (1./3628800 + float64(r*(1./39916800))) + float64(z*(1./479001600+float64(r*(1./6227020800))))
	series := low + float64(z2*(middle+float64(z2*high)))
	y := 1 + (r + (tail + float64(z*series)))
	if e := int(k); e > -1022 && e < 1024 {
		return y * math.Float64frombits(uint64(e+1023)<<52)
	}
	return math.Ldexp(y, int(k))
}

// Sincos returns the sine and the cosine of x radians, |x| < 2^30.
func Sincos(x float64) (sin, cos float64) {
	// x = k·π/2 + r with |r| ≤ π/4; tail is what r lost in rounding.
	k := math.Floor(float64(x*(2/math.Pi)) + 0.5)
	whole := float64(k * halfPiHi)
	rest := x - whole
	below := math.FMA(k, halfPiHi, -whole) + float64(k*halfPiLo)
	r := rest - below
	tail := (rest - r) - below
	z := float64(r * r)
	half := float64(z / 2)
	w := 1 - half
	z2 := float64(z * z)
	// The series (sin r - r)/r³ and (cos r - 1 + r²/2)/r⁴, in pairs of terms; what is
	// missing is below 2^-58 of the result.
	s := (-1./6 + float64(z*(1./120))) + float64(z2*((-1./5040+float64(z*(1./362880)))+
		float64(z2*((-1./39916800+float64(z*(1./6227020800)))+float64(z2*(-1./1307674368000+float64(z*(1./355687428096000))))))))
	c := (1./24 - float64(z*(1./720))) + float64(z2*((1./40320-float64(z*(1./3628800)))+
		float64(z2*((1./479001600-float64(z*(1./87178291200)))+float64(z2*(1./20922789888000-float64(z*(1./6402373705728000))))))))
	sin = r + (float64(float64(r*z)*s) + float64(tail*w))
	cos = w + (((1 - w) - half) + (float64(z2*c) - float64(r*tail)))
	switch int64(k) & 3 {
	case 1:
		return cos, -sin
	case 2:
		return -sin, -cos
	case 3:
		return -cos, sin
	}
	return sin, cos
}

// Log returns the natural logarithm of a normal positive number.
func Log(x float64) float64 {
	// x = 2^e·m with m in [√½, √2); ln m = 2·artanh s with s = (m-1)/(m+1), whose
	// rounding is made good by rest.
	m, e := math.Frexp(x)
	if m < math.Sqrt2/2 {
		m, e = 2*m, e-1
	}
	above, sum := m-1, m+1
	lost := m - (sum - 1)
	s := above / sum
	rest := (math.FMA(-s, sum, above) - float64(s*lost)) / sum
	z := float64(s * s)
	series := 0. // |s| ≤ 0.1716: the first term that is missing, z^12/25, is 2^-65
	for n := 23; n >= 3; n -= 2 {
		series = 1/float64(n) + float64(z*series)
	}
	small := 2*(rest+float64(float64(s*z)*series)) + float64(float64(e)*ln2Lo)
	whole := float64(float64(e) * ln2Hi)
	high := whole + 2*s
	return high + (small + ((whole - high) + 2*s))
}
