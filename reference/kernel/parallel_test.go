package kernel

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// counted checks that a loop visits every index once, and no chunk is too long.
func counted(t *testing.T, n, grain int, work func()) {
	visits := make([]atomic.Int32, n)
	Parallel(n, grain, func(from, to int) {
		assert.LessOrEqual(t, to-from, grain)
		work()
		for i := from; i < to; i++ {
			visits[i].Add(1)
		}
	})
	for i := range visits {
		assert.EqualValues(t, 1, visits[i].Load(), "index %d of %d", i, n)
	}
}

func TestParallel(t *testing.T) {
	for _, cores := range []int{1, 2, 3, 16} {
		t.Run(fmt.Sprint(cores), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
			for _, n := range []int{0, 1, 7, 1000} {
				for _, grain := range []int{1, 3, 2000} {
					counted(t, n, grain, func() {})
				}
			}
			slow := func() { time.Sleep(patience + patience/2) } // the others give up waiting
			counted(t, 5, 1, slow)
			time.Sleep(2 * patience) // all helpers have gone
			counted(t, 100, 1, func() {})
			counted(t, 4, 1, func() { counted(t, 9, 2, slow) }) // a loop in a loop
		})
	}
}

func TestParallelLoopsAtOnce(t *testing.T) {
	var all sync.WaitGroup
	for range 3 * runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for range 200 {
				counted(t, 33, 2, func() {})
			}
		})
	}
	all.Wait()
}

// Helpers that find no work end, and leave their seats.
func TestParallelLeavesNobody(t *testing.T) {
	free := func() bool {
		for i := range seats {
			if seats[i].loop.Load() != nil {
				return false
			}
		}
		return true
	}
	soon := func(what func() bool) { assert.Eventually(t, what, 10*time.Second, time.Millisecond) }
	soon(free)
	time.Sleep(10 * time.Millisecond) // those of other tests have left theirs just now
	before := runtime.NumGoroutine()
	counted(t, 1000, 1, func() {})
	soon(func() bool { return free() && runtime.NumGoroutine() <= before+1 }) // Eventually has one of its own
}

// BenchmarkParallel shows what a loop costs beyond its work: the work of every
// core is a busy loop of the time in the name, after a pause in which one core
// works alone.
func BenchmarkParallel(b *testing.B) {
	busy := func(d time.Duration) {
		for start := time.Now(); time.Since(start) < d; {
		}
	}
	for _, work := range []time.Duration{0, 20 * time.Microsecond, 100 * time.Microsecond} {
		for _, gap := range []time.Duration{0, 20 * time.Microsecond} {
			b.Run(fmt.Sprintf("%v/gap=%v", work, gap), func(b *testing.B) {
				cores := runtime.GOMAXPROCS(0)
				for b.Loop() {
					busy(gap)
					Parallel(cores, 1, func(_, _ int) { busy(work) })
				}
				b.ReportMetric(float64(b.Elapsed()-time.Duration(b.N)*(gap+work))/float64(b.N), "overhead-ns/op")
			})
		}
	}
}
