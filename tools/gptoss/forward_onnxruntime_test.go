package main

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// exported writes the toy fixture's graph.
func exported(t *testing.T, o exporter.Options) (path string, m *checkpoint.Model) {
	t.Helper()
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	path = filepath.Join(t.TempDir(), "m.onnx")
	require.NoError(t, exporter.Export(t.Context(), m, path, o))
	return path, m
}

func TestForwardRunsAGraph(t *testing.T) {
	graph, m := exported(t, exporter.Options{HiddenStates: true, BlockDebug: true})
	output := filepath.Join(t.TempDir(), "out.safetensors")
	status, _, stderr := execute(t.Context(), "forward", "--checkpoint", fixtures.Dir("toy"), "--tokens", "1,2,3,4,5,6,7,8,9,10,11,12,13",
		"--backend", "onnxruntime", "--onnx", graph, "--taps", "all", "--output", output)
	require.Zero(t, status, stderr)
	results, err := tensor.ReadSafetensors(output)
	require.NoError(t, err)
	assert.Len(t, results, len(taps.All(m.Config)))
	v, err := conformance.Judge(t.Context(), m, []int32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13},
		conformance.Subject{Precision: reference.Float32, Taps: results}, conformance.JudgeOptions{})
	require.NoError(t, err)
	assert.Empty(t, v.FirstDivergence, v.Reason)
}

func TestForwardRefusesAGraphThatDoesNotFit(t *testing.T) {
	logitsOnly, _ := exported(t, exporter.Options{})
	output := filepath.Join(t.TempDir(), "out.safetensors")
	for name, test := range map[string]struct {
		checkpoint, taps, says string
	}{
		"a tap that it lacks":         {"toy", "block_0.q", "block_0.q"},
		"a model of another geometry": {"edge", "none", "another model"},
	} {
		t.Run(name, func(t *testing.T) {
			status, _, stderr := execute(t.Context(), "forward", "--checkpoint", fixtures.Dir(test.checkpoint), "--tokens", "1,2",
				"--backend", "onnxruntime", "--onnx", logitsOnly, "--taps", test.taps, "--output", output)
			assert.Equal(t, 2, status)
			assert.Contains(t, stderr, test.says)
			assert.NoFileExists(t, output)
		})
	}
}
