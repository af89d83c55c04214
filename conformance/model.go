package conformance

// boundEmbedding: a lookup, which rounds only if the subject's format cannot
// hold the checkpoint's own numbers.
func boundEmbedding(b bounding, want []float64) []float64 {
	return b.stored(make([]float64, len(want)), want, 1)
}

// boundCopy: the same numbers under another name; nothing may happen to them
// but the flushing of subnormal numbers.
func boundCopy(b bounding, want []float64) []float64 {
	return b.stored(make([]float64, len(want)), want, 0)
}

// boundSum: one addition, rounded once: |fl(a+b) − (a+b)| ≤ u·|a+b|.
func boundSum(b bounding, want []float64) []float64 {
	return b.stored(make([]float64, len(want)), want, 1)
}

// boundLogits: a linear layer without bias, stored once.
func boundLogits(b bounding, want []float64) []float64 {
	bound := b.linear(b.at("final_norm"), b.truth.model.Weights.Unembedding, nil)
	return b.stored(bound, want, 1)
}
