package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// subjectFile stores what toy puts out in float32, with a fault if one is named,
// and returns the file and the tokens.
func subjectFile(t *testing.T, fault string, change func(map[string]tensor.Tensor)) (path, tokens string) {
	t.Helper()
	weights, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer weights.Close()
	ids, err := fixtures.Tokens("toy", "full")
	require.NoError(t, err)
	model := reference.New(weights, reference.Single())
	if fault != "" {
		f, ok := faults.ByID(fault)
		require.True(t, ok, fault)
		model = faults.Apply(f, model)
	}
	results, err := reference.Observe(t.Context(), model, ids)
	require.NoError(t, err)
	change(results)
	var list []tensor.Named
	for name, r := range results {
		list = append(list, tensor.Named{Name: name, Tensor: r})
	}
	path = filepath.Join(t.TempDir(), "subject.safetensors")
	require.NoError(t, tensor.WriteSafetensors(path, list, nil))
	text, err := json.Marshal(ids)
	require.NoError(t, err)
	tokens = filepath.Join(t.TempDir(), "tokens.json")
	require.NoError(t, os.WriteFile(tokens, text, 0o644))
	return path, tokens
}

func unchanged(map[string]tensor.Tensor) {}

// call runs the command line.
func call(t *testing.T, arguments ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errors bytes.Buffer
	status = run(t.Context(), commands(), arguments, &out, &errors)
	return status, out.String(), errors.String()
}

func TestJudgePasses(t *testing.T) {
	path, tokens := subjectFile(t, "", unchanged)
	verdict := filepath.Join(t.TempDir(), "verdict.json")
	status, stdout, stderr := call(t, "judge", "--checkpoint", fixtures.Dir("toy"), "--tokens", tokens,
		"--tensors", path, "--precision", "float32", "--json", verdict)
	assert.Equal(t, 0, status, stderr)
	assert.Contains(t, stdout, "verdict: pass\n")
	assert.NotContains(t, stdout, "diagnosis")
	text, err := os.ReadFile(verdict)
	require.NoError(t, err)
	var stored struct{ Verdict string }
	require.NoError(t, json.Unmarshal(text, &stored))
	assert.Equal(t, "pass", stored.Verdict)
}

// TestJudgeFails: the diagnosis stands alone on its line, from all taps and from
// logits alone.
func TestJudgeFails(t *testing.T) {
	for name, change := range map[string]func(map[string]tensor.Tensor){
		"taps": unchanged,
		"logits": func(results map[string]tensor.Tensor) {
			for name := range results {
				if name != taps.Logits {
					delete(results, name)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			path, tokens := subjectFile(t, "window-one-too-many", change)
			status, stdout, stderr := call(t, "judge", "--checkpoint", fixtures.Dir("toy"), "--tokens", tokens, "--tensors", path, "--precision", "float32")
			assert.Equal(t, 1, status)
			assert.Contains(t, strings.Split(stdout, "\n"), "diagnosis: window-one-too-many")
			assert.Contains(t, stdout, "remaining error: ")
			assert.Equal(t, 1, strings.Count(stderr, "\n"), "more than one line: %s", stderr)
		})
	}
}

func TestJudgeRefusesNonsense(t *testing.T) {
	path, tokens := subjectFile(t, "", unchanged)
	toy := fixtures.Dir("toy")
	for name, arguments := range map[string][]string{
		"no checkpoint":       {"--checkpoint", "nowhere", "--tokens", tokens, "--tensors", path},
		"no file":             {"--checkpoint", toy, "--tokens", tokens, "--tensors", "nothing.safetensors"},
		"not a tensor file":   {"--checkpoint", toy, "--tokens", tokens, "--tensors", tokens},
		"not a graph":         {"--checkpoint", toy, "--tokens", tokens, "--onnx", tokens},
		"neither":             {"--checkpoint", toy, "--tokens", tokens},
		"both":                {"--checkpoint", toy, "--tokens", tokens, "--tensors", path, "--onnx", path},
		"outside vocabulary":  {"--checkpoint", toy, "--tokens", "999999", "--tensors", path},
		"unknown precision":   {"--checkpoint", toy, "--tokens", tokens, "--tensors", path, "--precision", "int4"},
		"unwritable verdict":  {"--checkpoint", toy, "--tokens", tokens, "--tensors", path, "--json", filepath.Join(toy, "no", "v.json")},
		"not a list of ids":   {"--checkpoint", toy, "--tokens", path, "--tensors", path},
		"unknown option":      {"--checkpoint", toy, "--tokens", tokens, "--tensors", path, "--tolerance", "1"},
		"configuration: none": {"--checkpoint", toy, "--tokens", tokens, "--tensors", path, "--config", "nowhere.json"},
	} {
		t.Run(name, func(t *testing.T) {
			status, stdout, stderr := call(t, append([]string{"judge"}, arguments...)...)
			assert.Equal(t, 2, status, stderr)
			assert.Empty(t, stdout)
			assert.Regexp(t, `^gptoss: [^\n]+\n$`, stderr)
		})
	}
}

func TestRoutingReport(t *testing.T) {
	path, tokens := subjectFile(t, "", unchanged)
	status, stdout, stderr := call(t, "routing", "--checkpoint", fixtures.Dir("toy"), "--tokens", tokens, "--tensors", path, "--precision", "float32")
	assert.Equal(t, 0, status, stderr)
	assert.Contains(t, stdout, "| 2 | 40 | 100.0 % | 0 | 0 |")

	path, tokens = subjectFile(t, "", func(results map[string]tensor.Tensor) {
		name := "block_1." + taps.ExpertIndices
		indices, err := results[name].Int32s()
		require.NoError(t, err)
		for e := range int32(8) { // the first expert that token 3 did not choose
			if e != indices[12] && e != indices[13] && e != indices[14] && e != indices[15] {
				indices[12] = e
				break
			}
		}
		results[name] = tensor.FromInt32s(results[name].Shape, indices)
	})
	status, stdout, _ = call(t, "routing", "--checkpoint", fixtures.Dir("toy"), "--tokens", tokens, "--tensors", path, "--precision", "float32")
	assert.Equal(t, 1, status)
	assert.Contains(t, stdout, "| 1 | 3 |")
	assert.Contains(t, stdout, "**fault**")

	path, tokens = subjectFile(t, "", func(results map[string]tensor.Tensor) {
		for name := range results {
			if taps.Integer(name) {
				delete(results, name)
			}
		}
	})
	status, _, stderr = call(t, "routing", "--checkpoint", fixtures.Dir("toy"), "--tokens", tokens, "--tensors", path, "--precision", "float32")
	assert.Equal(t, 2, status)
	assert.Contains(t, stderr, "no tensor block_N.mlp_expert_indices")
}
