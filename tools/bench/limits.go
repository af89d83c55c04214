package main

import (
	"runtime"
	"time"

	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// limits measures what the machine can do: how fast all cores together read
// memory, and how fast they multiply and add float32.
func (b bench) limits() {
	const size = 1 << 30 // far more than any cache
	buffer := make([]byte, size)
	for i := 0; i < size; i += 4096 {
		buffer[i] = 1 // a page that was never written is not read from memory
	}
	w := zeros{rows: size / 2 / columns, data: buffer}
	seconds := b.fastest(func() { kernel.MatMul(make([]float32, columns), kernel.Rows(w), nil) })
	b.report("read memory", seconds, size/seconds)

	// 256 tokens by a matrix that stays in the cache: arithmetic alone counts.
	const tokens, rows = 256, 2880
	w = zeros{rows: rows, data: buffer[:2*rows*columns]}
	x := make([]float32, tokens*columns)
	seconds = b.fastest(func() { kernel.MatMul(x, kernel.Rows(w), nil) })
	b.report("multiply and add", seconds, 2*tokens*rows*columns/seconds)
	runtime.GC()
}

func (b bench) fastest(do func()) float64 {
	best := 0.0
	for i := range b.repeats + 2 {
		start := time.Now()
		do()
		if took := time.Since(start).Seconds(); i == 0 || took < best {
			best = took
		}
	}
	return best
}

const columns = 2880

// zeros is a bfloat16 matrix in memory.
type zeros struct {
	rows int
	data []byte
}

func (z zeros) Dims() (rows, cols int)     { return z.rows, columns }
func (z zeros) PackedBF16() []byte         { return z.data }
func (z zeros) Rows(_ []float32, _, _ int) { panic("the vector kernels read the bytes") }
