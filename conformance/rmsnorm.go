package conformance

import "math"

// boundRMSNorm bounds y = x·(mean(x²) + eps)^(-1/2)·scale.
//
// The mean square is a sum of n positive products: its relative error is at
// most accumulation(n), and the division by n adds u, the addition of eps u. The
// power −1/2 halves all that. The reciprocal root itself is good to 2u in any
// library, and the two products add u each: accumulation(n)/2 + 5u together.
// Storing adds its own roundoff once if only the result is rounded (torch),
// again if the normed value is rounded before it is scaled (Llama's habit, which
// several engines keep), and once more if the norm is fused with the addition
// before it and reads the sum before that is stored (vLLM pull request 52104).
func boundRMSNorm(b bounding, want []float64) []float64 {
	width := b.truth.model.Weights.Config.HiddenSize
	relative := b.accumulation(width)/2 + 5*b.sum
	bound := make([]float64, len(want))
	for i, v := range want {
		bound[i] = relative * math.Abs(v)
	}
	return b.stored(bound, want, 3)
}
