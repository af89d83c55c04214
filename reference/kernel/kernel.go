// Package kernel holds the inner loops of the reference: inner products,
// products of activations with weight matrices, rounding to short formats, and
// the loop over cores. Results do not depend on the number of cores.
package kernel

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// Float is what the reference computes in. Short formats are computed in
// float64 and rounded where torch rounds; see [Format].
type Float interface{ float32 | float64 }

// Parallel calls body for disjoint ranges that cover [0, n), each at most grain
// long, on all cores, and waits for all of them.
func Parallel(n, grain int, body func(from, to int)) {
	chunks := (n + grain - 1) / grain
	workers := min(runtime.GOMAXPROCS(0), chunks)
	if workers <= 1 {
		for from := 0; from < n; from += grain {
			body(from, min(from+grain, n))
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				chunk := int(next.Add(1)) - 1
				if chunk >= chunks {
					return
				}
				body(chunk*grain, min((chunk+1)*grain, n))
			}
		})
	}
	wg.Wait()
}
