package faults

import (
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
)

// configured is a fault of the configuration.
func configured(change func(*config.Config)) func(*checkpoint.Model) *checkpoint.Model {
	return func(m *checkpoint.Model) *checkpoint.Model {
		changed := *m
		changed.Config.Sliding = slices.Clone(m.Config.Sliding)
		change(&changed.Config)
		return &changed
	}
}

// reweighted is a fault of every block's weights. The function is given copies
// of the blocks; it puts other slices and matrices into their fields and leaves
// what these held as it was.
func reweighted(change func(c config.Config, b *checkpoint.Block)) func(*checkpoint.Model) *checkpoint.Model {
	return func(m *checkpoint.Model) *checkpoint.Model {
		changed := *m
		changed.Blocks = slices.Clone(m.Blocks)
		for i := range changed.Blocks {
			change(m.Config, &changed.Blocks[i])
		}
		return &changed
	}
}

// mapped returns a new slice, each element computed from its index and the old
// value.
func mapped(values []float32, f func(i int, v float32) float32) []float32 {
	result := make([]float32, len(values))
	for i, v := range values {
		result[i] = f(i, v)
	}
	return result
}

// filled returns n times the same value.
func filled(n int, value float32) []float32 { return slices.Repeat([]float32{value}, n) }

// eachExpert changes one vector of every expert.
func eachExpert(vectors [][]float32, change func([]float32) []float32) [][]float32 {
	result := make([][]float32, len(vectors))
	for e, v := range vectors {
		result[e] = change(v)
	}
	return result
}

// dropped returns zeros in place of a bias.
func dropped(bias []float32) []float32 { return make([]float32, len(bias)) }

// doubled returns a bias that two ranks have added: exact in any format.
func doubled(bias []float32) []float32 {
	return mapped(bias, func(_ int, v float32) float32 { return 2 * v })
}

// rowsOf is a matrix made of another one's rows in a different order.
type rowsOf struct {
	checkpoint.Matrix
	source []int // row i is the other matrix's row source[i]
}

// Dims returns outputs and inputs.
func (m rowsOf) Dims() (rows, cols int) {
	_, cols = m.Matrix.Dims()
	return len(m.source), cols
}

// Rows decodes rows [from, from+n) into dst.
func (m rowsOf) Rows(dst []float32, from, n int) {
	_, cols := m.Dims()
	for i, row := range m.source[from : from+n] {
		m.Matrix.Rows(dst[i*cols:][:cols], row, 1)
	}
}

// restaged returns the layer with other stage functions, for a stage that calls
// others itself.
func restaged[F reference.Float](l reference.Layer[F], change func(*reference.Stages[F])) reference.Layer[F] {
	stages := *l.Stages
	change(&stages)
	l.Stages = &stages
	return l
}

// round rounds x in place to the format that the model computes in.
func round[F reference.Float](l reference.Layer[F], x []F) []F {
	if l.Round != nil {
		l.Round(x)
	}
	return x
}

// exp is e^x.
func exp[F reference.Float](x F) F { return F(math.Exp(float64(x))) }
