package reference

import (
	"fmt"

	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// Float is what a model computes in.
type Float = kernel.Float

// Precision names the arithmetic of a run.
type Precision string

// The precisions. Float64 is the truth, Float32 computes and accumulates in
// float32. BFloat16 and Float16 round to the short format at every point where
// OpenAI's torch model does, each time once and from an exact sum (computed in
// float64), so that their results do not depend on the machine.
const (
	Float64  Precision = "float64"
	Float32  Precision = "float32"
	BFloat16 Precision = "bfloat16"
	Float16  Precision = "float16"
)

// ParsePrecision checks a precision's name.
func ParsePrecision(name string) (Precision, error) {
	switch p := Precision(name); p {
	case Float64, Float32, BFloat16, Float16:
		return p, nil
	}
	return "", fmt.Errorf("unknown precision %q: it is one of float64, float32, bfloat16, float16", name)
}

// Format returns the storage format of the precision's activations.
func (p Precision) Format() kernel.Format {
	switch p {
	case Float32:
		return kernel.Float32
	case BFloat16:
		return kernel.BFloat16
	case Float16:
		return kernel.Float16
	}
	return kernel.Float64
}

// Arithmetic is how a model sums and rounds. Stages get it with every call.
type Arithmetic[F Float] struct {
	// Dot sums the products of every linear layer, norm and attention. Nil means
	// the fastest way: kernel.MatMuls' own for matrices, kernel.Lanes elsewhere.
	Dot kernel.Dot[F]
	// Round rounds activations in place at the points where torch stores them
	// in the model's dtype; nil where the format is F itself.
	Round func([]F)
}

// Inner is the inner product of two vectors.
func (a Arithmetic[F]) Inner(x, y []F) F {
	if a.Dot == nil {
		return kernel.Lanes(x, y)
	}
	return a.Dot(x, y)
}

// rounded rounds x in place and returns it.
func (a Arithmetic[F]) rounded(x []F) []F {
	if a.Round != nil {
		a.Round(x)
	}
	return x
}

// Exact is float64 without any further rounding: the truth.
func Exact() Arithmetic[float64] { return Arithmetic[float64]{} }

// Single is float32 throughout.
func Single() Arithmetic[float32] { return Arithmetic[float32]{} }

// Short rounds to a 16-bit format at torch's rounding points.
func Short(f kernel.Format) Arithmetic[float64] {
	return Arithmetic[float64]{Round: func(x []float64) {
		kernel.Parallel(len(x), 1<<14, func(from, to int) {
			for i, v := range x[from:to] {
				x[from+i] = f.Nearest(v)
			}
		})
	}}
}

// convert changes the type of every element; float32 rounds to nearest.
func convert[To, From Float](x []From) []To {
	out := make([]To, len(x))
	for i, v := range x {
		out[i] = To(v)
	}
	return out
}
