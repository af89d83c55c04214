package server_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/server"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// asked is what a server reads of a question.
type asked struct {
	Prompt    json.RawMessage `json:"prompt"`
	MaxTokens int             `json:"max_tokens"`
	AsIDs     bool            `json:"return_tokens_as_token_ids"`
}

// generated is one token of an answer.
type generated struct {
	id  int32
	log []float64 // of all tokens in its place
}

// serve runs the Go reference behind an endpoint that answers in a dialect.
func serve(t *testing.T, m reference.Model[float32], answer func(asked, []generated) any) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/models", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"object": "list", "data": [{"id": "toy"}]}`)
	})
	mux.HandleFunc("POST /v1/completions", func(w http.ResponseWriter, r *http.Request) {
		var q asked
		var tokens []int32
		if err := errors.Join(json.NewDecoder(r.Body).Decode(&q), json.Unmarshal(q.Prompt, &tokens)); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var list []generated
		for range q.MaxTokens {
			logits, err := m.Forward(r.Context(), tokens, nil, reference.Observer[float32]{})
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			row := logits[len(logits)-m.Weights.Config.VocabSize:]
			best := reference.TopK(row, 1)[0]
			sum := 0.0
			for _, x := range row {
				sum += math.Exp(float64(x - row[best]))
			}
			g := generated{id: best}
			for _, x := range row {
				g.log = append(g.log, float64(x-row[best])-math.Log(sum))
			}
			list, tokens = append(list, g), append(tokens, best)
		}
		w.Header().Set("Content-Type", "application/json")
		assert.NoError(t, json.NewEncoder(w).Encode(answer(q, list)))
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

type object = map[string]any

// likeliest are the first five tokens, as a server lists them.
func (g generated) likeliest() []int32 {
	row := make([]float32, len(g.log))
	for i, p := range g.log {
		row[i] = float32(p)
	}
	return reference.TopK(row, 5)
}

// vllm answers as vLLM's documentation has it (there is no recording of it).
func vllm(_ asked, list []generated) any {
	var tokens []string
	var ids []int32
	var logProbs []float64
	var top []object
	for _, g := range list {
		name := fmt.Sprintf("token_id:%d", g.id)
		tokens, ids, logProbs = append(tokens, name), append(ids, g.id), append(logProbs, g.log[g.id])
		list := object{}
		for _, id := range g.likeliest() {
			list[fmt.Sprintf("token_id:%d", id)] = g.log[id]
		}
		top = append(top, list)
	}
	return object{"choices": []object{{
		"index": 0, "text": "?", "finish_reason": "length", "token_ids": ids,
		"logprobs": object{"tokens": tokens, "token_logprobs": logProbs, "top_logprobs": top, "text_offset": []int{}},
	}}}
}

// llama answers as llama.cpp does; testdata has recordings.
func llama(_ asked, list []generated) any {
	var content []object
	for _, g := range list {
		var top []object
		for _, id := range g.likeliest() {
			top = append(top, object{"id": id, "token": "y", "bytes": []int{121}, "logprob": g.log[id]})
		}
		content = append(content, object{"id": g.id, "token": "x", "bytes": []int{120}, "logprob": g.log[g.id], "top_logprobs": top})
	}
	return object{"choices": []object{{"index": 0, "text": "?", "finish_reason": "length", "logprobs": object{"content": content}}}}
}

func toy(t *testing.T) *checkpoint.Model {
	t.Helper()
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

func client(t *testing.T, url string, vocab int) *server.Client {
	t.Helper()
	c, err := server.NewClient(server.Options{URL: url, Timeout: time.Minute}, vocab)
	require.NoError(t, err)
	return c
}

// judged asks everything that suits toy, and judges it.
func judged(t *testing.T, url string, p reference.Precision) *conformance.Verdict {
	t.Helper()
	m := toy(t)
	prompts, err := server.Prompts(m)
	require.NoError(t, err)
	replies, err := server.Ask(t.Context(), client(t, url, m.Config.VocabSize), prompts, 12)
	require.NoError(t, err)
	v, err := server.Judge(t.Context(), m, p, replies, conformance.JudgeOptions{})
	require.NoError(t, err)
	return v
}

func TestRightServerPasses(t *testing.T) {
	for name, dialect := range map[string]func(asked, []generated) any{"vllm": vllm, "llama.cpp": llama} {
		t.Run(name, func(t *testing.T) {
			v := judged(t, serve(t, reference.New(toy(t), reference.Single()), dialect).URL, reference.Float32)
			assert.Equal(t, conformance.Pass, v.Word, v.Reason)
			assert.Nil(t, v.Diagnosis)
			assert.Empty(t, v.Unexercised)
			assert.LessOrEqual(t, v.Stages[conformance.StageGeneration], 1.0)
		})
	}
}

func TestFaultIsNamed(t *testing.T) {
	for _, id := range []string{"window-one-too-many", "sinks-dropped", "swiglu-no-clamp"} {
		t.Run(id, func(t *testing.T) {
			f, ok := faults.ByID(id)
			require.True(t, ok)
			v := judged(t, serve(t, faults.Apply(f, reference.New(toy(t), reference.Single())), vllm).URL, reference.Float32)
			assert.Equal(t, conformance.Fail, v.Word)
			assert.Equal(t, id, v.Diagnosis.ID())
			assert.Contains(t, v.Reason, `prompt "`)
		})
	}
}

// TestListsAreJudged: a server that is right about the tokens it generates, and wrong
// about those it lists beside them, fails.
func TestListsAreJudged(t *testing.T) {
	for name, spoil := range map[string]func(top []object){
		"wrong value": func(top []object) { top[4]["logprob"] = top[4]["logprob"].(float64) - 1e-3 },
		"wrong token": func(top []object) { top[4]["id"] = int32(3) },
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, reference.New(toy(t), reference.Single()), func(q asked, list []generated) any {
				answer := llama(q, list).(object)
				content := answer["choices"].([]object)[0]["logprobs"].(object)["content"].([]object)
				spoil(content[len(content)-1]["top_logprobs"].([]object))
				return answer
			})
			m := toy(t)
			prompts := promptsNamed(t, "short")
			replies, err := server.Ask(t.Context(), client(t, s.URL, m.Config.VocabSize), prompts, 12)
			require.NoError(t, err)
			v, err := server.Judge(t.Context(), m, reference.Float32, replies, conformance.JudgeOptions{Catalogue: []faults.Fault{}})
			require.NoError(t, err)
			assert.Equal(t, conformance.Fail, v.Word)
		})
	}
	t.Run("left out", func(t *testing.T) { // every value is right
		s := serve(t, reference.New(toy(t), reference.Single()), func(q asked, list []generated) any {
			answer := llama(q, list).(object)
			first := answer["choices"].([]object)[0]["logprobs"].(object)["content"].([]object)[0]
			top := first["top_logprobs"].([]object)
			first["top_logprobs"] = append(top[:1:1], top[2:]...)
			return answer
		})
		m := toy(t)
		replies, err := server.Ask(t.Context(), client(t, s.URL, m.Config.VocabSize), promptsNamed(t, "short"), 12)
		require.NoError(t, err)
		v, err := server.Judge(t.Context(), m, reference.Float32, replies, conformance.JudgeOptions{Catalogue: []faults.Fault{}})
		require.NoError(t, err)
		assert.Equal(t, conformance.Fail, v.Word)
		assert.Contains(t, v.Reason, "leave out")
	})
}

// recording is what a real server said; see testdata/README.md.
type recording struct {
	Exchanges []struct {
		Method  string          `json:"method"`
		Path    string          `json:"path"`
		Request json.RawMessage `json:"request"`
		Status  int             `json:"status"`
		Type    string          `json:"type"`
		Answer  json.RawMessage `json:"answer"`
	} `json:"exchanges"`
}

// replay answers a request that is in the recording, field by field, and no other.
func replay(t *testing.T, file string) *httptest.Server {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	require.NoError(t, err)
	var r recording
	require.NoError(t, json.Unmarshal(text, &r))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		var body json.RawMessage
		if request.Method == http.MethodPost {
			assert.NoError(t, json.NewDecoder(request.Body).Decode(&body))
		}
		for _, e := range r.Exchanges {
			if e.Method != request.Method || e.Path != request.URL.Path || body != nil && !equalJSON(body, e.Request) {
				continue
			}
			w.Header().Set("Content-Type", e.Type)
			w.WriteHeader(e.Status)
			w.Write(e.Answer) //nolint:errcheck // the client notices
			return
		}
		t.Errorf("%s %s is not recorded: %.200s", request.Method, request.URL.Path, body)
		w.WriteHeader(http.StatusTeapot)
	}))
	t.Cleanup(s.Close)
	return s
}

func equalJSON(a, b []byte) bool {
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && assert.ObjectsAreEqual(x, y)
}

// TestLlamaServer: llama.cpp rounds activations to 8 bits in products with MXFP4
// weights. That is within what bfloat16 explains on toy, and far from float32.
func TestLlamaServer(t *testing.T) {
	m := toy(t)
	for p, want := range map[reference.Precision]conformance.Word{
		reference.BFloat16: conformance.Pass, reference.Float32: conformance.Fail,
	} {
		t.Run(string(p), func(t *testing.T) {
			c := client(t, replay(t, "llama-server-toy.json").URL, m.Config.VocabSize)
			replies, err := server.Ask(t.Context(), c, promptsNamed(t, "short", "other"), 16)
			require.NoError(t, err)
			assert.Contains(t, c.String(), "model toy.gguf, prompts as token ids")
			assert.Len(t, replies[0].Completion.Top[0], 5)
			v, err := server.Judge(t.Context(), m, p, replies, conformance.JudgeOptions{Catalogue: []faults.Fault{}})
			require.NoError(t, err)
			assert.Equal(t, want, v.Word, v.Reason)
		})
	}
}

func promptsNamed(t *testing.T, names ...string) []fixtures.Prompt {
	t.Helper()
	prompts, err := fixtures.Prompts("toy")
	require.NoError(t, err)
	var list []fixtures.Prompt
	for _, name := range names {
		at := slices.IndexFunc(prompts, func(p fixtures.Prompt) bool { return p.Name == name })
		require.GreaterOrEqual(t, at, 0)
		list = append(list, prompts[at])
	}
	return list
}

// TestLlamaServerOnCanary: llama.cpp rounds the bounds of YaRN's ramp to whole
// dimensions, as gpt-oss does not. canary says so itself, and the judge agrees. Three
// faults that are alike are enough of a catalogue to show that it can tell.
func TestLlamaServerOnCanary(t *testing.T) {
	m, prompts := canary(t)
	replies, err := server.Ask(t.Context(), client(t, replay(t, "llama-server-canary.json").URL, m.Config.VocabSize), prompts, 8)
	require.NoError(t, err)
	assert.Equal(t, " fail: rope-truncated-bounds", replies[0].Completion.Text)
	var catalogue []faults.Fault
	for _, id := range []string{"rope-no-yarn", "rope-truncated-bounds", "rope-no-concentration"} {
		f, ok := faults.ByID(id)
		require.True(t, ok)
		catalogue = append(catalogue, f)
	}
	v, err := server.Judge(t.Context(), m, reference.BFloat16, replies, conformance.JudgeOptions{Catalogue: catalogue})
	require.NoError(t, err)
	assert.Equal(t, conformance.Fail, v.Word)
	assert.Equal(t, "rope-truncated-bounds", v.Diagnosis.ID())
}

func canary(t *testing.T) (*checkpoint.Model, []fixtures.Prompt) {
	t.Helper()
	dir, err := fixtures.Expanded(t.Context(), fixtures.Dir("canary"), t.TempDir())
	require.NoError(t, err)
	m, err := checkpoint.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	prompts, err := server.Prompts(m)
	require.NoError(t, err)
	require.Len(t, prompts, 1)
	require.Equal(t, "self-test", prompts[0].Name)
	return m, prompts
}

// TestConfidentAnswers: the log-probability of an answer that is all but certain is
// near 0, and what float32 makes of a probability near 1 is large beside it. A server
// is not wrong for that.
func TestConfidentAnswers(t *testing.T) {
	m := *toy(t)
	m.FinalNorm = slices.Clone(m.FinalNorm)
	for i := range m.FinalNorm {
		m.FinalNorm[i] *= 120
	}
	s := serve(t, reference.New(&m, reference.Single()), func(_ asked, list []generated) any {
		var content []object
		for _, g := range list {
			content = append(content, object{"id": g.id, "logprob": math.Log(float64(float32(math.Exp(g.log[g.id]))))})
		}
		return object{"choices": []object{{"text": "?", "finish_reason": "length", "logprobs": object{"content": content}}}}
	})
	replies, err := server.Ask(t.Context(), client(t, s.URL, m.Config.VocabSize), promptsNamed(t, "short"), 1)
	require.NoError(t, err)
	require.Greater(t, replies[0].Completion.LogProbs[0], -1e-6)
	v, err := server.Judge(t.Context(), &m, reference.Float32, replies, conformance.JudgeOptions{Catalogue: []faults.Fault{}})
	require.NoError(t, err)
	assert.NotEqual(t, conformance.Fail, v.Word, v.Reason)
}

// TestTransformersServe: it takes nothing but text, and then gives no
// log-probabilities.
func TestTransformersServe(t *testing.T) {
	m, prompts := canary(t)
	c, err := server.NewClient(server.Options{URL: replay(t, "transformers-serve.json").URL, Model: "canary"}, m.Config.VocabSize)
	require.NoError(t, err)
	_, err = server.Ask(t.Context(), c, prompts, 8)
	assert.ErrorContains(t, err, `gives no log-probabilities, by which it could be judged; it said "pass`)
	assert.Contains(t, c.String(), "prompts as text")
}

// TestPromptsSuitTheCheckpoint: each fixture is recognized, and anything else gets
// prompts that are longer than the window.
func TestPromptsSuitTheCheckpoint(t *testing.T) {
	m := toy(t)
	prompts, err := server.Prompts(m)
	require.NoError(t, err)
	assert.Len(t, prompts, 6)
	m.FinalNorm = slices.Clone(m.FinalNorm)
	m.FinalNorm[0]++
	prompts, err = server.Prompts(m)
	require.NoError(t, err)
	assert.Len(t, prompts, 2)
	for _, p := range prompts {
		assert.Len(t, p.Tokens, m.Config.SlidingWindow+8)
		assert.NoError(t, reference.CheckTokens(m.Config, p.Tokens))
	}

	dir, err := fixtures.Expanded(t.Context(), fixtures.Dir("capitals"), t.TempDir())
	require.NoError(t, err)
	capitals, err := checkpoint.Open(dir)
	require.NoError(t, err)
	defer capitals.Close()
	prompts, err = server.Prompts(capitals)
	require.NoError(t, err)
	assert.Len(t, prompts, 5)
}

// TestImplementation: the suite is told what a server lacks, and what it can do.
func TestImplementation(t *testing.T) {
	s := serve(t, reference.New(toy(t), reference.Single()), vllm)
	implementation := server.New("it", reference.Float32, fixtures.HuggingFaceDir("toy"), server.Options{URL: s.URL})
	_, err := implementation.Open(t.Context(), fixtures.Dir("edge"))
	assert.ErrorIs(t, err, errors.ErrUnsupported)
	instance, err := implementation.Open(t.Context(), fixtures.Dir("toy"))
	require.NoError(t, err)
	defer instance.Close()
	_, err = instance.Forward(t.Context(), []int32{1})
	assert.ErrorIs(t, err, errors.ErrUnsupported)
	_, taps := instance.(conformance.Tapper)
	_, decodes := instance.(conformance.Decoder)
	assert.False(t, taps || decodes)

	g, err := instance.(*server.Instance).Generate(t.Context(), []int32{1, 2, 3}, 4)
	require.NoError(t, err)
	v, err := conformance.JudgeGreedy(t.Context(), toy(t), []int32{1, 2, 3}, g, conformance.JudgeOptions{Catalogue: []faults.Fault{}})
	require.NoError(t, err)
	assert.Equal(t, conformance.Partial, v.Word) // three tokens see no window
	assert.Len(t, g.Tokens, 4)
}

func TestAddresses(t *testing.T) {
	for given, want := range map[string]string{
		"http://a:1":                 "http://a:1/v1/completions",
		"http://a:1/":                "http://a:1/v1/completions",
		"https://a/v1":               "https://a/v1/completions",
		"https://a/v1/":              "https://a/v1/completions",
		"https://a/b/v1/completions": "https://a/b/v1/completions",
		"http://me:secret@a":         "http://me:xxxxx@a/v1/completions",
	} {
		c, err := server.NewClient(server.Options{URL: given}, 10)
		require.NoError(t, err)
		address, _, _ := strings.Cut(c.String(), ",")
		assert.Equal(t, want, address)
	}
	for _, bad := range []string{"", "localhost:8080", "ftp://a", "http://", "http://a/?b=c", "http://[", "http://a b"} {
		_, err := server.NewClient(server.Options{URL: bad}, 10)
		assert.Error(t, err, bad)
	}
}
