package reference

import (
	"math"
	"math/big"
	"sync"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// Rotary is what RoPE needs to know: one frequency for each pair of dimensions,
// and the factor on both cosine and sine.
type Rotary struct {
	InverseFrequencies []float64 // [head_dim/2], radians per position
	Concentration      float64   // YaRN's attention scaling; 1 without YaRN
}

// NewRotary computes the frequencies with YaRN's "NTK by parts" interpolation.
//
// Pair i turns by theta^(-2i/d) per position. Pairs that turn often within the
// original context (below low) keep that, pairs that never complete a turn
// (above high) are slowed by the factor, and a linear ramp joins them.
//
// Source: Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2 and
// 3.4; openai/gpt-oss gpt_oss/torch/model.py RotaryEmbedding.
func NewRotary(c config.Config) Rotary {
	half := c.HeadDim / 2
	low, high := RampBounds(c)
	rotary := Rotary{InverseFrequencies: make([]float64, half), Concentration: 1}
	if c.RopeScalingFactor > 1 {
		rotary.Concentration = float64(0.1*kernel.Log(c.RopeScalingFactor)) + 1
	}
	for i := range half {
		frequency := fractionalPower(c.RopeTheta, i, half)
		if c.RopeScalingFactor <= 1 {
			rotary.InverseFrequencies[i] = 1 / frequency
			continue
		}
		ramp := min(max((float64(i)-low)/(high-low), 0), 1)
		interpolation := 1 / (c.RopeScalingFactor * frequency)
		extrapolation := 1 / frequency
		rotary.InverseFrequencies[i] = float64(interpolation*ramp) + float64(extrapolation*(1-ramp))
	}
	return rotary
}

// RampBounds returns the pair indices between which YaRN's ramp rises: where a
// pair makes ntk_beta and ntk_alpha turns within the original context.
func RampBounds(c config.Config) (low, high float64) {
	bound := func(turns float64) float64 {
		context := float64(c.InitialContextLength)
		return float64(c.HeadDim) / 2 * kernel.Log(context/(turns*2*math.Pi)) / kernel.Log(c.RopeTheta)
	}
	low, high = bound(c.RopeNTKBeta), bound(c.RopeNTKAlpha)
	if c.RopeTruncate {
		low, high = math.Floor(low), math.Ceil(high)
	}
	return low, high
}

// powers remembers what fractionalPower has computed: every layer needs the same
// few numbers, in decoding for every token.
var powers sync.Map // of power to float64

type power struct {
	base float64
	i, n int
}

// fractionalPower returns base^(i/n) rounded once to float64. math.Pow is off
// by several units in the last place, and at position 131,071 every unit of a
// frequency is 131,071 units of the angle; so the n-th root of base^i is found
// by Newton's method in 160 bits.
func fractionalPower(base float64, i, n int) float64 {
	if known, ok := powers.Load(power{base, i, n}); ok {
		return known.(float64)
	}
	const bits = 160
	seed := math.Pow(base, float64(i)/float64(n))
	target := integerPower(new(big.Float).SetPrec(bits).SetFloat64(base), i)
	root := new(big.Float).SetPrec(bits).SetFloat64(seed)
	count := new(big.Float).SetPrec(bits).SetInt64(int64(n))
	// The seed has about 50 correct bits; every step doubles them.
	for range 2 {
		below := integerPower(root, n-1)
		residual := new(big.Float).SetPrec(bits).Mul(below, root)
		residual.Sub(residual, target)
		slope := below.Mul(below, count)
		root.Sub(root, residual.Quo(residual, slope))
	}
	nearest, _ := root.Float64()
	powers.Store(power{base, i, n}, nearest)
	return nearest
}

// integerPower returns x^n by repeated squaring, in x's own precision.
func integerPower(x *big.Float, n int) *big.Float {
	power := new(big.Float).SetPrec(x.Prec()).SetInt64(1)
	square := new(big.Float).Copy(x)
	for ; n > 0; n >>= 1 {
		if n&1 == 1 {
			power.Mul(power, square)
		}
		square.Mul(square, square)
	}
	return power
}

// RotaryTable holds cosine and sine, times the concentration, for the positions
// of some tokens: [tokens, head_dim/2] each.
type RotaryTable[F Float] struct {
	Half     int // head_dim/2
	Cos, Sin []F
}

// Table evaluates the frequencies at positions. Angles, cosines and sines are
// float64 whatever F is, and rounded once: torch computes them in float32,
// which is off by u·position·frequency.
func (r Rotary) Table(positions []int) RotaryTable[float64] {
	half := len(r.InverseFrequencies)
	table := RotaryTable[float64]{
		Half: half,
		Cos:  make([]float64, len(positions)*half),
		Sin:  make([]float64, len(positions)*half),
	}
	for p, position := range positions {
		for i, frequency := range r.InverseFrequencies {
			sin, cos := kernel.Sincos(float64(position) * frequency)
			table.Cos[p*half+i] = cos * r.Concentration
			table.Sin[p*half+i] = sin * r.Concentration
		}
	}
	return table
}

// Rounded converts a table to the arithmetic that applies it.
func Rounded[F Float](a Arithmetic[F], t RotaryTable[float64]) RotaryTable[F] {
	return RotaryTable[F]{Half: t.Half, Cos: a.rounded(convert[F](t.Cos)), Sin: a.rounded(convert[F](t.Sin))}
}

// Rotate turns every head of x [tokens, heads, head_dim] by its token's angles.
// The two halves of a head are the coordinates (not neighbouring pairs).
//
// In a short format torch rounds both products and then their sum.
func Rotate[F Float](a Arithmetic[F], x []F, heads int, table RotaryTable[F]) []F {
	half := table.Half
	out := make([]F, len(x))
	kernel.Parallel(len(x)/(2*half), 64, func(from, to int) {
		products := make([]F, 4*half)
		for row := from; row < to; row++ {
			cos := table.Cos[row/heads*half:][:half]
			sin := table.Sin[row/heads*half:][:half]
			first, second := x[row*2*half:][:half], x[row*2*half+half:][:half]
			for i := range half {
				products[i], products[half+i] = first[i]*cos[i], second[i]*sin[i]
				products[2*half+i], products[3*half+i] = second[i]*cos[i], first[i]*sin[i]
			}
			a.rounded(products)
			turned := out[row*2*half:][:2*half]
			for i := range half {
				turned[i] = products[i] - products[half+i]
				turned[half+i] = products[2*half+i] + products[3*half+i]
			}
			a.rounded(turned)
		}
	})
	return out
}

// RotateQueries is RoPE over queries [tokens, heads, head_dim] at their absolute
// positions.
func RotateQueries[F Float](l Layer[F], q []F, positions []int) []F {
	return Rotate(l.Arithmetic, q, l.Config.Heads, Rounded(l.Arithmetic, l.Stages.Frequencies(l.Config).Table(positions)))
}

// RotateKeys is RoPE over keys [tokens, kv_heads, head_dim] at their absolute
// positions.
func RotateKeys[F Float](l Layer[F], k []F, positions []int) []F {
	return Rotate(l.Arithmetic, k, l.Config.KVHeads, Rounded(l.Arithmetic, l.Stages.Frequencies(l.Config).Table(positions)))
}
