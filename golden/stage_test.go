package golden_test

import (
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Every case can be read: inputs, truth and the oracle's own rounding of it.
func TestEveryCaseIsReadable(t *testing.T) {
	for _, stage := range golden.Stages() {
		cases, err := golden.Stage(stage)
		require.NoError(t, err)
		for _, c := range cases {
			for name := range c.Inputs {
				values, shape, err := c.Input(name)
				require.NoError(t, err)
				assert.Len(t, values, tensor.Tensor{Shape: shape}.Elements())
			}
			truth, err := c.Truth()
			require.NoError(t, err, "%s %s", stage, c.Name)
			for name, out := range truth {
				if out.DType == tensor.I32 {
					continue
				}
				assert.Equal(t, tensor.F64, out.DType, "%s %s: %s", stage, c.Name, name)
				values, err := out.Float64s()
				require.NoError(t, err)
				for i, v := range values {
					require.False(t, math.IsNaN(v) || math.IsInf(v, 0), "%s %s: %s[%d] is %g", stage, c.Name, name, i, v)
				}
			}
		}
	}
}

// The inputs that Go makes are the ones that the oracle used: sums and dot
// products of a few inputs with exact values are in the outputs.
func TestInputsAreTheOracles(t *testing.T) {
	cases, err := golden.Stage("rope")
	require.NoError(t, err)
	checked := 0
	for _, c := range cases {
		// At position 0 the rotation is the identity times the concentration.
		var positions []int
		require.NoError(t, c.Parameter("positions", &positions))
		require.Zero(t, positions[0])
		x, shape, err := c.Input("x")
		require.NoError(t, err)
		truth, err := c.Truth()
		require.NoError(t, err)
		cos, err := truth["cos"].Float64s()
		require.NoError(t, err)
		got, err := truth["rotated"].Float64s()
		require.NoError(t, err)
		for i := range shape[1] * shape[2] {
			require.Equal(t, x[i]*cos[i%shape[2]%(shape[2]/2)], got[i], "%s[%d]", c.Name, i)
			checked++
		}
	}
	assert.Positive(t, checked)
}

func TestMalformedInputsAreErrors(t *testing.T) {
	low := 0.0
	for name, in := range map[string]golden.Input{
		"no shape":         {DType: tensor.F32},
		"missing values":   {DType: tensor.F32, Shape: []int{2, 2}, Literal: []float64{1}},
		"row out of range": {DType: tensor.F32, Shape: []int{2}, Rows: []int{2}},
		"unknown dtype":    {DType: "F8", Shape: []int{2}, Low: &low},
		"row scales":       {DType: tensor.F32, Shape: []int{2}, RowScales: []float64{1}},
	} {
		_, _, err := in.Values()
		assert.Error(t, err, name)
	}
	_, _, err := golden.Input{DType: tensor.F32, Shape: []int{1}}.Bytes()
	assert.ErrorContains(t, err, "not bytes")
	_, err = golden.Stage("nonesuch")
	assert.ErrorContains(t, err, "rmsnorm")
}
