package conformance

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// lambda sets the confidence of the probabilistic bounds. Rounding errors e_i
// that are independent, of mean zero and at most |e_i| in size add up to more
// than λ·sqrt(Σe_i²) with probability at most 2·exp(-λ²/2) (Hoeffding; Higham
// and Mary 2019, https://doi.org/10.1137/18M1226312, Theorem 2.4). λ = 7 makes
// that 4.6e-11 for an element: a correct run of ten million elements fails by
// chance once in two thousand runs, and would have to be unlucky in the model's
// own assumptions besides, since most bounds below add worst cases up.
const lambda = 7

// roundoff is the arithmetic of a subject as far as bounds need it.
type roundoff struct {
	// sum is the unit roundoff of sums and of elementary functions: float32 for
	// 16-bit subjects too, whose matrix products accumulate in float32.
	sum float64
	// store is the unit roundoff of the format that activations are stored in.
	store float64
	// tiny is what rounding can change however small the value is: the spacing
	// of subnormal numbers, or the smallest normal number for float32, since
	// processors and runtimes may flush subnormal numbers to zero.
	tiny float64
}

// roundoffOf returns the roundoff of a format.
func roundoffOf(f kernel.Format) roundoff {
	sum := kernel.Float32
	if f.Digits > sum.Digits {
		sum = f
	}
	tiny := f.Tiny()
	if f.MinExponent <= kernel.Float32.MinExponent {
		tiny = math.Ldexp(1, f.MinExponent)
	}
	return roundoff{sum: sum.UnitRoundoff(), store: f.UnitRoundoff(), tiny: tiny}
}

// accumulation bounds the relative error of a sum of n products against the sum
// of their magnitudes, in any order: n·u always, λ·√n·u with the confidence
// that λ buys (Higham and Mary 2019, Theorem 3.1).
func (r roundoff) accumulation(n int) float64 {
	return min(float64(n), lambda*math.Sqrt(float64(n))) * r.sum
}

// bounding is what a bound is computed from: the float64 evaluation that holds
// the inputs (and computed the value to be bounded), the tap, and the subject's
// arithmetic.
type bounding struct {
	roundoff
	truth *evaluation[float64]
	layer int
	name  string
}

// at returns an input of the stage, a tap of the same block.
func (b bounding) at(name string) []float64 {
	if b.layer < 0 {
		return b.truth.real(name)
	}
	return b.truth.real(taps.Block(b.layer, name))
}

// weights returns the block's weights.
func (b bounding) weights() *checkpoint.Block { return &b.truth.model.Weights.Blocks[b.layer] }

// linear bounds x·Wᵀ + bias before it is stored: accumulation(n+1)·(|x|·|W|ᵀ +
// |bias|), element by element.
func (b bounding) linear(x []float64, w checkpoint.Matrix, bias []float32) []float64 {
	_, n := w.Dims()
	product := kernel.NewProduct(magnitudes(x), absolute{w})
	product.Stop = func() bool { return b.truth.ctx.Err() != nil }
	kernel.MatMuls([]kernel.Product[float64]{product}, nil)
	bound := product.Y
	factor := b.accumulation(n + 1)
	for i := range bound {
		if bias != nil {
			bound[i] += math.Abs(float64(bias[i%len(bias)]))
		}
		bound[i] *= factor
	}
	return bound
}

// stored adds to a bound what rounding a value of that size a number of times
// adds.
func (b bounding) stored(bound, value []float64, times float64) []float64 {
	for i, v := range value {
		bound[i] += times*b.store*math.Abs(v) + b.tiny
	}
	return bound
}

// absolute is a matrix of magnitudes.
type absolute struct{ checkpoint.Matrix }

// Rows decodes and drops the signs.
func (a absolute) Rows(dst []float32, from, n int) {
	a.Matrix.Rows(dst, from, n)
	_, cols := a.Dims()
	for i, v := range dst[:n*cols] {
		dst[i] = float32(math.Abs(float64(v)))
	}
}

// Magnitudes returns the matrix with its signs, for kernels that drop them faster.
func (a absolute) Magnitudes() kernel.Rows { return a.Matrix }

func magnitudes(x []float64) []float64 {
	out := make([]float64, len(x))
	for i, v := range x {
		out[i] = math.Abs(v)
	}
	return out
}

// independent adds up errors that have nothing to do with each other: their
// plain sum, or the probabilistic bound if that is smaller.
type independent struct{ sum, squares float64 }

func (s *independent) add(e float64) {
	s.sum += e
	s.squares += e * e
}

func (s *independent) bound() float64 { return min(s.sum, lambda*math.Sqrt(s.squares)) }
