package main

//go:generate go run ./asm -out limits_amd64.s -stubs limits_stubs_amd64.go -pkg main

import (
	"runtime"
	"sync"
	"time"
)

// loops is what the limits are measured with: the plainest loops that there are,
// which share nothing with the reference's kernels.
type loops struct {
	name string
	// read has ways to read a buffer once; the fastest counts.
	read []func(buffer []byte)
	// multiplyAdd does turns times width multiply-adds of float32 in registers.
	multiplyAdd func(turns int)
	width       int
}

// portable is for processors that have no assembly here. Its figures are lower
// bounds of what the machine can do.
var portable = loops{
	name: "portable Go: lower bounds",
	read: []func([]byte){func(buffer []byte) {
		var sum byte
		for i := 0; i < len(buffer); i += 64 { // a cache line
			sum |= buffer[i]
		}
		runtime.KeepAlive(sum)
	}},
	multiplyAdd: func(turns int) {
		var sum [8]float32
		factor, addend := float32(0.5), float32(1)
		for range turns {
			for i := range sum {
				sum[i] = sum[i]*factor + addend
			}
		}
		runtime.KeepAlive(sum)
	},
	width: 8,
}

// limits measures what all cores together can do: read memory, and multiply and
// add float32. Of several instruction sets the fastest counts.
func (b bench) limits() {
	const size = 1 << 30 // far more than any cache
	buffer := hugePages(make([]byte, size))
	for i := 0; i < size; i += 4096 {
		buffer[i] = 1 // a page that was never written is not read from memory
	}
	sets := available()
	if len(sets) == 0 {
		sets = []loops{portable}
	}
	cores := runtime.GOMAXPROCS(0)
	share := size / cores / 4096 * 4096
	const turns = 10_000_000 // some hundredths of a second
	var bandwidth, operations float64
	name := ""
	for _, set := range sets {
		for _, read := range set.read {
			seconds := b.fastest(func() {
				onAllCores(cores, func(core int) { read(buffer[core*share:][:share]) })
			})
			bandwidth = max(bandwidth, float64(share*cores)/seconds)
		}
		seconds := b.fastest(func() {
			onAllCores(cores, func(int) { set.multiplyAdd(turns) })
		})
		if rate := 2 * float64(turns*set.width*cores) / seconds; rate > operations {
			operations, name = rate, set.name
		}
	}
	report("read memory", 0, bandwidth)
	report("multiply and add ("+name+")", 0, operations)
}

// onAllCores runs the work on every core and waits.
func onAllCores(cores int, work func(core int)) {
	var wg sync.WaitGroup
	for core := range cores {
		wg.Go(func() { work(core) })
	}
	wg.Wait()
}

// fastest repeats short work more often than the models: it is easily disturbed.
func (b bench) fastest(do func()) float64 {
	best := 0.0
	for i := range 6 * b.repeats {
		start := time.Now()
		do()
		if took := time.Since(start).Seconds(); i == 0 || took < best {
			best = took
		}
	}
	return best
}
