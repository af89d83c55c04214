package faults

import (
	"math"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// rope lists the faults of the rotary embedding and of YaRN.
func rope() []Fault {
	all := []Fault{
		{
			ID:          "rope-interleaved",
			Explanation: "Neighbouring pairs (0, 1), (2, 3), … are turned instead of the two halves of a head.",
			Thread:      "https://github.com/NVIDIA/TensorRT-LLM/pull/16378",
			Stages:      Swap{Wide: ropeInterleaved[float64], Single: ropeInterleaved[float32]},
			Graph:       ropeInterleavedGraph,
		},
		{
			ID:          "rope-missing",
			Explanation: "Queries and keys are not turned at all, nor multiplied by the concentration: scores don't know positions.",
			Stages:      Swap{Wide: ropeMissing[float64], Single: ropeMissing[float32]},
			Graph:       ropeMissingGraph,
		},
		{
			ID:          "rope-backwards",
			Explanation: "Queries and keys are turned by the negated angle: scores see every distance with the other sign.",
			Thread:      "https://github.com/karpathy/nanochat/pull/489",
			Related:     true,
			Stages:      Swap{Wide: ropeBackwards[float64], Single: ropeBackwards[float32]},
			Graph:       ropeBackwardsGraph,
		},
		{
			ID:          "rope-no-yarn",
			Explanation: "Plain RoPE: neither YaRN's frequencies nor its concentration.",
			Thread:      "https://github.com/NVIDIA/TensorRT-Model-Connect/issues/399",
			Checkpoint:  configured(func(c *config.Config) { c.RopeScalingFactor = 1 }),
		},
		{
			ID:          "rope-no-concentration",
			Explanation: "Cosine and sine are not multiplied by 0.1·ln(factor) + 1.",
			Thread:      "https://github.com/NVIDIA/TensorRT-Model-Connect/issues/399",
			Stages:      Swap{Wide: ropeNoConcentration[float64], Single: ropeNoConcentration[float32]},
			Graph:       ropeNoConcentrationGraph,
		},
		{
			ID: "rope-concentration-once", Tap: taps.KRot,
			Explanation: "The concentration reaches the scores once instead of twice: the queries have it, the keys don't.",
			Thread:      "https://github.com/pytorch/torchtitan/pull/2216",
			Related:     true,
			Stages:      Swap{Wide: ropeConcentrationOnce[float64], Single: ropeConcentrationOnce[float32]},
			Graph:       ropeConcentrationOnceGraph,
		},
		{
			ID:          "rope-concentration-squared",
			Explanation: "The concentration is applied twice to queries and keys.",
			Stages:      Swap{Wide: ropeConcentrationSquared[float64], Single: ropeConcentrationSquared[float32]},
			Graph:       ropeConcentrationSquaredGraph,
		},
		{
			ID:          "rope-truncated-bounds",
			Explanation: "The bounds of YaRN's ramp are rounded outwards to whole numbers.",
			Thread:      "https://github.com/vllm-project/vllm/issues/27722",
			Checkpoint:  configured(func(c *config.Config) { c.RopeTruncate = true }),
		},
		{
			ID:          "rope-position-off-by-one",
			Explanation: "The queries, but not the keys, are turned as if they stood one position later.",
			Thread:      "https://github.com/quic/efficient-transformers/pull/1250",
			Related:     true,
			Stages:      Swap{Wide: queriesShifted[float64](+1), Single: queriesShifted[float32](+1)},
			Graph:       queriesShiftedGraph(+1),
			Variants: []Fault{{
				Explanation: "The queries, but not the keys, are turned as if they stood one position earlier.",
				Stages:      Swap{Wide: queriesShifted[float64](-1), Single: queriesShifted[float32](-1)},
				Graph:       queriesShiftedGraph(-1),
			}},
		},
		{
			ID:          "rope-base-10000",
			Explanation: "The base of the frequencies is 10000, the usual default, whatever the configuration says.",
			Thread:      "https://github.com/sgl-project/sglang/pull/30050",
			Checkpoint:  configured(func(c *config.Config) { c.RopeTheta = 10000 }),
		},
		{
			ID:          "rope-applied-twice",
			Explanation: "Queries and keys are turned twice: twice the angle, the concentration squared.",
			Thread:      "https://github.com/NVIDIA/TensorRT-LLM/pull/16378",
			Stages:      Swap{Wide: ropeAppliedTwice[float64], Single: ropeAppliedTwice[float32]},
			Graph:       ropeAppliedTwiceGraph,
		},
		{
			ID:          "rope-betas-swapped",
			Explanation: "YaRN's two betas are exchanged, so that the ramp runs backwards.",
			Thread:      "https://github.com/pytorch/torchtitan/pull/3787",
			Related:     true,
			Checkpoint: configured(func(c *config.Config) {
				c.RopeNTKAlpha, c.RopeNTKBeta = c.RopeNTKBeta, c.RopeNTKAlpha
			}),
		},
		{
			ID:          "rope-factor-inverted",
			Explanation: "YaRN multiplies the low frequencies by the factor instead of dividing them by it.",
			Thread:      "https://github.com/kekzl/imp/issues/584",
			Stages:      Swap{Wide: ropeFactorInverted[float64], Single: ropeFactorInverted[float32]},
			Graph:       ropeFactorInvertedGraph,
		},
		{
			ID:          "rope-linear-scaling",
			Explanation: "All frequencies are divided by the factor (position interpolation), not by parts.",
			Thread:      "https://github.com/rasbt/LLMs-from-scratch/pull/940",
			Related:     true,
			Stages:      Swap{Wide: ropeLinearScaling[float64], Single: ropeLinearScaling[float32]},
			Graph:       ropeLinearScalingGraph,
		},
		{
			ID:          "rope-original-context-extended",
			Explanation: "YaRN's bounds are computed from the extended context (131072) instead of the original one (4096).",
			Thread:      "https://github.com/NVIDIA/Megatron-LM/issues/1418",
			Related:     true,
			Checkpoint: configured(func(c *config.Config) {
				c.InitialContextLength = int(float64(c.InitialContextLength) * max(c.RopeScalingFactor, 1))
			}),
		},
		{
			ID:          "rope-inv-freq-bfloat16",
			Explanation: "The frequencies are rounded to bfloat16 before they are multiplied with the position.",
			Thread:      "https://github.com/sgl-project/sglang-jax/issues/1472",
			Related:     true,
			Stages:      Swap{Wide: ropeInvFreqBFloat16[float64], Single: ropeInvFreqBFloat16[float32]},
			Graph:       ropeInvFreqBFloat16Graph,
		},
	}
	for i := range all {
		all[i].Stage = stageRope
		if all[i].Tap == "" {
			all[i].Tap = taps.QRot
		}
	}
	return all
}

// rotation is the type of the stages that turn queries and keys.
type rotation[F reference.Float] = func(l reference.Layer[F], x []F, positions []int) []F

// ropeInterleaved moves the pairs to where the right rotation looks for them,
// and back.
func ropeInterleaved[F reference.Float](s *reference.Stages[F]) {
	interleaved := func(rotate rotation[F]) rotation[F] {
		return func(l reference.Layer[F], x []F, positions []int) []F {
			half := l.Config.HeadDim / 2
			halves := make([]F, len(x))
			for at := 0; at < len(x); at += 2 * half {
				for i := range half {
					halves[at+i], halves[at+half+i] = x[at+2*i], x[at+2*i+1]
				}
			}
			turned := rotate(l, halves, positions)
			pairs := make([]F, len(x))
			for at := 0; at < len(x); at += 2 * half {
				for i := range half {
					pairs[at+2*i], pairs[at+2*i+1] = turned[at+i], turned[at+half+i]
				}
			}
			return pairs
		}
	}
	s.RopeQuery, s.RopeKey = interleaved(s.RopeQuery), interleaved(s.RopeKey)
}

func ropeMissing[F reference.Float](s *reference.Stages[F]) {
	unturned := func(_ reference.Layer[F], x []F, _ []int) []F { return x }
	s.RopeQuery, s.RopeKey = unturned, unturned
}

func ropeMissingGraph(s *exporter.Stages) {
	unturned := func(l exporter.Layer, x, _, _ exporter.Value) exporter.Value { return l.Identity(x) }
	s.RopeQuery, s.RopeKey = unturned, unturned
}

// ropeBackwards turns by −p·frequency at position p. A score depends on the
// difference of its query's and its key's angles, so both must turn the wrong way
// for it to be the right one negated: cos(−a) = cos(a) leaves what the pairs have
// in common, sin(−a) = −sin(a) changes the sign of the rest. With one of them
// alone a score would see the sum of the positions.
func ropeBackwards[F reference.Float](s *reference.Stages[F]) {
	backwards := func(rotate rotation[F]) rotation[F] {
		return func(l reference.Layer[F], x []F, positions []int) []F {
			negated := make([]int, len(positions))
			for i, p := range positions {
				negated[i] = -p
			}
			return rotate(l, x, negated)
		}
	}
	s.RopeQuery, s.RopeKey = backwards(s.RopeQuery), backwards(s.RopeKey)
}

func ropeBackwardsGraph(s *exporter.Stages) {
	backwards := func(rotate turning) turning {
		return func(l exporter.Layer, x, cos, sin exporter.Value) exporter.Value {
			return rotate(l, x, cos, l.Neg(sin))
		}
	}
	s.RopeQuery, s.RopeKey = backwards(s.RopeQuery), backwards(s.RopeKey)
}

// turning is the type of the exporter's stages that turn queries and keys.
type turning = func(l exporter.Layer, x, cos, sin exporter.Value) exporter.Value

func ropeInterleavedGraph(s *exporter.Stages) {
	interleaved := func(rotate turning) turning {
		return func(l exporter.Layer, x, cos, sin exporter.Value) exporter.Value {
			shape, half, two := x.Shape(), exporter.N(l.Config.HeadDim/2), exporter.N(2)
			// swapped exchanges the two inner axes of [tokens, heads, a, b].
			swapped := func(x exporter.Value, a, b exporter.Dim) exporter.Value {
				turned := l.Transpose(l.Reshape(x, shape[0], shape[1], a, b), 0, 1, 3, 2)
				return l.Reshape(turned, shape...)
			}
			return swapped(rotate(l, swapped(x, half, two), cos, sin), two, half)
		}
	}
	s.RopeQuery, s.RopeKey = interleaved(s.RopeQuery), interleaved(s.RopeKey)
}

// queriesShifted turns the queries, and not the keys, as if they stood by
// positions later.
func queriesShifted[F reference.Float](by int) func(*reference.Stages[F]) {
	return func(s *reference.Stages[F]) {
		rotate := s.RopeQuery
		s.RopeQuery = func(l reference.Layer[F], q []F, positions []int) []F {
			return rotate(l, q, shifted(positions, by))
		}
	}
}

// queriesShiftedGraph adds the angles of the positions in between to those that
// the tables have.
func queriesShiftedGraph(by int) func(*exporter.Stages) {
	return func(s *exporter.Stages) {
		rotate := s.RopeQuery
		s.RopeQuery = func(l exporter.Layer, q, cos, sin exporter.Value) exporter.Value {
			r := l.Stages.Frequencies(l.Config)
			half := len(r.InverseFrequencies)
			cosines, sines := make([]float32, half), make([]float32, half)
			for i, frequency := range r.InverseFrequencies {
				sine, cosine := math.Sincos(float64(by) * frequency)
				cosines[i], sines[i] = float32(cosine), float32(sine)
			}
			c, d := l.Floats("shift_cos", exporter.Ns(half), cosines), l.Floats("shift_sin", exporter.Ns(half), sines)
			return rotate(l, q,
				l.Subtract(l.Mul(cos, c), l.Mul(sin, d)),
				l.Add(l.Mul(sin, c), l.Mul(cos, d)))
		}
	}
}

func shifted(positions []int, by int) []int {
	moved := make([]int, len(positions))
	for i, p := range positions {
		moved[i] = p + by
	}
	return moved
}

func ropeAppliedTwice[F reference.Float](s *reference.Stages[F]) {
	twice := func(rotate rotation[F]) rotation[F] {
		return func(l reference.Layer[F], x []F, positions []int) []F {
			return rotate(l, rotate(l, x, positions), positions)
		}
	}
	s.RopeQuery, s.RopeKey = twice(s.RopeQuery), twice(s.RopeKey)
}

func ropeAppliedTwiceGraph(s *exporter.Stages) {
	twice := func(rotate turning) turning {
		return func(l exporter.Layer, x, cos, sin exporter.Value) exporter.Value {
			return rotate(l, rotate(l, x, cos, sin), cos, sin)
		}
	}
	s.RopeQuery, s.RopeKey = twice(s.RopeQuery), twice(s.RopeKey)
}

// frequencies is the type of the stage that knows what RoPE turns by.
type frequencies = func(config.Config) reference.Rotary

// refrequented changes the frequencies.
func refrequented[F reference.Float](s *reference.Stages[F], change func(c config.Config, right frequencies) reference.Rotary) {
	right := s.Frequencies
	s.Frequencies = func(c config.Config) reference.Rotary { return change(c, right) }
}

// refrequentedGraph does the same to a graph.
func refrequentedGraph(s *exporter.Stages, change func(c config.Config, right frequencies) reference.Rotary) {
	right := s.Frequencies
	s.Frequencies = func(c config.Config) exporter.Rotary {
		return exporter.Rotary(change(c, func(c config.Config) reference.Rotary { return reference.Rotary(right(c)) }))
	}
}

func ropeNoConcentrationGraph(s *exporter.Stages) { refrequentedGraph(s, noConcentration) }

func ropeNoConcentration[F reference.Float](s *reference.Stages[F]) {
	refrequented(s, noConcentration)
}

func noConcentration(c config.Config, right frequencies) reference.Rotary {
	r := right(c)
	r.Concentration = 1
	return r
}

func ropeConcentrationOnce[F reference.Float](s *reference.Stages[F]) {
	rotate := s.RopeKey
	s.RopeKey = func(l reference.Layer[F], k []F, positions []int) []F {
		return rotate(restaged(l, ropeNoConcentration[F]), k, positions)
	}
}

func ropeConcentrationOnceGraph(s *exporter.Stages) {
	rotate := s.RopeKey
	s.RopeKey = func(l exporter.Layer, k, cos, sin exporter.Value) exporter.Value {
		inverse := l.Float(1 / l.Stages.Frequencies(l.Config).Concentration)
		return rotate(l, k, l.Mul(cos, inverse), l.Mul(sin, inverse))
	}
}

func ropeConcentrationSquared[F reference.Float](s *reference.Stages[F]) {
	refrequented(s, concentrationSquared)
}

func ropeConcentrationSquaredGraph(s *exporter.Stages) { refrequentedGraph(s, concentrationSquared) }

func concentrationSquared(c config.Config, right frequencies) reference.Rotary {
	r := right(c)
	r.Concentration *= r.Concentration
	return r
}

func ropeFactorInverted[F reference.Float](s *reference.Stages[F]) {
	refrequented(s, factorInverted)
}

func ropeFactorInvertedGraph(s *exporter.Stages) { refrequentedGraph(s, factorInverted) }

// factorInverted has frequency·factor where YaRN has frequency/factor.
func factorInverted(c config.Config, right frequencies) reference.Rotary {
	factor := c.RopeScalingFactor
	if factor <= 1 {
		return right(c)
	}
	low, high := reference.RampBounds(c)
	return eachFrequency(unscaled(c, right), func(i int, frequency float64) float64 {
		ramp := min(max((float64(i)-low)/(high-low), 0), 1)
		return frequency * (factor*ramp + 1 - ramp)
	})
}

func ropeLinearScaling[F reference.Float](s *reference.Stages[F]) {
	refrequented(s, linearScaling)
}

func ropeLinearScalingGraph(s *exporter.Stages) { refrequentedGraph(s, linearScaling) }

func linearScaling(c config.Config, right frequencies) reference.Rotary {
	return eachFrequency(unscaled(c, right), func(_ int, frequency float64) float64 {
		return frequency / max(c.RopeScalingFactor, 1)
	})
}

// unscaled returns frequencies without YaRN, but with its concentration.
func unscaled(c config.Config, right frequencies) reference.Rotary {
	r := right(c)
	c.RopeScalingFactor = 1
	r.InverseFrequencies = right(c).InverseFrequencies
	return r
}

// eachFrequency changes every frequency, in a copy.
func eachFrequency(r reference.Rotary, change func(i int, frequency float64) float64) reference.Rotary {
	changed := make([]float64, len(r.InverseFrequencies))
	for i, frequency := range r.InverseFrequencies {
		changed[i] = change(i, frequency)
	}
	r.InverseFrequencies = changed
	return r
}

func ropeInvFreqBFloat16[F reference.Float](s *reference.Stages[F]) {
	refrequented(s, invFreqBFloat16)
}

func ropeInvFreqBFloat16Graph(s *exporter.Stages) { refrequentedGraph(s, invFreqBFloat16) }

func invFreqBFloat16(c config.Config, right frequencies) reference.Rotary {
	return eachFrequency(right(c), func(_ int, frequency float64) float64 { return kernel.BFloat16.Nearest(frequency) })
}
