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

// gating lists the faults of the router.
func gating() []Fault {
	return []Fault{
		{
			ID: "softmax-before-topk", Stage: stageGating, Tap: taps.ExpertWeights,
			Explanation: "The chosen experts' probabilities of a softmax over all experts go through a softmax again.",
			Thread:      "https://github.com/vllm-project/vllm-gaudi/pull/970",
			Related:     true,
			Stages:      Swap{Wide: softmaxBeforeTopK[float64], Single: softmaxBeforeTopK[float32]},
			Graph:       softmaxBeforeTopKGraph,
		},
		{
			ID: "topk-not-renormalized", Stage: stageGating, Tap: taps.ExpertWeights,
			Explanation: "The chosen experts' probabilities of a softmax over all experts are used as they are.",
			Thread:      "https://github.com/pytorch/torchtitan/issues/2258",
			Stages:      Swap{Wide: topkNotRenormalized[float64], Single: topkNotRenormalized[float32]},
			Graph:       topkNotRenormalizedGraph,
		},
		{
			ID: "topk-one-too-few", Stage: stageGating, Tap: taps.ExpertWeights,
			Explanation: "One expert too few is used: the last one chosen has no weight.",
			Stages:      Swap{Wide: topkOneTooFew[float64], Single: topkOneTooFew[float32]},
			Graph:       topkOneTooFewGraph,
		},
		{
			ID: "router-bias-dropped", Stage: stageGating, Tap: taps.GateLogits,
			Explanation: "The router's bias is not added.",
			Thread:      "https://github.com/pytorch/torchtitan/pull/2319",
			Checkpoint:  reweighted(func(_ config.Config, b *checkpoint.Block) { b.GateBias = dropped(b.GateBias) }),
		},
		{
			ID: "router-bias-for-selection-only", Stage: stageGating, Tap: taps.ExpertWeights,
			Explanation: "The router's bias takes part in the choice of experts but not in their weights.",
			Thread:      "https://github.com/pytorch/torchtitan/pull/2212",
			Related:     true,
			Stages:      Swap{Wide: routerBiasForSelectionOnly[float64], Single: routerBiasForSelectionOnly[float32]},
			Graph:       routerBiasForSelectionOnlyGraph,
		},
		{
			ID: "router-sigmoid", Stage: stageGating, Tap: taps.ExpertWeights,
			Explanation: "The chosen logits are weighed by sigmoids divided by their sum, as in DeepSeek-V3.",
			Thread:      "https://github.com/NVIDIA/Megatron-LM/issues/1971",
			Related:     true,
			Stages:      Swap{Wide: routerSigmoid[float64], Single: routerSigmoid[float32]},
			Graph:       routerSigmoidGraph,
		},
	}
}

// probabilities is a softmax over all experts, for logits [tokens, experts].
func probabilities[F reference.Float](l reference.Layer[F], logits []F) []F {
	result := make([]F, len(logits))
	for at := 0; at < len(logits); at += l.Config.Experts {
		row := logits[at:][:l.Config.Experts]
		top := slices.Max(row)
		var sum F
		for i, v := range row {
			result[at+i] = exp(v - top)
			sum += result[at+i]
		}
		for i := range row {
			result[at+i] /= sum
		}
	}
	return round(l, result)
}

// chosen picks the values [tokens, k] of the chosen experts from values [tokens,
// experts].
func chosen[F reference.Float](l reference.Layer[F], values []F, indices []int32) []F {
	result := make([]F, len(indices))
	for slot, e := range indices {
		result[slot] = values[slot/l.Config.ExpertsPerToken*l.Config.Experts+int(e)]
	}
	return result
}

func softmaxBeforeTopK[F reference.Float](s *reference.Stages[F]) {
	weigh := s.Weigh
	s.Weigh = func(l reference.Layer[F], logits []F, indices []int32) []F {
		return weigh(l, probabilities(l, logits), indices)
	}
}

func softmaxBeforeTopKGraph(s *exporter.Stages) {
	weigh := s.Weigh
	s.Weigh = func(l exporter.Layer, logits, indices, _ exporter.Value) exporter.Value {
		all := l.Round(l.Scope.Softmax(logits))
		return weigh(l, all, indices, l.GatherBatched(all, indices))
	}
}

func topkNotRenormalized[F reference.Float](s *reference.Stages[F]) {
	s.Weigh = func(l reference.Layer[F], logits []F, indices []int32) []F {
		return chosen(l, probabilities(l, logits), indices)
	}
}

func topkNotRenormalizedGraph(s *exporter.Stages) {
	s.Weigh = func(l exporter.Layer, logits, indices, _ exporter.Value) exporter.Value {
		return l.GatherBatched(l.Round(l.Scope.Softmax(logits)), indices)
	}
}

// topkOneTooFew takes the last expert's logit away before the experts are
// weighed. With one expert per token there is none to spare.
func topkOneTooFew[F reference.Float](s *reference.Stages[F]) {
	weigh := s.Weigh
	s.Weigh = func(l reference.Layer[F], logits []F, indices []int32) []F {
		k := l.Config.ExpertsPerToken
		if k == 1 {
			return weigh(l, logits, indices)
		}
		fewer := slices.Clone(logits)
		for slot := k - 1; slot < len(indices); slot += k {
			fewer[slot/k*l.Config.Experts+int(indices[slot])] = F(math.Inf(-1))
		}
		return weigh(l, fewer, indices)
	}
}

func topkOneTooFewGraph(s *exporter.Stages) {
	weigh := s.Weigh
	s.Weigh = func(l exporter.Layer, logits, indices, chosen exporter.Value) exporter.Value {
		k := l.Config.ExpertsPerToken
		if k == 1 {
			return weigh(l, logits, indices, chosen)
		}
		without := make([]float32, k)
		without[k-1] = float32(math.Inf(-1))
		return weigh(l, logits, indices, l.Add(chosen, l.Floats("without_last", exporter.Ns(k), without)))
	}
}

func routerBiasForSelectionOnly[F reference.Float](s *reference.Stages[F]) {
	weigh := s.Weigh
	s.Weigh = func(l reference.Layer[F], logits []F, indices []int32) []F {
		unbiased := make([]F, len(logits))
		for i, v := range logits {
			unbiased[i] = v - F(l.Weights.GateBias[i%l.Config.Experts])
		}
		return weigh(l, unbiased, indices)
	}
}

func routerBiasForSelectionOnlyGraph(s *exporter.Stages) {
	weigh := s.Weigh
	s.Weigh = func(l exporter.Layer, logits, indices, _ exporter.Value) exporter.Value {
		unbiased := l.Subtract(logits, l.Weights.GateBias)
		return weigh(l, unbiased, indices, l.GatherBatched(unbiased, indices))
	}
}

func routerSigmoid[F reference.Float](s *reference.Stages[F]) {
	s.Weigh = func(l reference.Layer[F], logits []F, indices []int32) []F {
		k := l.Config.ExpertsPerToken
		weights := chosen(l, logits, indices)
		for at := 0; at < len(weights); at += k {
			row := weights[at:][:k]
			var sum F
			for i, v := range row {
				row[i] = 1 / (1 + exp(-v))
				sum += row[i]
			}
			for i := range row {
				row[i] /= sum
			}
		}
		return round(l, weights)
	}
}

func routerSigmoidGraph(s *exporter.Stages) {
	s.Weigh = func(l exporter.Layer, _, _, chosen exporter.Value) exporter.Value {
		scores := l.Reciprocal(l.Add(l.Float(1), l.Exp(l.Neg(chosen))))
		return l.Round(l.Div(scores, l.ReduceSum(scores, 1, true)))
	}
}
