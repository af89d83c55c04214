package conformance

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// frequencyRoundings is how many float32 roundings stand between RoPE's
// configuration and an angle. theta^(2i/d) costs a power, good to 2 units in the
// last place, that is 4u; YaRN divides it twice (2u), weighs and adds (3u); the
// product with the position adds u. torch is off by 1u of the angle in practice.
const frequencyRoundings = 10

func boundQRot(b bounding, want []float64) []float64 {
	return boundRotation(b, b.at(taps.Q), b.truth.model.Weights.Config.Heads, want)
}

func boundKRot(b bounding, want []float64) []float64 {
	return boundRotation(b, b.at(taps.K), b.truth.model.Weights.Config.KVHeads, want)
}

// boundRotation bounds o1 = x1·cos − x2·sin and o2 = x2·cos + x1·sin.
//
// An angle a = position·frequency is off by at most frequencyRoundings·u·a,
// which is what makes long positions inaccurate in float32, in every
// implementation. It moves the cosine by |sin|·δa and the sine by |cos|·δa; both
// are evaluated to 2u, multiplied with the concentration (u) and stored in the
// subject's format. Then two products and a sum, each rounded.
func boundRotation(b bounding, x []float64, heads int, want []float64) []float64 {
	rotary := b.truth.model.Stages.Frequencies(b.truth.model.Weights.Config)
	half := len(rotary.InverseFrequencies)
	places := b.truth.positions()
	table := rotary.Table(places)
	bound := make([]float64, len(want))
	for row := range len(x) / (2 * half) {
		token := row / heads
		for i := range half {
			cos, sin := math.Abs(table.Cos[token*half+i]), math.Abs(table.Sin[token*half+i])
			angle := frequencyRoundings * b.sum * float64(places[token]) * rotary.InverseFrequencies[i]
			turn := min(angle, 2) // no angle moves a cosine by more
			deltaCos := sin*turn + cos*turn*turn/2 + (3*b.sum+b.store)*cos
			deltaSin := cos*turn + sin*turn*turn/2 + (3*b.sum+b.store)*sin
			x1, x2 := math.Abs(x[row*2*half+i]), math.Abs(x[row*2*half+half+i])
			bound[row*2*half+i] = x1*deltaCos + x2*deltaSin + b.store*(x1*cos+x2*sin)
			bound[row*2*half+half+i] = x2*deltaCos + x1*deltaSin + b.store*(x2*cos+x1*sin)
		}
	}
	return b.stored(bound, want, 1)
}
