package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

func runExport(t *testing.T, arguments ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), []*cobra.Command{exportCommand()}, append([]string{"export"}, arguments...), &out, &errs)
	return status, out.String(), errs.String()
}

func TestExportValidates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.onnx")
	status, stdout, stderr := runExport(t, "--checkpoint", fixtures.Dir("toy"), "--output", path)
	require.Zero(t, status, stderr)
	require.Contains(t, stdout, "agrees with the reference on 44 tokens")
	require.Empty(t, stderr)
	require.FileExists(t, path)
	require.FileExists(t, path+".data")

	// Its own outputs are replaced; other people's only by force.
	status, _, stderr = runExport(t, "--checkpoint", fixtures.Dir("toy"), "--output", path, "--skip-validation", "--experts", "dense", "--sequence-length", "3")
	require.Zero(t, status, stderr)
	require.NoError(t, os.WriteFile(path, []byte("a letter"), 0o644))
	status, _, stderr = runExport(t, "--checkpoint", fixtures.Dir("toy"), "--output", path, "--skip-validation")
	require.Equal(t, exitInput, status)
	require.Contains(t, stderr, "--force")
	status, _, stderr = runExport(t, "--checkpoint", fixtures.Dir("toy"), "--output", path, "--skip-validation", "--force")
	require.Zero(t, status, stderr)
}

func TestExportValidatesDecoding(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.onnx")
	status, stdout, stderr := runExport(t, "--checkpoint", fixtures.Dir("toy"), "--output", path, "--kv-cache", "--sequence-length", "20")
	require.Zero(t, status, stderr)
	require.Contains(t, stdout, "on 20 tokens")
	require.Contains(t, stdout, "decoding token by token too")
}

// A representative of every option; the pairs are in exporter/pairwise.
func TestExportValidatesEveryOption(t *testing.T) {
	for _, arguments := range [][]string{
		{"--operators", "onnxruntime", "--kv-cache"},
		{"--precision", "bfloat16", "--functions"},
		{"--precision", "float16", "--experts", "dense"},
		{"--last-logits-only", "--sequence-length", "20"},
		{"--last-logits-only", "--kv-cache", "--emit-hidden-states"},
		{"--layers", "2", "--emit-hidden-states", "--emit-block-debug"},
	} {
		t.Run(strings.Join(arguments, " "), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "m.onnx")
			status, stdout, stderr := runExport(t, append(arguments, "--checkpoint", fixtures.Dir("toy"), "--output", path)...)
			require.Zero(t, status, stderr)
			require.Contains(t, stdout, "agrees with the reference")
		})
	}
}

func TestExportRefusesBadInput(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "m.onnx")
	toy := fixtures.Dir("toy")
	for _, c := range []struct {
		name, want string
		arguments  []string
	}{
		{"length 0", "--sequence-length: 0", []string{"--checkpoint", toy, "--output", path, "--sequence-length", "0"}},
		{"negative length", "--sequence-length: -4", []string{"--checkpoint", toy, "--output", path, "--sequence-length", "-4"}},
		{"nothing to cache", "nothing to cache", []string{"--checkpoint", toy, "--output", path, "--sequence-length", "1", "--kv-cache"}},
		{"operators", `--operators: "magic"`, []string{"--checkpoint", toy, "--output", path, "--operators", "magic"}},
		{"both", "expand-functions", []string{"--checkpoint", toy, "--output", path, "--functions", "--expand-functions"}},
		{"precision", "--precision", []string{"--checkpoint", toy, "--output", path, "--precision", "float8"}},
		{"layers", "--layers", []string{"--checkpoint", toy, "--output", path, "--layers", "0"}},
		{"too many layers", "--layers", []string{"--checkpoint", toy, "--output", path, "--layers", "99"}},
		{"experts", `--experts: "none"`, []string{"--checkpoint", toy, "--output", path, "--experts", "none"}},
		{"no directory", "--output", []string{"--checkpoint", toy, "--output", filepath.Join(dir, "missing", "m.onnx")}},
		{"a directory", "is a directory", []string{"--checkpoint", toy, "--output", dir}},
		{"no checkpoint", "nowhere", []string{"--checkpoint", filepath.Join(dir, "nowhere"), "--output", path}},
		{"no output", "output", []string{"--checkpoint", toy}},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, stdout, stderr := runExport(t, c.arguments...)
			require.Equal(t, exitInput, status)
			require.Empty(t, stdout)
			require.Contains(t, stderr, c.want)
			require.Equal(t, 1, strings.Count(stderr, "\n"), stderr)
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
}

// Activations beyond float16 show only when the graph runs: the tensor in which that
// begins is named, and nothing is left.
func TestExportRefusesFloat16ThatOverflows(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	for i := range m.Blocks {
		for e, bias := range m.Blocks[i].MLP2Bias {
			m.Blocks[i].MLP2Bias[e] = slices.Repeat([]float32{59904}, len(bias)) // a bfloat16 below 65504
		}
	}
	dir := filepath.Join(t.TempDir(), "loud")
	require.NoError(t, m.Write(t.Context(), checkpoint.OpenAI, dir, checkpoint.WriteOptions{}))
	for _, arguments := range [][]string{
		nil, {"--operators", "onnxruntime"}, {"--last-logits-only", "--kv-cache"}, {"--emit-hidden-states", "--emit-block-debug"},
	} {
		out := t.TempDir()
		path := filepath.Join(out, "m.onnx")
		status, _, stderr := runExport(t, append(arguments, "--checkpoint", dir, "--output", path, "--precision", "float16")...)
		require.Equal(t, exitFail, status)
		// Twice 59904 in the residual stream.
		require.Equal(t, "gptoss: validation: block_1.output overflows: float16 ends at 65504; export in bfloat16 or float32\n", stderr)
		require.Empty(t, content(t, out))
	}
	status, _, stderr := runExport(t, "--checkpoint", dir, "--output", filepath.Join(t.TempDir(), "m.onnx"), "--precision", "bfloat16")
	require.Zero(t, status, stderr)
}
