package faults

import (
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// experts lists the faults of the experts' layers, but for those of their
// packed weights (see mxfp4).
func experts() []Fault {
	return slices.Concat(swiglu(), biases(), dispatch())
}

// noLimit stands for the clamp that is not there. It is finite, so that it can
// stand in a configuration.
const noLimit = math.MaxFloat32

// swiglu lists the faults of the activation.
func swiglu() []Fault {
	all := []Fault{
		{
			ID:          "swiglu-no-clamp",
			Explanation: "Neither glu nor linear is clamped.",
			Thread:      "https://github.com/huggingface/transformers/pull/40197",
			Checkpoint:  configured(func(c *config.Config) { c.SwiGLULimit = noLimit }),
		},
		{
			ID:          "swiglu-clamps-glu-below",
			Explanation: "glu is clamped on both sides instead of from above only.",
			Thread:      "https://github.com/PrimeIntellect-ai/prime-rl/pull/2365",
			Related:     true,
			Stages:      Swap{Wide: swigluClampsGluBelow[float64], Single: swigluClampsGluBelow[float32]},
			Graph:       swigluClampsGluBelowGraph,
		},
		{
			ID:          "swiglu-linear-unclamped",
			Explanation: "glu is clamped but linear is not.",
			Stages:      Swap{Wide: swigluLinearUnclamped[float64], Single: swigluLinearUnclamped[float32]},
			Graph:       swigluLinearUnclampedGraph,
		},
		{
			ID:          "swiglu-limit-zero",
			Explanation: "A limit that was not given counts as 0, and everything is clamped to that.",
			Thread:      "https://github.com/microsoft/onnxruntime/pull/27221",
			Checkpoint:  configured(func(c *config.Config) { c.SwiGLULimit = 0 }),
		},
		{
			ID:          "swiglu-no-plus-one",
			Explanation: "1 is not added to linear.",
			Thread:      "https://github.com/sgl-project/sglang/pull/39939",
			Stages:      Swap{Wide: swigluNoPlusOne[float64], Single: swigluNoPlusOne[float32]},
			Graph:       swigluNoPlusOneGraph,
		},
		{
			ID:          "swiglu-alpha-1",
			Explanation: "The sigmoid's slope is 1 (SiLU) instead of 1.702.",
			Thread:      "https://github.com/vllm-project/vllm/pull/45738",
			Related:     true,
			Checkpoint:  configured(func(c *config.Config) { c.SwiGLUAlpha = 1 }),
		},
		{
			ID:          "swiglu-alpha-0",
			Explanation: "A slope that was not given counts as 0, and every sigmoid is one half.",
			Thread:      "https://github.com/ROCm/hip-ep/pull/146",
			Checkpoint:  configured(func(c *config.Config) { c.SwiGLUAlpha = 0 }),
		},
		{
			ID:          "swiglu-plain",
			Explanation: "The usual SwiGLU, silu(glu)·linear: no clamp, no slope, no plus one.",
			Thread:      "https://github.com/sgl-project/sglang/pull/39939",
			Checkpoint:  configured(func(c *config.Config) { c.SwiGLULimit, c.SwiGLUAlpha = noLimit, 1 }),
			Stages:      Swap{Wide: swigluNoPlusOne[float64], Single: swigluNoPlusOne[float32]},
			Graph:       swigluNoPlusOneGraph,
		},
		{
			ID:          "swiglu-gelu",
			Explanation: "The exact GELU of glu instead of glu·sigmoid(1.702·glu), which is near it.",
			Stages:      Swap{Wide: swigluGELU[float64], Single: swigluGELU[float32]},
			Graph:       swigluGELUGraph,
		},
		{
			ID:          "swiglu-halves",
			Explanation: "glu is the first half of the columns and linear the second, not even and odd ones.",
			Thread:      "https://github.com/vllm-project/vllm/pull/29273",
			Stages:      Swap{Wide: swigluHalves[float64], Single: swigluHalves[float32]},
			Graph:       swigluHalvesGraph,
		},
		{
			ID:          "swiglu-gate-up-swapped",
			Explanation: "glu and linear are exchanged.",
			Thread:      "https://github.com/sgl-project/sglang/pull/32430",
			Related:     true,
			Stages:      Swap{Wide: swigluGateUpSwapped[float64], Single: swigluGateUpSwapped[float32]},
			Graph:       swigluGateUpSwappedGraph,
		},
	}
	for i := range all {
		all[i].Stage, all[i].Tap = stageExperts, taps.Activated
	}
	return all
}

// pairs returns the glu and the linear columns of x [..., 2·intermediate].
func pairs(l exporter.Layer, x exporter.Value) (glu, linear exporter.Value) {
	last, width := len(x.Shape())-1, exporter.N(l.Config.IntermediateSize)
	return l.Slice(x, last, 0, math.MaxInt64, 2, width), l.Slice(x, last, 1, math.MaxInt64, 2, width)
}

// clampedAbove and clamped are the two clamps.
func clampedAbove(l exporter.Layer, glu exporter.Value) exporter.Value {
	return l.Min(glu, l.Float(l.Config.SwiGLULimit))
}

func clamped(l exporter.Layer, linear exporter.Value) exporter.Value {
	return l.Max(clampedAbove(l, linear), l.Float(-l.Config.SwiGLULimit))
}

func plusOne(l exporter.Layer, linear exporter.Value) exporter.Value {
	return l.Round(l.Add(linear, l.Float(1)))
}

func swigluClampsGluBelow[F reference.Float](s *reference.Stages[F]) {
	clamp := s.ClampGlu
	s.ClampGlu = func(l reference.Layer[F], glu []F) {
		for i, g := range glu {
			glu[i] = max(g, F(-l.Config.SwiGLULimit))
		}
		clamp(l, glu)
	}
}

func swigluClampsGluBelowGraph(s *exporter.Stages) {
	activate := s.Activate
	s.Activate = func(l exporter.Layer, x exporter.Value) exporter.Value {
		floor := filled(2*l.Config.IntermediateSize, -noLimit)
		for i := 0; i < len(floor); i += 2 {
			floor[i] = float32(-l.Config.SwiGLULimit)
		}
		return activate(l, l.Max(x, l.Floats("glu_floor", exporter.Ns(len(floor)), floor)))
	}
}

func swigluLinearUnclamped[F reference.Float](s *reference.Stages[F]) {
	s.ClampLinear = func(reference.Layer[F], []F) {}
}

func swigluLinearUnclampedGraph(s *exporter.Stages) {
	s.Activate = func(l exporter.Layer, x exporter.Value) exporter.Value {
		glu, linear := pairs(l, x)
		return l.Round(l.Mul(exporter.Gated(l, clampedAbove(l, glu)), plusOne(l, linear)))
	}
}

func swigluNoPlusOne[F reference.Float](s *reference.Stages[F]) {
	s.Gate = func(l reference.Layer[F], glu, linear []F) {
		reference.Gated(l, glu)
		for i, v := range linear {
			glu[i] *= v
		}
		round(l, glu)
	}
}

func swigluNoPlusOneGraph(s *exporter.Stages) {
	s.Activate = func(l exporter.Layer, x exporter.Value) exporter.Value {
		glu, linear := pairs(l, x)
		return l.Round(l.Mul(exporter.Gated(l, clampedAbove(l, glu)), clamped(l, linear)))
	}
}

func swigluGELU[F reference.Float](s *reference.Stages[F]) {
	s.Gate = func(l reference.Layer[F], glu, linear []F) {
		for i, g := range glu {
			phi := F(0.5 * math.Erfc(-float64(g)/math.Sqrt2)) // the normal distribution function
			glu[i], linear[i] = g*phi, linear[i]+1
		}
		round(l, glu)
		round(l, linear)
		for i, v := range linear {
			glu[i] *= v
		}
		round(l, glu)
	}
}

func swigluGELUGraph(s *exporter.Stages) {
	s.Activate = func(l exporter.Layer, x exporter.Value) exporter.Value {
		glu, linear := pairs(l, x)
		glu = clampedAbove(l, glu)
		phi := l.Mul(l.Float(0.5), l.Add(l.Float(1), l.Erf(l.Mul(glu, l.Float(1/math.Sqrt2)))))
		return l.Round(l.Mul(l.Round(l.Mul(glu, phi)), plusOne(l, clamped(l, linear))))
	}
}

// swigluHalves moves each pair to where the right activation looks for it.
func swigluHalves[F reference.Float](s *reference.Stages[F]) {
	activate := s.Activate
	s.Activate = func(l reference.Layer[F], x []F) []F {
		half := l.Config.IntermediateSize
		pairs := make([]F, len(x))
		for at := 0; at < len(x); at += 2 * half {
			for i := range half {
				pairs[at+2*i], pairs[at+2*i+1] = x[at+i], x[at+half+i]
			}
		}
		return activate(l, pairs)
	}
}

func swigluHalvesGraph(s *exporter.Stages) {
	activate := s.Activate
	s.Activate = func(l exporter.Layer, x exporter.Value) exporter.Value {
		shape := x.Shape()
		last := len(shape) - 1
		order := span(0, last+2)
		order[last], order[last+1] = last+1, last
		split := append(slices.Clone(shape[:last]), exporter.N(2), exporter.N(l.Config.IntermediateSize))
		return activate(l, l.Reshape(l.Transpose(l.Reshape(x, split...), order...), shape...))
	}
}

func swigluGateUpSwapped[F reference.Float](s *reference.Stages[F]) {
	swiglu := s.SwiGLU
	s.SwiGLU = func(l reference.Layer[F], glu, linear []F) {
		swiglu(l, linear, glu)
		copy(glu, linear)
	}
}

func swigluGateUpSwappedGraph(s *exporter.Stages) {
	activate := s.Activate
	s.Activate = func(l exporter.Layer, x exporter.Value) exporter.Value {
		shape := x.Shape()
		last := len(shape) - 1
		glu, linear := pairs(l, x)
		swapped := l.Concat(last+1, exporter.N(2), l.Unsqueeze(linear, last+1), l.Unsqueeze(glu, last+1))
		return activate(l, l.Reshape(swapped, shape...))
	}
}

// biases lists the faults of the experts' biases.
func biases() []Fault {
	return []Fault{
		{
			ID: "mlp1-bias-dropped", Stage: stageExperts, Tap: taps.Prelinear,
			Explanation: "The bias of the experts' first layer is not added.",
			Thread:      "https://github.com/vllm-project/vllm/pull/26289",
			Related:     true,
			Checkpoint: reweighted(func(_ config.Config, b *checkpoint.Block) {
				b.MLP1Bias = eachExpert(b.MLP1Bias, dropped)
			}),
		},
		{
			ID: "mlp1-bias-halves", Stage: stageExperts, Tap: taps.Prelinear,
			Explanation: "The first layer's bias is added as if its glu and linear parts were halves; the weights are read as pairs.",
			Checkpoint: reweighted(func(_ config.Config, b *checkpoint.Block) {
				b.MLP1Bias = eachExpert(b.MLP1Bias, halvesAsPairs)
			}),
		},
		{
			ID: "mlp2-bias-dropped", Stage: stageExperts, Tap: taps.ExpertOutputs,
			Explanation: "The bias of the experts' second layer is not added.",
			Thread:      "https://github.com/kvcache-ai/ktransformers/pull/1862",
			Checkpoint: reweighted(func(_ config.Config, b *checkpoint.Block) {
				b.MLP2Bias = eachExpert(b.MLP2Bias, dropped)
			}),
		},
		{
			ID: "mlp2-bias-per-rank", Stage: stageExperts, Tap: taps.ExpertOutputs,
			Explanation: "Each of two tensor-parallel ranks adds the second layer's bias before they are summed.",
			Thread:      "https://github.com/pytorch/torchtitan/pull/4245",
			Checkpoint: reweighted(func(_ config.Config, b *checkpoint.Block) {
				b.MLP2Bias = eachExpert(b.MLP2Bias, doubled)
			}),
		},
		{
			ID: "mlp2-bias-not-weighted", Stage: stageExperts, Tap: taps.Fused,
			Explanation: "The chosen experts' biases are added without their router weights.",
			Thread:      "https://github.com/NVIDIA-NeMo/Automodel/pull/2591",
			Stages:      Swap{Wide: mlp2BiasNotWeighted[float64], Single: mlp2BiasNotWeighted[float32]},
			Graph:       mlp2BiasNotWeightedGraph,
		},
	}
}

func halvesAsPairs(bias []float32) []float32 {
	return mapped(bias, func(i int, _ float32) float32 { return bias[i/2+i%2*len(bias)/2] })
}

// mlp2BiasNotWeighted adds what is missing from the weighted biases: Σ (1−w)·b.
func mlp2BiasNotWeighted[F reference.Float](s *reference.Stages[F]) {
	fuse := s.Fuse
	s.Fuse = func(l reference.Layer[F], outputs []F, indices []int32, weights []F) []F {
		fused := slices.Clone(fuse(l, outputs, indices, weights))
		k, width := l.Config.ExpertsPerToken, l.Config.HiddenSize
		for slot, e := range indices {
			sum := fused[slot/k*width:][:width]
			for i, b := range l.Weights.MLP2Bias[e] {
				sum[i] += (1 - weights[slot]) * F(b)
			}
		}
		return round(l, fused)
	}
}

func mlp2BiasNotWeightedGraph(s *exporter.Stages) {
	fuse := s.Fuse
	s.Fuse = func(l exporter.Layer, outputs, indices, weights exporter.Value) exporter.Value {
		fused := fuse(l, outputs, indices, weights)
		if indices == (exporter.Value{}) {
			return fused // the graph of a single stage is not given them
		}
		missing := l.Unsqueeze(l.Subtract(l.Float(1), weights), 2)
		biases := l.Mul(l.Gather(l.Weights.MLP2Bias, 0, indices), missing)
		return l.Round(l.Add(fused, l.ReduceSum(biases, 1, false)))
	}
}

// dispatch lists the faults of how tokens and weights get to the experts.
func dispatch() []Fault {
	return []Fault{
		{
			ID: "router-weights-on-input", Stage: stageExperts, Tap: taps.Prelinear,
			Explanation: "The router's weight multiplies an expert's input instead of its output, as in Llama 4.",
			Thread:      "https://github.com/NVIDIA/TensorRT-LLM/pull/3492",
			Related:     true,
			Stages:      Swap{Wide: routerWeightsOnInput[float64], Single: routerWeightsOnInput[float32]},
			Graph:       routerWeightsOnInputGraph,
		},
		{
			ID: "router-weights-twice", Stage: stageExperts, Tap: taps.Prelinear,
			Explanation: "The router's weight multiplies an expert's input and its output.",
			Thread:      "https://github.com/vllm-project/vllm/pull/43694",
			Related:     true,
			Stages:      Swap{Wide: routerWeightsTwice[float64], Single: routerWeightsTwice[float32]},
			Graph:       routerWeightsTwiceGraph,
		},
		{
			ID: "experts-off-by-one", Stage: stageExperts, Tap: taps.Prelinear,
			Explanation: "Expert e runs with the weights of expert e + 1.",
			Checkpoint: reweighted(func(_ config.Config, b *checkpoint.Block) {
				b.MLP1, b.MLP1Bias = rotated(b.MLP1), rotated(b.MLP1Bias)
				b.MLP2, b.MLP2Bias = rotated(b.MLP2), rotated(b.MLP2Bias)
			}),
		},
		{
			ID: "experts-beyond-first-rank-dropped", Stage: stageExperts, Tap: taps.ExpertOutputs,
			Explanation: "Of two expert-parallel ranks only the first one's experts contribute.",
			Thread:      "https://github.com/vllm-project/vllm-gaudi/pull/1796",
			Related:     true,
			Stages:      Swap{Wide: expertsBeyondFirstRankDropped[float64], Single: expertsBeyondFirstRankDropped[float32]},
			Graph:       expertsBeyondFirstRankDroppedGraph,
		},
	}
}

// rotated puts every element one place earlier, and the first one last.
func rotated[T any](list []T) []T { return slices.Concat(list[1:], list[:1]) }

func routerWeightsTwice[F reference.Float](s *reference.Stages[F]) {
	prelinear := s.Prelinear
	s.Prelinear = func(l reference.Layer[F], x []F, indices []int32) []F {
		weights := l.Stages.Weigh(l, l.Stages.GateLogits(l, x), indices)
		k, width := l.Config.ExpertsPerToken, l.Config.HiddenSize
		weighted := make([]F, len(indices)*width) // one row for each slot
		for slot, weight := range weights {
			for i, v := range x[slot/k*width:][:width] {
				weighted[slot*width+i] = weight * v
			}
		}
		l.Config.ExpertsPerToken = 1
		return prelinear(l, round(l, weighted), indices)
	}
}

func routerWeightsTwiceGraph(s *exporter.Stages) {
	s.PackedExperts, s.DenseExperts = weighsInput(s.PackedExperts), weighsInput(s.DenseExperts)
}

// runExperts is the type of the exporter's stages that run the experts.
type runExperts = func(l exporter.Layer, x, indices exporter.Value) exporter.ExpertsOutput

// weighsInput gives every slot an input of its own: the experts run as if each
// slot were a token that has chosen one expert.
func weighsInput(experts runExperts) runExperts {
	return func(l exporter.Layer, x, indices exporter.Value) exporter.ExpertsOutput {
		logits := l.Stages.GateLogits(l, x)
		weights := l.Stages.Weigh(l, logits, indices, l.GatherBatched(logits, indices))
		tokens, k, one := indices.Shape()[0], indices.Shape()[1], exporter.N(1)
		slots := exporter.Symbol("weighted_slots")
		if tokens.Symbol == "" {
			slots = exporter.N(tokens.Size * k.Size)
		}
		weighted := l.Round(l.Mul(l.Unsqueeze(weights, 2), l.Unsqueeze(x, 1))) // [tokens, k, hidden]
		single := l
		single.Config.ExpertsPerToken = 1
		out := experts(single,
			l.Reshape(weighted, slots, exporter.N(l.Config.HiddenSize)),
			l.Reshape(indices, slots, one))
		bySlot := func(v exporter.Value) exporter.Value {
			if v == (exporter.Value{}) {
				return v
			}
			return l.Reshape(v, tokens, k, v.Shape()[2])
		}
		return exporter.ExpertsOutput{
			Prelinear: bySlot(out.Prelinear), Activated: bySlot(out.Activated), Outputs: bySlot(out.Outputs),
		}
	}
}

func routerWeightsOnInput[F reference.Float](s *reference.Stages[F]) {
	routerWeightsTwice(s)
	fuse := s.Fuse
	s.Fuse = func(l reference.Layer[F], outputs []F, indices []int32, weights []F) []F {
		return fuse(l, outputs, indices, slices.Repeat([]F{1}, len(weights)))
	}
}

func routerWeightsOnInputGraph(s *exporter.Stages) {
	routerWeightsTwiceGraph(s)
	fuse := s.Fuse
	s.Fuse = func(l exporter.Layer, outputs, indices, weights exporter.Value) exporter.Value {
		ones := l.Add(l.Mul(weights, l.Float(0)), l.Float(1))
		return fuse(l, outputs, indices, ones)
	}
}

func expertsBeyondFirstRankDropped[F reference.Float](s *reference.Stages[F]) {
	outputs := s.ExpertOutputs
	s.ExpertOutputs = func(l reference.Layer[F], x []F, indices []int32) []F {
		y := slices.Clone(outputs(l, x, indices))
		width := l.Config.HiddenSize
		for slot, e := range indices {
			if int(e) >= l.Config.Experts/2 {
				clear(y[slot*width:][:width])
			}
		}
		return y
	}
}

func expertsBeyondFirstRankDroppedGraph(s *exporter.Stages) {
	first := func(experts runExperts) runExperts {
		return func(l exporter.Layer, x, indices exporter.Value) exporter.ExpertsOutput {
			out := experts(l, x, indices)
			own := l.Unsqueeze(l.Less(indices, l.Int64(l.Config.Experts/2)), 2)
			out.Outputs = l.Where(own, out.Outputs, l.Float(0))
			return out
		}
	}
	s.PackedExperts, s.DenseExperts = first(s.PackedExperts), first(s.DenseExperts)
}
