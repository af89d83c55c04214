package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// execute runs the command line and returns its status and what it said.
func execute(ctx context.Context, arguments ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = run(ctx, commands(), arguments, &out, &errs)
	return status, out.String(), errs.String()
}

func TestForwardWritesWhatTheReferenceComputes(t *testing.T) {
	model, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer model.Close()
	tokens, err := fixtures.Tokens("toy", "window+1")
	require.NoError(t, err)
	ids := filepath.Join(t.TempDir(), "ids.json")
	text, err := json.Marshal(tokens)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(ids, text, 0o644))

	for _, test := range []struct {
		precision reference.Precision
		dtype     tensor.DType
		taps      string
		names     []string
	}{
		{reference.Float64, tensor.F64, "all", taps.All(model.Config)},
		{reference.Float32, tensor.F32, "none", []string{taps.Logits}},
		{reference.BFloat16, tensor.BF16, "logits,block_1.mlp_expert_indices, block_0.q_rot", []string{"block_0.q_rot", "block_1.mlp_expert_indices", "logits"}},
		{reference.Float16, tensor.F16, "block_0.mlp_expert_indices, block_0.q_rot", []string{"block_0.q_rot", "block_0.mlp_expert_indices"}},
	} {
		t.Run(string(test.precision), func(t *testing.T) {
			output := filepath.Join(t.TempDir(), "out.safetensors")
			status, _, stderr := execute(t.Context(), "forward", "--checkpoint", fixtures.Dir("toy"), "--tokens", ids,
				"--precision", string(test.precision), "--taps", test.taps, "--output", output)
			require.Zero(t, status, stderr)
			assert.Empty(t, stderr, "no progress bar unless a person is looking")

			want, err := reference.Run(t.Context(), model, tokens, reference.Options{Precision: test.precision, Taps: test.names})
			require.NoError(t, err)
			file, err := tensor.OpenSafetensors(output)
			require.NoError(t, err)
			defer file.Close()
			assert.Equal(t, test.names, file.Names())
			for _, name := range test.names {
				got, _ := file.Tensor(name)
				assert.Equal(t, want[name], got, name)
				if !taps.Integer(name) {
					assert.Equal(t, test.dtype, got.DType, name)
				}
			}
		})
	}
}

func TestForwardRefusesBadInput(t *testing.T) {
	file := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
		return path
	}
	toy := fixtures.Dir("toy")
	for _, test := range []struct {
		name      string
		arguments []string // after --output
		says      string
	}{
		{"no checkpoint", []string{"--tokens", "1"}, "checkpoint"},
		{"no tokens", []string{"--checkpoint", toy}, "tokens"},
		{"missing checkpoint", []string{"--checkpoint", "/no/such", "--tokens", "1"}, "/no/such"},
		{"id beyond the vocabulary", []string{"--checkpoint", toy, "--tokens", "1,256"}, "outside the vocabulary of 256"},
		{"negative id", []string{"--checkpoint", toy, "--tokens=-1"}, "outside the vocabulary"},
		{"no ids", []string{"--checkpoint", toy, "--tokens", ""}, "no token id"},
		{"trailing comma", []string{"--checkpoint", toy, "--tokens", "1,"}, "no token id"},
		{"huge id", []string{"--checkpoint", toy, "--tokens", "99999999999"}, "no token id"},
		{"missing file", []string{"--checkpoint", toy, "--tokens", "ids.json"}, "ids.json"},
		{"file of words", []string{"--checkpoint", toy, "--tokens", file("ids.json", `["a"]`)}, "token 0 is a string"},
		{"file of fractions", []string{"--checkpoint", toy, "--tokens", file("ids.json", `[1.5]`)}, "not an integer"},
		{"file with an object", []string{"--checkpoint", toy, "--tokens", file("ids.json", `{}`)}, "JSON array"},
		{"empty array", []string{"--checkpoint", toy, "--tokens", file("ids.json", `[]`)}, "no ids"},
		{"truncated file", []string{"--checkpoint", toy, "--tokens", file("ids.json", `[1,`)}, "JSON"},
		{"unknown precision", []string{"--checkpoint", toy, "--tokens", "1", "--precision", "float8"}, "float8"},
		{"unknown backend", []string{"--checkpoint", toy, "--tokens", "1", "--backend", "abacus"}, "abacus"},
		{"unknown tap", []string{"--checkpoint", toy, "--tokens", "1", "--taps", "block_3.q"}, "block_3.q"},
		{"graph without its backend", []string{"--checkpoint", toy, "--tokens", "1", "--onnx", "m.onnx"}, "--backend onnxruntime"},
		{"backend without a graph", []string{"--checkpoint", toy, "--tokens", "1", "--backend", "onnxruntime"}, "--onnx"},
		{"graph with a precision", []string{"--checkpoint", toy, "--tokens", "1", "--backend", "onnxruntime", "--onnx", "m.onnx", "--precision", "float32"}, "--precision"},
		{"missing graph", []string{"--checkpoint", toy, "--tokens", "1", "--backend", "onnxruntime", "--onnx", "/no/such.onnx"}, "/no/such.onnx"},
		{"surplus argument", []string{"--checkpoint", toy, "--tokens", "1", "more"}, "more"},
		{"unknown option", []string{"--checkpoint", toy, "--tokens", "1", "--fast"}, "--fast"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			status, stdout, stderr := execute(t.Context(), append([]string{"forward", "--output", filepath.Join(dir, "out.safetensors")}, test.arguments...)...)
			assert.Equal(t, 2, status)
			assert.Empty(t, stdout)
			assert.Equal(t, 1, strings.Count(stderr, "\n"), stderr)
			assert.True(t, strings.HasPrefix(stderr, "gptoss: "), stderr)
			assert.Contains(t, stderr, test.says)
			left, err := os.ReadDir(dir)
			require.NoError(t, err)
			assert.Empty(t, left, "nothing is written")
		})
	}
}

func TestForwardRefusesAnOutputWithoutPlace(t *testing.T) {
	for name, output := range map[string]string{
		"missing directory": filepath.Join(t.TempDir(), "no", "out.safetensors"),
		"a directory":       t.TempDir(),
	} {
		t.Run(name, func(t *testing.T) {
			status, _, stderr := execute(t.Context(), "forward", "--checkpoint", fixtures.Dir("toy"), "--tokens", "1", "--output", output)
			assert.Equal(t, 2, status)
			assert.Contains(t, stderr, "--output")
		})
	}
}

func TestForwardStopsWhenInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	status, _, stderr := execute(ctx, "forward", "--checkpoint", fixtures.Dir("toy"), "--tokens", "1,2,3", "--output", filepath.Join(dir, "out.safetensors"))
	assert.Equal(t, exitInterrupted, status, stderr)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, left)
}
