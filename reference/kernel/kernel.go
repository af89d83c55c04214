// Package kernel holds the inner loops of the reference: inner products,
// products of activations with weight matrices, rounding to short formats, and
// the loop over cores. Results do not depend on the number of cores.
package kernel

// Float is what the reference computes in. Short formats are computed in
// float64 and rounded where torch rounds; see [Format].
type Float interface{ float32 | float64 }
