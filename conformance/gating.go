package conformance

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// boundGateLogits: a linear layer with bias; the product and the sum may be
// stored apart.
func boundGateLogits(b bounding, want []float64) []float64 {
	w := b.weights()
	bound := b.linear(b.at(taps.MLPNormed), w.Gate, w.GateBias)
	for i := range bound {
		bound[i] += b.store * (math.Abs(want[i]) + math.Abs(float64(w.GateBias[i%len(w.GateBias)])))
	}
	return b.stored(bound, want, 1)
}

// boundExpertWeights bounds a softmax over the k chosen logits, which are given
// exactly. Subtracting the maximum costs a rounding of the difference, which in
// 16-bit engines may be stored; so the exponential's relative error is at most
// store·(max − s) + 4u. The sum of k positive terms has the largest of these
// and accumulation(k); the division adds u, and the result is stored.
func boundExpertWeights(b bounding, want []float64) []float64 {
	c := b.truth.model.Weights.Config
	k := c.ExpertsPerToken
	logits := b.at(taps.GateLogits)
	indices := b.truth.indices(b.layer)
	bound := make([]float64, len(want))
	for t := range len(want) / k {
		top, bottom := math.Inf(-1), math.Inf(1)
		for _, e := range indices[t*k:][:k] {
			top = max(top, logits[t*c.Experts+int(e)])
			bottom = min(bottom, logits[t*c.Experts+int(e)])
		}
		// The sum's relative error is the mean of its terms' by probability.
		mean := 0.0
		for i, e := range indices[t*k:][:k] {
			mean += want[t*k+i] * (top - logits[t*c.Experts+int(e)])
		}
		for i, e := range indices[t*k:][:k] {
			own := top - logits[t*c.Experts+int(e)]
			relative := b.store*(own+mean) + 9*b.sum + b.accumulation(k)
			bound[t*k+i] = relative * math.Abs(want[t*k+i])
		}
	}
	return b.stored(bound, want, 1)
}
