package kernel

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
)

// digits is the precision that results are compared in.
const digits = 1500

func exact(x float64) *big.Float { return new(big.Float).SetPrec(digits).SetFloat64(x) }

func quotient(x *big.Float, n int) *big.Float { return new(big.Float).Quo(x, exact(float64(n))) }

// series adds up the terms that next makes of each other, until they vanish.
func series(first *big.Float, next func(term *big.Float, i int) *big.Float) *big.Float {
	sum, term := new(big.Float).Copy(first), first
	for i := 1; term.Sign() != 0 && term.MantExp(nil) > -400; i++ {
		term = next(term, i)
		sum.Add(sum, term)
	}
	return sum
}

func product(x, y *big.Float) *big.Float { return new(big.Float).Mul(x, y) }

// exactExponential is Σ xⁱ/i!, or one divided by that.
func exactExponential(x float64) *big.Float {
	if x < 0 {
		return new(big.Float).Quo(exact(1), exactExponential(-x))
	}
	return series(exact(1), func(term *big.Float, i int) *big.Float { return quotient(product(term, exact(x)), i) })
}

// exactSine starts from x and exactCosine from 1: each term is the one before
// times -x²/(i·(i+1)).
func exactSine(x float64) *big.Float   { return alternating(exact(x), x, 0) }
func exactCosine(x float64) *big.Float { return alternating(exact(1), x, 1) }

func alternating(first *big.Float, x float64, less int) *big.Float {
	square := product(exact(-x), exact(x))
	return series(first, func(term *big.Float, i int) *big.Float {
		return quotient(product(term, square), (2*i-less)*(2*i-less+1))
	})
}

// exactLog is 2·artanh((x-1)/(x+1)).
func exactLog(x float64) *big.Float {
	s := new(big.Float).Quo(new(big.Float).Sub(exact(x), exact(1)), new(big.Float).Add(exact(x), exact(1)))
	square, power := product(s, s), s
	sum := new(big.Float).Copy(s)
	for i := 3; power.Sign() != 0 && power.MantExp(nil) > -120; i += 2 {
		power = product(power, square)
		sum.Add(sum, quotient(power, i))
	}
	return sum.Add(sum, sum)
}

// elementary lists the functions with arguments of the sizes that a model has; the
// conversions keep them the same on every machine too.
var elementary = []struct {
	name      string
	f         func(float64) float64
	exact     func(float64) *big.Float
	arguments func(r *rand.Rand) float64
}{
	{"Exponential", Exponential, exactExponential, func(r *rand.Rand) float64 { return float64(1400*r.Float64()) - 700 }},
	{"Exponential near 0", Exponential, exactExponential, func(r *rand.Rand) float64 { return math.Ldexp(2*r.Float64()-1, -r.IntN(60)) }},
	{"sine", sine, exactSine, func(r *rand.Rand) float64 { return 8*r.Float64() - 4 }},
	{"sine of large angles", sine, exactSine, func(r *rand.Rand) float64 { return float64(r.IntN(600)) * r.Float64() }},
	{"cosine", cosine, exactCosine, func(r *rand.Rand) float64 { return 8*r.Float64() - 4 }},
	{"cosine of large angles", cosine, exactCosine, func(r *rand.Rand) float64 { return float64(r.IntN(600)) * r.Float64() }},
	{"Log", Log, exactLog, func(r *rand.Rand) float64 { return math.Ldexp(1+r.Float64(), r.IntN(9)-4) }},
	{"Log near 1", Log, exactLog, func(r *rand.Rand) float64 { return 1 + math.Ldexp(2*r.Float64()-1, -1-r.IntN(50)) }},
}

func sine(x float64) float64   { s, _ := Sincos(x); return s }
func cosine(x float64) float64 { _, c := Sincos(x); return c }

// TestElementaryFunctions compares with sums of their series in many digits.
func TestElementaryFunctions(t *testing.T) {
	for _, function := range elementary {
		t.Run(function.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			worst, at := 0.0, 0.0
			for range 300 {
				x := function.arguments(r)
				want := function.exact(x)
				near, _ := want.Float64()
				unit := math.Ldexp(1, math.Ilogb(near)-52)
				off, _ := new(big.Float).Sub(exact(function.f(x)), want).Float64()
				if off := math.Abs(off) / unit; off > worst {
					worst, at = off, x
				}
			}
			t.Logf("%.3f units in the last place, at %v", worst, at)
			assert.Less(t, worst, 1.0, "at %v", at)
		})
	}
}

func TestElementaryFunctionsAtTheEdges(t *testing.T) {
	assert.EqualValues(t, 1, Exponential(0))
	assert.EqualValues(t, 0, Exponential(math.Inf(-1)))
	assert.EqualValues(t, 0, Exponential(-746))
	assert.EqualValues(t, math.SmallestNonzeroFloat64, Exponential(-745.1))
	assert.InEpsilon(t, math.MaxFloat64, Exponential(709.782712893384), 1e-12)
	assert.True(t, math.IsInf(Exponential(709.7827128933841), 1))
	assert.True(t, math.IsInf(Exponential(math.Inf(1)), 1))
	assert.True(t, math.IsNaN(Exponential(math.NaN())))
	s, c := Sincos(0)
	assert.Zero(t, s)
	assert.EqualValues(t, 1, c)
	assert.Zero(t, Log(1))
}

// TestElementaryFunctionsHaveTheSameBitsEverywhere holds a million results to the
// hash that they have on amd64; `make arm64` runs it where Go fuses products with
// sums. That they are right is what TestElementaryFunctions says.
func TestElementaryFunctionsHaveTheSameBitsEverywhere(t *testing.T) {
	const want = "78038fcdb68d052e96075320253774053439b14e33e446d0c5615bc27c51ddc7"
	hash := sha256.New()
	for _, function := range elementary {
		r := rand.New(rand.NewPCG(3, 4))
		var bits []byte
		for range 125_000 {
			bits = binary.LittleEndian.AppendUint64(bits, math.Float64bits(function.f(function.arguments(r))))
		}
		hash.Write(bits)
	}
	assert.Equal(t, want, hex.EncodeToString(hash.Sum(nil)))
}
