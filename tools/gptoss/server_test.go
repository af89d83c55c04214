package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
)

// llamaServer answers with what llama.cpp's llama-server said to toy's prompt
// "short", whatever the question. change may spoil it.
func llamaServer(t *testing.T, change func(answer map[string]any)) (url, tokens string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "conformance", "backends", "server", "testdata", "llama-server-toy.json"))
	require.NoError(t, err)
	var recording struct {
		Exchanges []struct {
			Method  string
			Request struct{ Prompt []int32 }
			Answer  map[string]any
		}
	}
	require.NoError(t, json.Unmarshal(text, &recording))
	models, short := recording.Exchanges[0], recording.Exchanges[1]
	ids, err := fixtures.Tokens("toy", "short")
	require.NoError(t, err)
	require.Equal(t, ids, short.Request.Prompt)
	change(short.Answer)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "Bearer sesame", r.Header.Get("Authorization"))
		w.Header().Set("Content-Type", "application/json")
		answer := short.Answer
		if r.Method == http.MethodGet {
			answer = models.Answer
		}
		assert.NoError(t, json.NewEncoder(w).Encode(answer))
	}))
	t.Cleanup(s.Close)
	t.Setenv("OPENAI_API_KEY", "sesame\n")
	file := filepath.Join(t.TempDir(), "tokens.json")
	list, err := json.Marshal(ids)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, list, 0o644))
	return s.URL, file
}

func TestJudgeServer(t *testing.T) {
	url, tokens := llamaServer(t, func(map[string]any) {})
	arguments := []string{"judge", "--server", url, "--checkpoint", fixtures.Dir("toy"), "--tokens", tokens, "--precision"}
	status, stdout, stderr := call(t, append(arguments, "bfloat16")...)
	assert.Equal(t, exitPass, status, "%s%s", stdout, stderr)
	assert.Contains(t, stdout, "server: "+url+"/v1/completions, model toy.gguf, prompts as token ids\nprompt \"as given\": 20 tokens, 16 generated")
	assert.Contains(t, stdout, "verdict: pass\n")

	status, stdout, stderr = call(t, append(arguments, "float32")...)
	assert.Equal(t, exitFail, status)
	assert.Contains(t, stdout, "verdict: fail\n")
	assert.Contains(t, stdout, "diagnosis: none\n")
	assert.Contains(t, stderr, "gptoss: "+url+" fails: ")
}

func TestJudgeServerErrors(t *testing.T) {
	url, tokens := llamaServer(t, func(answer map[string]any) { delete(answer["choices"].([]any)[0].(map[string]any), "logprobs") })
	toy := fixtures.Dir("toy")
	for name, test := range map[string]struct {
		arguments []string
		says      string
	}{
		"no logprobs":       {[]string{"--server", url, "--checkpoint", toy, "--tokens", tokens}, "gives no log-probabilities"},
		"nobody there":      {[]string{"--server", "http://127.0.0.1:1", "--checkpoint", toy}, "connection refused"},
		"no URL":            {[]string{"--server", "localhost", "--checkpoint", toy}, "--server: \"localhost\" is no URL of a server"},
		"no text":           {[]string{"--server", url, "--checkpoint", toy, "--prompt", "hello"}, "--prompt: a vocabulary of 256 has no text"},
		"token outside":     {[]string{"--server", url, "--checkpoint", toy, "--tokens", "256"}, "--tokens: "},
		"no tokens":         {[]string{"--server", url, "--checkpoint", toy, "--max-tokens", "0"}, "--max-tokens: 0"},
		"no time":           {[]string{"--server", url, "--checkpoint", toy, "--timeout", "0s"}, "--timeout: 0s"},
		"both":              {[]string{"--server", url, "--checkpoint", toy, "--prompt", "a", "--tokens", "1"}, "[tokens prompt]"},
		"two subjects":      {[]string{"--server", url, "--checkpoint", toy, "--onnx", "m.onnx"}, "[tensors onnx server]"},
		"chunks":            {[]string{"--server", url, "--checkpoint", toy, "--chunks", "4"}, "[server chunks]"},
		"without a server":  {[]string{"--tensors", "x", "--checkpoint", toy, "--tokens", "1", "--model", "m"}, "--model is for --server"},
		"tokens are needed": {[]string{"--tensors", "x", "--checkpoint", toy}, "required flag(s) \"tokens\" not set"},
	} {
		t.Run(name, func(t *testing.T) {
			status, stdout, stderr := call(t, append([]string{"judge"}, test.arguments...)...)
			assert.Equal(t, exitInput, status)
			assert.Empty(t, stdout)
			assert.Contains(t, stderr, test.says)
			assert.Regexp(t, `^gptoss: [^\n]+\n$`, stderr)
		})
	}
}
