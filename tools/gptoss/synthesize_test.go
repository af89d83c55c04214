package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
)

func runSynthesize(ctx context.Context, arguments ...string) (status int, stdout, stderr string) {
	var out, err bytes.Buffer
	status = run(ctx, []*cobra.Command{synthesizeCommand()}, append([]string{"synthesize"}, arguments...), &out, &err)
	return status, out.String(), err.String()
}

// TestSynthesizeIsDeterministic makes the toy's shape twice, the second time with
// fewer layers, and compares.
func TestSynthesizeIsDeterministic(t *testing.T) {
	dir := t.TempDir()
	shape := filepath.Join(fixtures.Dir("toy"), fixtures.ConfigFile)
	synthesized := func(name string) (digest string, weights []byte) {
		status, out, stderr := runSynthesize(t.Context(), "--config", shape, "--output", filepath.Join(dir, name))
		require.Zero(t, status, stderr)
		weights, err := os.ReadFile(filepath.Join(dir, name, fixtures.WeightsFile))
		require.NoError(t, err)
		return strings.TrimPrefix(out, filepath.Join(dir, name)), weights
	}
	digest, made := synthesized("a")
	assert.Contains(t, digest, "sha256:")
	again, same := synthesized("again")
	assert.Equal(t, digest, again)
	assert.True(t, bytes.Equal(made, same), "the same bytes every time")

	status, _, stderr := runSynthesize(t.Context(), "--config", shape, "--layers", "2", "--output", filepath.Join(dir, "b"))
	require.Zero(t, status, stderr)
	status, _, stderr = runSynthesize(t.Context(), "--config", shape, "--output", filepath.Join(dir, "b"))
	assert.Equal(t, exitInput, status, "it would replace a checkpoint")
	assert.Contains(t, stderr, "--force")
	status, out, stderr := runSynthesize(t.Context(), "--config", shape, "--if-missing", "--output", filepath.Join(dir, "b"))
	require.Zero(t, status, stderr)
	assert.Equal(t, filepath.Join(dir, "b")+"\n", out)
}

func TestSynthesizeRefusesNonsense(t *testing.T) {
	for _, arguments := range [][]string{
		{"--layers", "0"}, {"--layers", "-3"}, {"--config", "21b"}, {"--config", "no/such/config.json"},
		{"--config", filepath.Join(fixtures.Dir("toy"), fixtures.ConfigFile)}, // no --output
	} {
		status, stdout, stderr := runSynthesize(t.Context(), arguments...)
		assert.Equal(t, exitInput, status, "%q", arguments)
		assert.Empty(t, stdout)
		assert.Equal(t, 1, strings.Count(stderr, "\n"), "%q: %s", arguments, stderr)
	}
}

// TestSynthesizeLeavesNothingWhenInterrupted: the directory is not even made.
func TestSynthesizeLeavesNothingWhenInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := filepath.Join(t.TempDir(), "x")
	status, _, stderr := runSynthesize(ctx, "--layers", "1", "--output", dir)
	assert.Equal(t, exitInterrupted, status, stderr)
	assert.NoDirExists(t, dir)
}
