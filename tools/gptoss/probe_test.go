package main

import (
	"context"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sebdah/goldie/v2"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// recordedReport is the report of a probe whose implementation was run when the
// goldens were made.
func recordedReport(t *testing.T, implementation, precision string) *probeReport {
	t.Helper()
	results, run, err := golden.Model("toy", implementation, precision)
	require.NoError(t, err)
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	digest, err := m.Digest(t.Context())
	require.NoError(t, err)
	names := taps.All(m.Config)
	want, err := reference.Run(t.Context(), m, run.Tokens, reference.Options{Precision: reference.Float64, Taps: names})
	require.NoError(t, err)

	command := "gptoss probe --against " + run.Implementation + " --checkpoint fixtures/toy"
	if run.Corrected {
		command += " --correct-window"
	}
	if precision != "float32" {
		command += " --dtype " + precision
	}
	r := &probeReport{
		Command: command + " --tokens full.json", Implementation: run.Implementation, Corrected: run.Corrected,
		Precision: reference.Precision(precision), Packages: run.Packages, Digest: digest, Config: m.Config,
		Source: checkpoint.Source{Path: "fixtures/toy", Layout: m.Source.Layout}, Tokens: run.Tokens, Injected: -1,
	}
	require.NoError(t, r.compare(t.Context(), m, names, results, want))
	return r
}

// The transcripts of the real implementations on toy are committed; `make
// golden` writes them again. Their numbers are the recorded runs' and the
// reference's float64, which agrees to 1e-12 everywhere: three digits are stable.
func TestProbeTranscripts(t *testing.T) {
	transcripts := goldie.New(t, goldie.WithFixtureDir("../../golden/probe"), goldie.WithNameSuffix(".md"))
	for _, c := range []struct {
		implementation, precision string
		verdict                   conformance.Word
	}{
		{"torch", "float32", conformance.Pass},
		{"torch", "bfloat16", conformance.Pass},
		{"transformers", "float32", conformance.Pass},
		{"flax", "float32", conformance.Fail},
		{"flax.corrected", "float32", conformance.Pass},
		{"equinox.corrected", "float32", conformance.Pass},
	} {
		name := "toy." + c.implementation + "." + c.precision
		t.Run(name, func(t *testing.T) {
			r := recordedReport(t, c.implementation, c.precision)
			assert.Equal(t, c.verdict, r.Verdict.Word)
			assert.Empty(t, r.Issues)
			transcripts.Assert(t, name, []byte(r.markdown()))
		})
	}
}

// Every tap belongs to a row of the table, or its difference would be lost.
func TestProbeTableCoversEveryTap(t *testing.T) {
	rows := map[string]bool{taps.ExpertIndices: true} // counted as routing
	for _, stage := range probeStages {
		for _, name := range stage.taps {
			rows[name] = true
		}
	}
	for _, name := range append([]string{taps.Embedding, taps.FinalNorm, taps.Logits}, taps.InBlock...) {
		assert.True(t, rows[name], "%s is in no row", name)
	}
}

// What is missing, misshaped or unknown is named, and what cannot be aligned too.
func TestProbeIssues(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	tokens := []int32{1, 2, 3}
	names := taps.All(m.Config)
	want, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: reference.Float64, Taps: names})
	require.NoError(t, err)
	got, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: reference.Float32, Taps: names})
	require.NoError(t, err)
	delete(got, "block_1.v")
	delete(got, "block_2.mlp_expert_indices")
	got["made_up"] = got[taps.Logits]

	r := &probeReport{Precision: reference.Float32, Config: m.Config, Tokens: tokens, Injected: -1}
	require.NoError(t, r.compare(t.Context(), m, names, got, want))
	issues := strings.Join(r.Issues, "\n")
	assert.Contains(t, issues, "block_1.v: missing")
	assert.Contains(t, issues, "block_2.mlp_expert_indices: missing")
	assert.Contains(t, issues, "block_2.mlp_activated_outputs: cannot be aligned without block_2.mlp_expert_indices")
	assert.Contains(t, issues, "made_up: is not the name of a tap")
	_, section, _ := strings.Cut(r.markdown(), "[issues]\n")
	assert.Equal(t, issues+"\n", section)

	got["block_0.k"] = tensor.FromFloat32s([]int{1}, []float32{0})
	r = &probeReport{Precision: reference.Float32, Config: m.Config, Tokens: tokens, Injected: -1}
	require.NoError(t, r.compare(t.Context(), m, names, got, want))
	assert.Contains(t, r.Issues, "block_0.k: has the shape [1], not [3 2 16]")
	assert.Equal(t, conformance.Fail, r.Verdict.Word)
}

// A NaN is the largest difference there is, not the smallest.
func TestProbeDifferenceOfNaN(t *testing.T) {
	r := &probeReport{Tokens: []int32{0}}
	got := map[string]tensor.Tensor{"logits": tensor.FromFloat32s([]int{1, 2}, []float32{float32(math.NaN()), 1})}
	want := map[string]tensor.Tensor{"logits": tensor.FromFloat64s([]int{1, 2}, []float64{0, 1})}
	d, err := r.difference("logits", got, want)
	require.NoError(t, err)
	assert.Equal(t, math.Inf(1), d.max)
}

func TestProbeRefusesBadFlags(t *testing.T) {
	toy := fixtures.Dir("toy")
	for name, c := range map[string]struct {
		arguments []string
		says      string
	}{
		"implementation": {[]string{"--against", "llama"}, "none of torch"},
		"dtype":          {[]string{"--against", "torch", "--dtype", "float16"}, "--dtype"},
		"flax bfloat16":  {[]string{"--against", "flax", "--dtype", "bfloat16"}, "float32 only"},
		"correction":     {[]string{"--against", "torch", "--correct-window"}, "needs no correction"},
		"layers":         {[]string{"--against", "torch", "--max-layers", "4"}, "can't be cut"},
		"inject":         {[]string{"--against", "torch", "--inject-layer", "3"}, "no block 3"},
		"inject -1":      {[]string{"--against", "torch", "--inject-layer", "-1"}, "count from 0"},
		"padding":        {[]string{"--against", "torch", "--tokens", "1,2", "--sequence-length", "3"}, "padding"},
		"vocabulary":     {[]string{"--against", "torch", "--tokens", "256"}, "vocabulary"},
		"prompt":         {[]string{"--against", "torch", "--prompt", "Hello"}, "vocabulary"},
		"two prompts":    {[]string{"--against", "torch", "--prompt", "Hello", "--tokens", "1"}, "tokens"},
		"length":         {[]string{"--against", "torch", "--sequence-length", "-1"}, "--sequence-length"},
		"transcript":     {[]string{"--against", "torch", "--transcript", filepath.Join(toy, "none", "out.md")}, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr strings.Builder
			status := run(context.Background(), []*cobra.Command{probeCommand()}, append([]string{"probe", "--checkpoint", toy}, c.arguments...), &stdout, &stderr)
			assert.Equal(t, exitInput, status)
			assert.Empty(t, stdout.String())
			assert.Contains(t, stderr.String(), c.says)
			assert.Equal(t, 1, strings.Count(stderr.String(), "\n"))
		})
	}
}

// The same probe has the same command line, however it was typed.
func TestProbeCommandLine(t *testing.T) {
	line := func(arguments ...string) string {
		command := probeCommand()
		require.NoError(t, command.ParseFlags(arguments))
		return commandLine(command)
	}
	assert.Equal(t, `probe --against flax --checkpoint "a b" --correct-window --seed 3`,
		line("--seed", "3", "--checkpoint=a b", "--correct-window", "--against", "flax", "--transcript", "out.md"))
}

func TestDrawnTokensAreReproducible(t *testing.T) {
	c := fixtures.Generated[0].Config
	a, b := drawTokens(c, 7, 20), drawTokens(c, 7, 20)
	assert.Equal(t, a, b)
	assert.NotEqual(t, a, drawTokens(c, 8, 20))
	require.NoError(t, reference.CheckTokens(c, a))
}

// A checkpoint that the oracles cannot load as it is becomes one that they can,
// with the same values, and what was made on the way is removed.
func TestOracleDirectoryConverts(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	digest, err := m.Digest(t.Context())
	require.NoError(t, err)

	dir, cleanup, err := oracleDirectory(t.Context(), m, checkpoint.Options{})
	require.NoError(t, err)
	assert.Equal(t, fixtures.Dir("toy"), dir)
	cleanup()
	assert.DirExists(t, dir)

	bundle := filepath.Join(t.TempDir(), "toy.msgpack")
	require.NoError(t, m.Write(t.Context(), checkpoint.Flax, bundle, checkpoint.WriteOptions{}))
	flax, err := checkpoint.Open(bundle)
	require.NoError(t, err)
	defer flax.Close()
	dir, cleanup, err = oracleDirectory(t.Context(), flax, checkpoint.Options{})
	require.NoError(t, err)
	converted, err := checkpoint.Open(dir)
	require.NoError(t, err)
	again, err := converted.Digest(t.Context())
	require.NoError(t, err)
	require.NoError(t, converted.Close())
	assert.Equal(t, digest, again)
	cleanup()
	_, err = os.Stat(dir)
	assert.ErrorIs(t, err, os.ErrNotExist)
}
