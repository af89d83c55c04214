package reference

import (
	"cmp"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// GateLogits scores every expert for every token: [tokens, hidden] to [tokens,
// experts], a linear layer with bias.
func GateLogits[F Float](l Layer[F], x []F) []F {
	return Linear(l, x, l.Weights.Gate, l.Weights.GateBias)
}

// Choose picks each token's experts from logits [tokens, experts]: the highest,
// in descending order, the lower index first where they tie: [tokens, k].
//
// Source: openai/gpt-oss gpt_oss/torch/model.py MLPBlock.
func Choose[F Float](l Layer[F], logits []F) []int32 {
	experts, k := l.Config.Experts, l.Config.ExpertsPerToken
	tokens := len(logits) / experts
	indices := make([]int32, 0, tokens*k)
	for t := range tokens {
		indices = append(indices, TopK(logits[t*experts:][:experts], k)...)
	}
	return indices
}

// TopK returns the indices of the k largest values, largest first; equal values
// keep their order.
func TopK[F Float](values []F, k int) []int32 {
	order := make([]int32, len(values))
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortStableFunc(order, func(i, j int32) int { return cmp.Compare(values[j], values[i]) })
	return order[:k]
}

// ChosenSoftmax weighs the chosen experts by a softmax over their logits alone
// (not over all experts): indices [tokens, k] into logits [tokens, experts] give
// weights [tokens, k].
func ChosenSoftmax[F Float](l Layer[F], logits []F, indices []int32) []F {
	experts, k := l.Config.Experts, l.Config.ExpertsPerToken
	weights := make([]F, len(indices))
	for t := range len(indices) / k {
		row, chosen := weights[t*k:][:k], indices[t*k:][:k]
		top := F(math.Inf(-1))
		for i, e := range chosen {
			row[i] = logits[t*experts+int(e)]
			top = max(top, row[i])
		}
		var sum F
		for i, v := range row {
			row[i] = F(kernel.Exponential(float64(v - top)))
			sum += row[i]
		}
		for i := range row {
			row[i] /= sum
		}
	}
	return l.rounded(weights)
}

// DenseGateWeights spreads weights [tokens, k] over all experts: [tokens,
// experts], zero for those not chosen.
func DenseGateWeights[F Float](l Layer[F], indices []int32, weights []F) []F {
	experts, k := l.Config.Experts, l.Config.ExpertsPerToken
	dense := make([]F, len(indices)/k*experts)
	for i, e := range indices {
		dense[i/k*experts+int(e)] = weights[i]
	}
	return dense
}
