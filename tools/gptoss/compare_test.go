package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

func runCompare(t *testing.T, arguments ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), []*cobra.Command{compareCommand()}, append([]string{"compare"}, arguments...), &out, &errs)
	return status, out.String(), errs.String()
}

// exportFixture exports a fixture without validating it.
func exportFixture(t *testing.T, name string, o exporter.Options) string {
	t.Helper()
	m, err := checkpoint.Open(fixtures.Dir(name))
	require.NoError(t, err)
	defer m.Close()
	path := filepath.Join(t.TempDir(), name+".onnx")
	require.NoError(t, exporter.Export(t.Context(), m, path, o))
	return path
}

const someTokens = "3,1,4,15,9,2,6,5,35,8,97,93,23,84,62"

func TestCompareOfARightGraph(t *testing.T) {
	path := exportFixture(t, "toy", exporter.Options{HiddenStates: true, BlockDebug: true})
	transcript := filepath.Join(t.TempDir(), "t.md")
	status, stdout, stderr := runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", path, "--tokens", someTokens,
		"--compare-hidden-states", "--compare-block-debug", "--transcript", transcript)
	require.Zero(t, status, stderr)
	require.Empty(t, stderr)
	require.Contains(t, stdout, "| logits |")
	require.Contains(t, stdout, "| block_2.mlp_fused |")
	require.Contains(t, stdout, "| block_0.mlp_expert_indices | 0 differ |")
	require.Contains(t, stdout, "verdict: pass")
	require.True(t, strings.HasSuffix(stdout, "[issues]\n"), "the issues must be empty")
	written, err := os.ReadFile(transcript)
	require.NoError(t, err)
	require.Equal(t, stdout, string(written))

	_, stdout, _ = runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", path, "--tokens", someTokens)
	require.Contains(t, stdout, "| logits |")
	require.NotContains(t, stdout, "block_0")
}

func TestCompareOfAWrongGraph(t *testing.T) {
	stages := exporter.Portable()
	stages.Visible = func(s *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		return exporter.Visible(s, queries, keys, window+1)
	}
	path := exportFixture(t, "toy", exporter.Options{Stages: &stages, HiddenStates: true})
	status, stdout, stderr := runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", path, "--tokens", someTokens, "--compare-hidden-states")
	require.Equal(t, exitFail, status)
	require.Contains(t, stdout, "verdict: fail")
	issues := stdout[strings.Index(stdout, issuesLine):]
	require.Contains(t, issues, taps.Block(0, taps.PostAttention))
	require.Contains(t, stderr, "differ")
}

// Padding must not be compared, whether the graph's length or the user asks for it.
func TestCompareIgnoresPadding(t *testing.T) {
	fixed := exportFixture(t, "toy", exporter.Options{SequenceLength: 24})
	status, stdout, stderr := runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", fixed, "--tokens", someTokens)
	require.Zero(t, status, stderr)
	require.Contains(t, stdout, "15, 9 of padding not compared")

	free := exportFixture(t, "toy", exporter.Options{})
	status, stdout, stderr = runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", free, "--tokens", someTokens, "--sequence-length", "30")
	require.Zero(t, status, stderr)
	require.Contains(t, stdout, "15, 15 of padding not compared")
}

func TestCompareOfTheLastLogitsAlone(t *testing.T) {
	path := exportFixture(t, "toy", exporter.Options{LastLogitsOnly: true, HiddenStates: true})
	status, stdout, stderr := runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", path, "--tokens", someTokens, "--compare-hidden-states")
	require.Zero(t, status, stderr)
	require.Contains(t, stdout, "| logits |")
	require.Contains(t, stdout, "| final_norm |")
	status, _, stderr = runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", path, "--tokens", someTokens, "--sequence-length", "20")
	require.Equal(t, exitInput, status)
	require.Contains(t, stderr, "which here is padding")
}

func TestCompareSaysWhatTheGraphLacks(t *testing.T) {
	path := exportFixture(t, "toy", exporter.Options{Operators: exporter.OperatorsONNXRuntime, HiddenStates: true, BlockDebug: true})
	status, stdout, stderr := runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", path, "--tokens", someTokens, "--compare-block-debug",
		"--graph-optimization", "none")
	require.Zero(t, status, stderr)
	require.Contains(t, stdout, "Not among the graph's outputs: block_0.mlp_prelinear_outputs")
}

func TestCompareRefusesBadInput(t *testing.T) {
	toy := fixtures.Dir("toy")
	path := exportFixture(t, "toy", exporter.Options{})
	other := exportFixture(t, "edge", exporter.Options{})
	for _, c := range []struct {
		name, want string
		arguments  []string
	}{
		{"no graph", "missing.onnx", []string{"--onnx", "missing.onnx", "--tokens", "1"}},
		{"no tokens", "prompt", []string{"--onnx", path}},
		{"both", "prompt", []string{"--onnx", path, "--tokens", "1", "--prompt", "x"}},
		{"small vocabulary", "use --tokens", []string{"--onnx", path, "--prompt", "x"}},
		{"id", "outside the vocabulary", []string{"--onnx", path, "--tokens", "1,999999"}},
		{"level", "most", []string{"--onnx", path, "--tokens", "1", "--graph-optimization", "most"}},
		{"length", "more than 2", []string{"--onnx", path, "--tokens", "1,2,3", "--sequence-length", "2"}},
		{"name", "THEIRS=OURS", []string{"--onnx", path, "--tokens", "1", "--name", "x"}},
		{"unknown name", `called "x"`, []string{"--onnx", path, "--tokens", "1", "--name", "x=logits"}},
		{"precision", "--precision", []string{"--onnx", path, "--tokens", "1", "--precision", "float64"}},
		{"other model", "the checkpoint calls for", []string{"--onnx", other, "--tokens", "1"}},
		{"transcript", "--transcript", []string{"--onnx", path, "--tokens", "1", "--transcript", filepath.Join(t.TempDir(), "missing", "t.md")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, stdout, stderr := runCompare(t, append(c.arguments, "--checkpoint", toy)...)
			require.Equal(t, exitInput, status, stderr)
			require.Empty(t, stdout)
			require.Contains(t, stderr, c.want)
			require.Equal(t, 1, strings.Count(stderr, "\n"))
		})
	}
}
