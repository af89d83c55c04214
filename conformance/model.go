package conformance

import "github.com/gptoss-conformance/gptoss/reference/taps"

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

// boundOutput: the residual sum, rounded once: |fl(a+b) − (a+b)| ≤ u·|a+b|. An
// engine that adds the experts straight to the residual stream never rounds their
// sum, which the tap mlp_fused shows rounded: u·|b| more.
func boundOutput(b bounding, want []float64) []float64 {
	bound := magnitudes(b.at(taps.Fused))
	for i := range bound {
		bound[i] *= b.store
	}
	return b.stored(bound, want, 1)
}

// boundLogits: a linear layer without bias, stored once.
func boundLogits(b bounding, want []float64) []float64 {
	bound := b.linear(b.at(taps.FinalNorm), b.truth.model.Weights.Unembedding, nil)
	return b.stored(bound, want, 1)
}
