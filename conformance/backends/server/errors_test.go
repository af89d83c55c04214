package server_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/backends/server"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
)

// complete asks a server with a vocabulary of 10 that always says the same.
func complete(t *testing.T, handle http.HandlerFunc) (server.Completion, error) {
	t.Helper()
	s := httptest.NewServer(handle)
	t.Cleanup(s.Close)
	c, err := server.NewClient(server.Options{URL: s.URL, Model: "m", APIKey: "secret", Timeout: 20 * time.Second}, 10)
	require.NoError(t, err)
	return c.Complete(t.Context(), []int32{1, 2, 3}, 2)
}

func says(status int, kind, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", kind)
		w.WriteHeader(status)
		io.WriteString(w, body) //nolint:errcheck // the client notices
	}
}

// choice is an answer with one choice, of which logprobs and finish_reason are given.
func choice(logProbs, reason string) string {
	return fmt.Sprintf(`{"choices": [{"text": "hi", "logprobs": %s, "finish_reason": %q}], "usage": {"prompt_tokens": 3}}`, logProbs, reason)
}

func TestErrors(t *testing.T) {
	const kind = "application/json"
	for name, test := range map[string]struct {
		status           int
		kind, body, says string
	}{
		"401":             {401, kind, `{"error": {"message": "Invalid API Key"}}`, "HTTP 401 Unauthorized: Invalid API Key (is the API key right?)"},
		"404":             {404, kind, `{"object": "error", "message": "no model m"}`, "HTTP 404 Not Found: no model m (is that the address and the model's name?)"},
		"422":             {422, kind, `{"detail": [{"loc": ["prompt"]}]}`, `HTTP 422 Unprocessable Entity: [{"loc": ["prompt"]}]; the prompt can't be put as text instead: a vocabulary of 10 has no text`},
		"429":             {429, kind, `{"error": "slow down"}`, "HTTP 429 Too Many Requests: slow down"},
		"500":             {500, "text/plain", "it\nbroke\x1b[31m", "HTTP 500 Internal Server Error: it broke?[31m"},
		"503":             {503, kind, `{"error": {"message": "Loading model", "code": 503}}`, "HTTP 503 Service Unavailable: Loading model"},
		"web page":        {200, "text/html; charset=utf-8", "<html><title>Welcome</title>", `a web page instead of JSON: "<html><title>Welcome`},
		"stream":          {200, "text/event-stream", "data: {}\n\n", "a stream of events"},
		"unnamed stream":  {200, kind, "data: {}\n\n", "a stream of events"},
		"empty":           {200, kind, "", "the answer is no JSON"},
		"cut short":       {200, kind, `{"choices": [`, "the answer is no JSON"},
		"bare NaN":        {200, kind, choice(`{"tokens": ["token_id:1"], "token_logprobs": [NaN]}`, "stop"), "the answer is no JSON (invalid character 'N'"},
		"other form":      {200, kind, `{"choices": {"a": 1}}`, "the answer is not of OpenAI's form"},
		"huge number":     {200, kind, choice(`{"tokens": ["token_id:1"], "token_logprobs": [1`+strings.Repeat("0", 4000)+`]}`, "stop"), "the answer is not of OpenAI's form"},
		"deep":            {200, kind, strings.Repeat("[", 1<<20), "the answer is n"},
		"direction":       {500, "text/plain", "left\u202eright\u009b", "HTTP 500 Internal Server Error: left?right?"},
		"error inside":    {200, kind, `{"error": {"message": "out of memory"}}`, "answers with an error: out of memory"},
		"no choice":       {200, kind, `{"choices": []}`, "0 choices, want one"},
		"no logprobs":     {200, kind, `{"choices": [{"text": "hi", "finish_reason": "length"}]}`, `gives no log-probabilities, by which it could be judged; it said "hi"`},
		"null logprobs":   {200, kind, choice("null", "length"), "gives no log-probabilities"},
		"empty logprobs":  {200, kind, choice("{}", "length"), "gives no log-probabilities"},
		"null":            {200, kind, choice(`{"tokens": ["token_id:1", "token_id:2"], "token_logprobs": [-1, null]}`, "length"), "the log-probability of generated token 1 is null"},
		"null in content": {200, kind, choice(`{"content": [{"id": 1, "logprob": null}]}`, "stop"), "the log-probability of generated token 0 is null"},
		"unknown text":    {200, kind, choice(`{"tokens": ["a", "b"], "token_logprobs": [-1, -1]}`, "length"), `generated token 0: the server names it "a" and gives no id, and a vocabulary of 10 has no text`},
		"no number":       {200, kind, choice(`{"tokens": ["token_id:x"], "token_logprobs": [-1]}`, "stop"), `"token_id:x" has no id in it`},
		"id outside":      {200, kind, choice(`{"tokens": ["token_id:10"], "token_logprobs": [-1]}`, "stop"), "id 10 is outside the checkpoint's vocabulary of 10"},
		"negative id":     {200, kind, choice(`{"content": [{"id": -1, "logprob": -1}]}`, "stop"), "id -1 is outside"},
		"too few":         {200, kind, choice(`{"tokens": ["token_id:1"], "token_logprobs": [-1]}`, "length"), "generated 1 tokens of the 2 asked for"},
		"too many":        {200, kind, choice(`{"tokens": ["token_id:1", "token_id:1", "token_id:1"], "token_logprobs": [-1, -1, -1]}`, "length"), "generated 3 tokens, 2 were asked for"},
		"not as many":     {200, kind, choice(`{"tokens": ["token_id:1", "token_id:1"], "token_logprobs": [-1]}`, "length"), "2 tokens and 1 log-probabilities"},
		"nothing":         {200, kind, `{"choices": [{"text": "", "logprobs": {"content": []}, "finish_reason": "stop"}]}`, "generated no token"},
		"longer prompt":   {200, kind, `{"choices": [{"text": "a"}], "usage": {"prompt_tokens": 4}}`, "made 4 tokens of a prompt of 3"},
		"other prompt":    {200, kind, `{"choices": [{"text": "a", "prompt_token_ids": [1, 2, 4]}]}`, "ran other tokens than the prompt's 3: [1 2 4]"},
		"other ids":       {200, kind, `{"choices": [{"text": "a", "token_ids": [1], "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1, -1]}}]}`, "1 token ids and 2 log-probabilities"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := complete(t, says(test.status, test.kind, test.body))
			require.Error(t, err)
			assert.Contains(t, err.Error(), test.says)
			assert.Contains(t, err.Error(), "http://127.0.0.1")
			assert.NotContains(t, err.Error(), "secret")
			assert.NotContains(t, err.Error(), "\n")
			assert.Less(t, len(err.Error()), 500)
		})
	}
}

func TestShortAnswerIsRightWhenTheModelStops(t *testing.T) {
	c, err := complete(t, says(200, "application/json", choice(`{"tokens": ["token_id:7"], "token_logprobs": [-0.5]}`, "stop")))
	require.NoError(t, err)
	assert.Equal(t, []int32{7}, c.Tokens)
	assert.Equal(t, []float64{-0.5}, c.LogProbs)
}

func TestKeyGoesNowhereElse(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the redirection was followed") }))
	defer elsewhere.Close()
	_, err := complete(t, func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "Bearer secret", r.Header.Get("Authorization"))
		http.Redirect(w, r, elsewhere.URL+"/login", http.StatusFound)
	})
	assert.ErrorContains(t, err, "HTTP 302 Found: it wants to be asked at "+elsewhere.URL+"/login")
}

func TestHugeAnswer(t *testing.T) {
	_, err := complete(t, func(w http.ResponseWriter, _ *http.Request) {
		block := []byte(strings.Repeat(" ", 1<<20))
		for range 64 {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	assert.ErrorContains(t, err, "the answer is longer than 16 MB")
}

// TestNeverHangs: a server that says nothing, or no end of little, runs out of time.
func TestNeverHangs(t *testing.T) {
	for name, begin := range map[string]string{"silent": "", "dripping": "{"} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.WriteString(w, begin) //nolint:errcheck // the client goes away
				if begin != "" {
					w.(http.Flusher).Flush()
				}
				io.Copy(io.Discard, r.Body) //nolint:errcheck // so that the server notices that the client is gone
				<-r.Context().Done()
			}))
			defer s.Close()
			c, err := server.NewClient(server.Options{URL: s.URL, Model: "m", Timeout: 100 * time.Millisecond}, 10)
			require.NoError(t, err)
			_, err = c.Complete(t.Context(), []int32{1}, 1)
			assert.ErrorContains(t, err, "no answer within 100ms")

			c, err = server.NewClient(server.Options{URL: s.URL, Model: "m"}, 10)
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err = c.Complete(ctx, []int32{1}, 1)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		})
	}
}

func TestNobodyThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := l.Addr().String()
	require.NoError(t, l.Close())
	c, err := server.NewClient(server.Options{URL: "http://" + address}, 10)
	require.NoError(t, err)
	_, err = c.Complete(t.Context(), []int32{1}, 1)
	assert.ErrorContains(t, err, "connection refused")
	assert.Equal(t, 1, strings.Count(err.Error(), "http://"))
}

func TestSeveralModels(t *testing.T) {
	s := httptest.NewServer(says(200, "application/json", `{"data": [{"id": "a"}, {"id": "b"}]}`))
	defer s.Close()
	c, err := server.NewClient(server.Options{URL: s.URL}, 10)
	require.NoError(t, err)
	_, err = c.Complete(t.Context(), []int32{1}, 1)
	assert.ErrorContains(t, err, "serves several models: choose one of a, b")
}

// TestTokensByText: a server that names tokens by their text, or by their bytes, is
// understood where the vocabulary is gpt-oss's own.
func TestTokensByText(t *testing.T) {
	ids, err := tokenizer.EncodeSpecial(" Paris<|return|>")
	require.NoError(t, err)
	for name, test := range map[string]struct{ logProbs, fails string }{
		"text":    {`{"tokens": [" Paris", "<|return|>"], "token_logprobs": [-1, -2]}`, ""},
		"bytes":   {`{"content": [{"token": "?", "bytes": [32, 80, 97, 114, 105, 115], "logprob": -1}, {"token": "<|return|>", "logprob": -2}]}`, ""},
		"no text": {`{"tokens": [" Paris", ""], "token_logprobs": [-1, -2]}`, `generated token 1: the server names it "" and gives no id, and no token has that text`},
		"partial": {`{"tokens": [" Paris", "�"], "token_logprobs": [-1, -2]}`, "stands for any part of a character, and gives no id"},
		"no byte": {`{"content": [{"token": "?", "bytes": [256], "logprob": -1}]}`, "256 is no byte"},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(says(200, "application/json", choice(test.logProbs, "stop")))
			defer s.Close()
			c, err := server.NewClient(server.Options{URL: s.URL, Model: "m"}, tokenizer.VocabSize)
			require.NoError(t, err)
			got, err := c.Complete(t.Context(), []int32{1, 2, 3}, 2)
			if test.fails != "" {
				assert.ErrorContains(t, err, test.fails)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, ids, got.Tokens)
			assert.Equal(t, []float64{-1, -2}, got.LogProbs)
		})
	}
}
