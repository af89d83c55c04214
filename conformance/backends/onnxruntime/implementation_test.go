package onnxruntime

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	oracle "github.com/gptoss-conformance/gptoss/conformance/backends/reference"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Numbers are judged in package conformance. Here only the wiring is: every
// stage alone gives the same tap as the whole model, to a coarse tolerance.
func TestEveryStageAloneGivesItsTap(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	tokens := []int32{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9}
	truth, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: reference.Float64, Taps: taps.All(m.Config)})
	require.NoError(t, err)
	positions := make([]int, len(tokens))
	for i := range positions {
		positions[i] = i
	}
	const layer = 1
	full := func(name string) string {
		if !taps.Known(m.Config, name) {
			return taps.Block(layer, name)
		}
		return name
	}
	for _, experts := range []exporter.Experts{exporter.ExpertsPacked, exporter.ExpertsDense} {
		implementation := New("onnxruntime", exporter.Options{Experts: experts}, Options{Threads: 1})
		runner := implementation.(conformance.StageRunner)
		for _, name := range append([]string{taps.Embedding, taps.FinalNorm, taps.Logits}, taps.InBlock[1:]...) {
			t.Run(string(experts)+"/"+name, func(t *testing.T) {
				in := conformance.StageInput{Taps: []string{name}, Model: m, Layer: layer, Tokens: tokens, Positions: positions,
					Inputs: map[string]tensor.Tensor{}}
				for _, read := range conformance.Reads(name) {
					in.Inputs[read] = truth[full(read)]
				}
				if name == taps.FinalNorm {
					in.Inputs[taps.Output] = truth[taps.Block(m.Config.Layers-1, taps.Output)]
				}
				got, err := runner.RunStage(t.Context(), in)
				require.NoError(t, err)
				want := truth[full(name)]
				require.Equal(t, want.Shape, got[name].Shape)
				if taps.Integer(name) {
					require.Equal(t, want.Data, got[name].Data)
					return
				}
				a, b := reals(t, got[name]), reals(t, want)
				for i := range a {
					require.Less(t, math.Abs(a[i]-b[i]), 1e-4, "element %d: got %g, want %g", i, a[i], b[i])
				}
			})
		}
	}
}

// Far positions come from two tables; see exporter.RotaryTables. Two angles are
// added at a cost of 4 units of roundoff, and rotation itself costs 3.
func TestRotationAtFarPositions(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	positions := []int{0, 1, 4095, 4096, 4097, 8191, 8192, 131071, 1048575}
	values := make([]float32, len(positions)*m.Config.QueryWidth())
	for i := range values {
		values[i] = float32(i%7) - 3
	}
	in := conformance.StageInput{Taps: []string{taps.QRot}, Model: m, Positions: positions, Inputs: map[string]tensor.Tensor{
		taps.Q: tensor.FromFloat32s([]int{len(positions), m.Config.Heads, m.Config.HeadDim}, values),
	}}
	want, err := oracle.New(reference.Float64).(conformance.StageRunner).RunStage(t.Context(), in)
	require.NoError(t, err)
	runner := New("onnxruntime", exporter.Options{}, Options{Threads: 1}).(conformance.StageRunner)
	got, err := runner.RunStage(t.Context(), in)
	require.NoError(t, err)
	const roundoff = 1.0 / (1 << 24)
	largest := 2 * 3 * (0.1*math.Log(m.Config.RopeScalingFactor) + 1) // two products of at most 3 and the concentration
	a, b := reals(t, got[taps.QRot]), reals(t, want[taps.QRot])
	for i := range b {
		require.Less(t, math.Abs(a[i]-b[i]), 7*roundoff*largest, "position %d, element %d", positions[i/m.Config.QueryWidth()], i)
	}
	in.Positions[0] = 1 << 20
	_, err = runner.RunStage(t.Context(), in)
	require.ErrorContains(t, err, "out of data bounds", "beyond the tables a run must fail")
}

func TestStageInputsAreChecked(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	runner := New("onnxruntime", exporter.Options{}, Options{}).(conformance.StageRunner)
	_, err = runner.RunStage(t.Context(), conformance.StageInput{Taps: []string{taps.MLPNormed}, Model: m})
	require.ErrorContains(t, err, "post_attention: is missing")
	_, err = runner.RunStage(t.Context(), conformance.StageInput{Taps: []string{taps.DenseGateWeights}, Model: m, Inputs: map[string]tensor.Tensor{
		taps.ExpertIndices: tensor.FromInt32s([]int{1, 4}, []int32{0, 1, 2, 99}), taps.ExpertWeights: tensor.FromFloat32s([]int{1, 4}, make([]float32, 4)),
	}})
	require.ErrorContains(t, err, "names expert 99")
}

func TestOpenExportsEveryTap(t *testing.T) {
	implementation := New("onnxruntime", exporter.Options{}, Options{Threads: 1})
	require.Equal(t, reference.Float32, implementation.Precision())
	instance, err := implementation.Open(t.Context(), fixtures.Dir("toy"))
	require.NoError(t, err)
	defer instance.Close()
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	all := taps.All(m.Config)
	out, err := instance.(conformance.Tapper).ForwardTaps(t.Context(), []int32{1, 2, 3}, all)
	require.NoError(t, err)
	require.Len(t, out, len(all))
	out, err = instance.Forward(t.Context(), []int32{1, 2, 3})
	require.NoError(t, err)
	require.Len(t, out, 1)
	_, err = implementation.Open(t.Context(), t.TempDir())
	require.Error(t, err)
}
