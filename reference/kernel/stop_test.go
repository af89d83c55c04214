package kernel

import (
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
)

// ones is a matrix of ones.
type ones struct{ rows, cols int }

func (m ones) Dims() (rows, cols int) { return m.rows, m.cols }

func (m ones) Rows(dst []float32, _, n int) {
	for i := range dst[:n*m.cols] {
		dst[i] = 1
	}
}

// A product that is stopped leaves the rest of its result alone; others that are
// computed with it are complete.
func TestStop(t *testing.T) {
	for name, dot := range map[string]Dot[float32]{"vector": nil, "portable": Lanes[float32]} {
		t.Run(name, func(t *testing.T) {
			x := make([]float32, 64)
			for i := range x {
				x[i] = 1
			}
			stopped, complete := NewProduct(x, ones{4096, 64}), NewProduct(x, ones{4096, 64})
			var asked atomic.Int64
			stopped.Stop = func() bool { return asked.Add(1) > 3 }
			complete.Stop = func() bool { return false }
			MatMuls([]Product[float32]{stopped, complete}, dot)
			done := 0
			for _, y := range stopped.Y {
				if y != 0 {
					done++
				}
			}
			assert.Positive(t, done)
			assert.LessOrEqual(t, done, 3*longestTask)
			for _, y := range complete.Y {
				assert.InDelta(t, 64, y, 0)
			}
		})
	}
}
