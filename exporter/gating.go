package exporter

// GateLogits computes the router's logits [tokens, experts] from the normed
// stream [tokens, hidden].
func GateLogits(l Layer, x Value) Value {
	return Linear(l.Scope, x, l.Weights.Gate, l.Weights.GateBias)
}

// Choose returns each token's experts [tokens, k], as int64 in descending order
// of their logits, and those logits. Of equal logits the lower index comes
// first: ONNX's TopK promises that.
func Choose(l Layer, logits Value) (indices, chosen Value) {
	chosen, indices = l.TopK(logits, l.Config.ExpertsPerToken)
	return indices, chosen
}

// Weigh returns the weights [tokens, k] of the chosen experts: a softmax over
// the chosen logits alone. It is given all logits too, which it does not need.
//
// Source: openai/gpt-oss gpt_oss/torch/model.py MLPBlock.
func Weigh(l Layer, logits, indices, chosen Value) Value {
	return l.Round(l.Scope.Softmax(chosen))
}

// DenseGateWeights spreads the weights [tokens, k] over all experts: [tokens,
// experts], zero where an expert is not chosen.
func DenseGateWeights(l Layer, indices, weights Value) Value {
	tokens := weights.shape[0]
	shape := l.Concat(0, N(2), l.SizeOf(weights, 0), l.Int64s(l.Config.Experts))
	return l.ScatterElements(l.Zeros(shape, Shape{tokens, N(l.Config.Experts)}), indices, weights)
}
