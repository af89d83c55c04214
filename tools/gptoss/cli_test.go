package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
)

// returning makes a sub-command "do" whose work ends with an error.
func returning(err error) []*cobra.Command {
	return []*cobra.Command{{
		Use:  "do",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return err },
	}}
}

func TestRunExitStatus(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, test := range []struct {
		name      string
		ctx       context.Context
		err       error
		arguments []string
		status    int
		stderr    string
	}{
		{"success", t.Context(), nil, []string{"do"}, 0, ""},
		{"bad input", t.Context(), errors.New("a.bin: too short"), []string{"do"}, 2, "gptoss: a.bin: too short\n"},
		{"several lines", t.Context(), errors.New("one\n\n  two\n"), []string{"do"}, 2, "gptoss: one two\n"},
		{"verdict", t.Context(), verdictError("%d of 3 stages fail", 2), []string{"do"}, 1, "gptoss: 2 of 3 stages fail\n"},
		{"interrupted", cancelled, context.Canceled, []string{"do"}, 130, "gptoss: interrupted\n"},
		{"unknown flag", t.Context(), nil, []string{"do", "--nope"}, 2, "gptoss: unknown flag: --nope\n"},
		{"unknown command", t.Context(), nil, []string{"nope"}, 2, "gptoss: unknown command \"nope\" for \"gptoss\"\n"},
		{"surplus argument", t.Context(), nil, []string{"do", "x"}, 2, "gptoss: unknown command \"x\" for \"gptoss do\"\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			status := run(test.ctx, returning(test.err), test.arguments, &stdout, &stderr)
			assert.Equal(t, test.status, status)
			assert.Equal(t, test.stderr, stderr.String())
		})
	}
}

func TestRunWithoutArgumentsShowsHelp(t *testing.T) {
	var stdout, stderr bytes.Buffer
	assert.Equal(t, 0, run(t.Context(), commands(), nil, &stdout, &stderr))
	assert.Contains(t, stdout.String(), "inspect")
	assert.Empty(t, stderr.String())
}

// Every command that opens a checkpoint takes a configuration from elsewhere, and
// passes on that the gate bias is to be undone, which OpenAI's layout refuses.
func TestCheckpointFlags(t *testing.T) {
	bare := func(from string) string {
		dir := t.TempDir()
		require.NoError(t, os.Link(filepath.Join(from, fixtures.WeightsFile), filepath.Join(dir, fixtures.WeightsFile)))
		return dir
	}
	beside := t.TempDir() // a link needs the same file system
	text, err := os.ReadFile(filepath.Join(fixtures.Dir("toy"), fixtures.WeightsFile))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(beside, fixtures.WeightsFile), text, 0o644))
	capitals, err := fixtures.Expanded(t.Context(), fixtures.Dir("capitals"), t.TempDir())
	require.NoError(t, err)
	graph := exportFixture(t, "toy", exporter.Options{})
	out := filepath.Join(t.TempDir(), "out")
	for _, c := range []struct {
		checkpoint, config string
		arguments          []string
	}{
		{bare(beside), fixtures.Dir("toy"), []string{"export", "--output", out + ".onnx"}},
		{bare(beside), fixtures.Dir("toy"), []string{"compare", "--onnx", graph, "--tokens", "1,2,3"}},
		{bare(beside), fixtures.Dir("toy"), []string{"forward", "--tokens", "1,2,3", "--output", out}},
		{bare(beside), fixtures.Dir("toy"), []string{"judge", "--tokens", "1,2,3", "--onnx", graph}},
		{bare(capitals), capitals, []string{"generate", "--prompt", "France capital? Answer:"}},
		{bare(capitals), capitals, []string{"generate", "--prompt", "France capital? Answer:", "--backend", "onnxruntime"}},
	} {
		t.Run(strings.Join(c.arguments[:1], " "), func(t *testing.T) {
			arguments := append(slices.Clone(c.arguments), "--checkpoint", c.checkpoint)
			call := func(more ...string) (int, string) {
				var stdout, stderr bytes.Buffer
				status := run(t.Context(), commands(), append(slices.Clone(arguments), more...), &stdout, &stderr)
				return status, stderr.String()
			}
			status, stderr := call()
			assert.Equal(t, exitInput, status, "no configuration lies beside the weights")
			assert.Contains(t, stderr, fixtures.ConfigFile)
			for _, path := range []string{c.config, filepath.Join(c.config, fixtures.ConfigFile)} {
				status, stderr = call("--config", path)
				assert.Equal(t, exitPass, status, stderr)
			}
			status, stderr = call("--config", c.config, "--undo-gate-bias")
			assert.Equal(t, exitInput, status)
			assert.Contains(t, stderr, "Equinox")
		})
	}
}
