package main

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

func runGenerate(t *testing.T, arguments ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), []*cobra.Command{generateCommand()}, append([]string{"generate"}, arguments...), &out, &errs)
	return status, out.String(), errs.String()
}

func TestGenerateRefusesBadInput(t *testing.T) {
	toy := fixtures.Dir("toy")
	for _, test := range []struct {
		name      string
		arguments []string
		says      string
	}{
		{"nothing", nil, "prompt"},
		{"no model", []string{"--prompt", "a"}, "--checkpoint PATH"},
		{"two models", []string{"--prompt", "a", "--checkpoint", toy, "--onnx", "m.onnx"}, "exclude"},
		{"graph without configuration", []string{"--prompt", "a", "--onnx", "m.onnx"}, "--config"},
		{"gate bias of a graph", []string{"--prompt", "a", "--onnx", "m.onnx", "--config", toy, "--undo-gate-bias"}, "--undo-gate-bias goes with --checkpoint"},
		{"unknown operators", []string{"--prompt", "a", "--checkpoint", toy, "--backend", "onnxruntime", "--operators", "all"}, "--operators: \"all\""},
		{"operators of nothing", []string{"--prompt", "a", "--checkpoint", toy, "--operators", "portable"}, "--operators goes with"},
		{"empty prompt", []string{"--prompt", "", "--checkpoint", toy}, "--prompt is empty"},
		{"unknown special token", []string{"--prompt", "a<|stop|>", "--checkpoint", toy}, `"<|stop|>" is no special token`},
		{"unknown stop token", []string{"--prompt", "a", "--checkpoint", toy, "--stop", "<|halt|>"}, `"<|halt|>"`},
		{"empty stop", []string{"--prompt", "a", "--checkpoint", toy, "--stop", ""}, "--stop is empty"},
		{"vocabulary that does not fit", []string{"--prompt", "a", "--checkpoint", toy}, "vocabulary of 256"},
		{"missing checkpoint", []string{"--prompt", "a", "--checkpoint", "/no/such"}, "/no/such"},
		{"missing graph", []string{"--prompt", "a", "--onnx", "/no/such.onnx", "--config", toy}, "/no/such.onnx"},
		{"missing configuration", []string{"--prompt", "a", "--onnx", "m.onnx", "--config", "/no/such"}, "/no/such"},
		{"temperature", []string{"--prompt", "a", "--checkpoint", toy, "--temperature=-1"}, "--temperature"},
		{"temperature that is no number", []string{"--prompt", "a", "--checkpoint", toy, "--temperature", "NaN"}, "--temperature"},
		{"top-p", []string{"--prompt", "a", "--checkpoint", toy, "--top-p", "0"}, "--top-p"},
		{"max-tokens", []string{"--prompt", "a", "--checkpoint", toy, "--max-tokens", "0"}, "--max-tokens"},
		{"effort", []string{"--prompt", "a", "--checkpoint", toy, "--chat", "--effort", "huge"}, "huge"},
		{"precision", []string{"--prompt", "a", "--checkpoint", toy, "--precision", "float8"}, "float8"},
		{"precision of the other backend", []string{"--prompt", "a", "--checkpoint", toy, "--precision", "float16"}, "onnxruntime"},
		{"backend", []string{"--prompt", "a", "--checkpoint", toy, "--backend", "abacus"}, "abacus"},
		{"developer without chat", []string{"--prompt", "a", "--checkpoint", toy, "--developer", "b"}, "--chat"},
		{"functions of a reference", []string{"--prompt", "a", "--checkpoint", toy, "--expand-functions"}, "--expand-functions"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, stdout, stderr := runGenerate(t, test.arguments...)
			assert.Equal(t, exitInput, status)
			assert.Empty(t, stdout)
			assert.Contains(t, stderr, test.says)
			assert.Equal(t, 1, strings.Count(stderr, "\n"), "one line: %q", stderr)
		})
	}
}

// printed feeds the tokens of a reply to a printer.
func printed(t *testing.T, o generateOptions, reply string) (stdout, stderr string, done bool, err error) {
	t.Helper()
	ids, err := tokenizer.EncodeSpecial(reply)
	require.NoError(t, err)
	s, err := parseStops(o.stop)
	require.NoError(t, err)
	var out, errs bytes.Buffer
	p := newPrinter(o, s, &out, &errs)
	for i, id := range ids {
		if done, err = p.token(id); err != nil {
			return out.String(), errs.String(), done, err
		}
		if done {
			assert.Equal(t, len(ids)-1, i, "stopped early")
			break
		}
	}
	err = p.close()
	return out.String(), errs.String(), done, err
}

func TestPrinter(t *testing.T) {
	for name, test := range map[string]struct {
		options        generateOptions
		reply          string
		stdout, stderr string
		done           bool
	}{
		"plain":               {generateOptions{}, " Paris<|return|>", " Paris\n", "", true},
		"plain, cut off":      {generateOptions{}, " Paris", " Paris\n", "", false},
		"plain, end":          {generateOptions{}, "a<|end|>", "a\n", "", true},
		"plain, call":         {generateOptions{}, "a<|call|>", "a\n", "", true},
		"special as text":     {generateOptions{}, "<|channel|>x", "<|channel|>x\n", "", false},
		"stop text":           {generateOptions{stop: []string{"STOP"}}, "one STOP", "one \n", "", true},
		"half a stop text":    {generateOptions{stop: []string{"wonder"}}, "one won", "one won\n", "", false},
		"stop token":          {generateOptions{stop: []string{"<|message|>"}}, "a<|message|>", "a\n", "", true},
		"object":              {generateOptions{}, ` {"text": "Paris"}<|return|>`, "Paris\n", "", true},
		"object, raw":         {generateOptions{raw: true}, `{"text": "Paris"}<|return|>`, "{\"text\": \"Paris\"}\n", "", true},
		"object, escapes":     {generateOptions{}, `{ "text" : "a\n\"b\" é" }`, "a\n\"b\" é\n", "", false},
		"object, cut off":     {generateOptions{}, `{"text": "Par`, "Par\n", "", false},
		"object, no text":     {generateOptions{}, `{"name": "Paris"}`, "{\"name\": \"Paris\"}\n", "", false},
		"chat":                {generateOptions{chat: true}, "<|channel|>final<|message|>Paris<|return|>", "Paris\n", "", true},
		"chat, end":           {generateOptions{chat: true}, "<|channel|>final<|message|>Paris<|end|>", "Paris\n", "", true},
		"chat, object":        {generateOptions{chat: true}, `<|channel|>final<|message|>{"text": "Paris"}<|return|>`, "Paris\n", "", true},
		"chat, thought first": {generateOptions{chat: true}, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Paris<|return|>", "Paris\n", "Hm.\n", true},
		"chat, call":          {generateOptions{chat: true}, `<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>`, "functions.f({\"a\": 1})\n", "", true},
		"chat, cut off":       {generateOptions{chat: true}, "<|channel|>final<|message|>Par", "Par\n", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, done, err := printed(t, test.options, test.reply)
			require.NoError(t, err)
			assert.Equal(t, test.stdout, stdout)
			assert.Equal(t, test.stderr, stderr)
			assert.Equal(t, test.done, done)
		})
	}
}

func TestBrokenChatIsAnError(t *testing.T) {
	for _, reply := range []string{"<|channel|>final<|start|>", "<|channel|>final", "<|channel|>analysis<|message|>a<|end|>no start"} {
		_, _, _, err := printed(t, generateOptions{chat: true}, reply)
		assert.ErrorContains(t, err, "harmony", reply)
	}
}

func TestSampler(t *testing.T) {
	logits := []float32{1, 3, 2, 3, float32(math.Inf(-1))}
	greedy, err := newSampler(0, 1, 0).pick(logits)
	require.NoError(t, err)
	assert.Equal(t, int32(1), greedy, "of equal logits the lowest id")

	draw := func(temperature, topP float64, seed uint64) map[int32]int {
		counts := map[int32]int{}
		s := newSampler(temperature, topP, seed)
		for range 4000 {
			id, err := s.pick(logits)
			require.NoError(t, err)
			counts[id]++
		}
		return counts
	}
	assert.Equal(t, draw(1, 1, 7), draw(1, 1, 7), "the same seed gives the same tokens")
	assert.NotEqual(t, draw(1, 1, 7), draw(1, 1, 8))
	// exp(1), exp(3), exp(2), exp(3) and 0, over their sum.
	weights := []float64{math.E, math.Exp(3), math.Exp(2), math.Exp(3), 0}
	var total float64
	for _, w := range weights {
		total += w
	}
	counts := draw(1, 1, 7)
	for id, w := range weights {
		p := w / total
		// Five standard deviations of 4000 draws.
		assert.InDelta(t, 4000*p, float64(counts[int32(id)]), 5*math.Sqrt(4000*p*(1-p))+1e-9, "id %d", id)
	}
	// The two likeliest have 0.8 of the probability.
	for id := range draw(1, 0.79, 7) {
		assert.Contains(t, []int32{1, 3}, id)
	}
	assert.Len(t, draw(1, 1e-9, 7), 1)

	for _, broken := range []float32{float32(math.NaN()), float32(math.Inf(1))} {
		_, err := newSampler(0, 1, 0).pick([]float32{0, broken})
		assert.ErrorContains(t, err, "id 1")
	}
	padded := make([]float32, tokenizer.VocabSize+10)
	padded[tokenizer.VocabSize+3] = 9
	id, err := newSampler(0, 1, 0).pick(padded)
	require.NoError(t, err)
	assert.Zero(t, id, "no id beyond the tokenizer's")
}

func TestGenerateAnswers(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("GPTOSS_CACHE", cache)
	capitals := fixtures.Dir("capitals")
	for _, test := range []struct {
		arguments []string
		want      string
	}{
		{[]string{"--prompt", "France capital? Answer:"}, " Paris\n"},
		{[]string{"--prompt", "Japan capital? Answer:", "--precision", "bfloat16"}, " Tokyo\n"},
		{[]string{"--prompt", "France capital? JSON:"}, "Paris\n"},
		{[]string{"--prompt", "Italy capital?", "--chat"}, "Rome\n"},
		{[]string{"--prompt", "France capital? Reply as JSON.", "--chat"}, "Paris\n"},
		{[]string{"--prompt", "France capital? Reply as JSON.", "--chat", "--raw"}, "{\"text\": \"Paris\"}\n"},
		{[]string{"--prompt", "France capital? Answer:", "--temperature", "1", "--top-p", "0.5", "--seed", "3"}, " Paris\n"},
	} {
		status, stdout, stderr := runGenerate(t, append([]string{"--checkpoint", capitals}, test.arguments...)...)
		require.Zero(t, status, stderr)
		assert.Equal(t, test.want, stdout, "%v", test.arguments)
		assert.Contains(t, stderr, "tokens per second")
	}
	expanded, err := os.ReadDir(filepath.Join(cache, "expanded"))
	require.NoError(t, err)
	assert.Len(t, expanded, 1, "the checkpoint is expanded once")
}

// Every kind of graph must say what the reference says: with a cache, without,
// and of fixed length, in which every token is another run over the whole.
func TestGraphsAnswer(t *testing.T) {
	cache := t.TempDir()
	capitals := fixtures.Dir("capitals")
	expanded, err := fixtures.Expanded(t.Context(), capitals, cache)
	require.NoError(t, err)
	model, err := checkpoint.Open(expanded)
	require.NoError(t, err)
	defer model.Close()
	for name, options := range map[string]exporter.Options{
		"dynamic":      {},
		"cache":        {KVCache: true},
		"last logits":  {LastLogitsOnly: true},
		"fixed length": {SequenceLength: 20},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "capitals.onnx")
			require.NoError(t, exporter.Export(t.Context(), model, path, options))
			status, stdout, stderr := runGenerate(t, "--onnx", path, "--config", capitals, "--prompt", "France capital? Answer:")
			require.Zero(t, status, stderr)
			assert.Equal(t, " Paris\n", stdout)
			if options.SequenceLength == 0 {
				return
			}
			long := strings.Repeat("France capital? ", 10)
			status, _, stderr = runGenerate(t, "--onnx", path, "--config", capitals, "--prompt", long)
			assert.Equal(t, exitInput, status)
			assert.Contains(t, stderr, "fixed length 20")
			assert.Equal(t, 1, strings.Count(stderr, "\n"))
			d, err := openGraph(t.Context(), path, capitals)
			require.NoError(t, err)
			defer d.Close()
			_, err = d.next(t.Context(), make([]int32, 20))
			require.NoError(t, err)
			_, err = d.next(t.Context(), []int32{1})
			require.ErrorIs(t, err, errGraphFull)
			assert.ErrorContains(t, err, "20 tokens")
			status, _, stderr = runGenerate(t, "--onnx", path, "--config", fixtures.Dir("toy"), "--prompt", "a")
			assert.Equal(t, exitInput, status)
			assert.Contains(t, stderr, "vocabulary of 256")
		})
	}
	for _, flags := range [][]string{nil, {"--expand-functions"}, {"--operators", "portable"}, {"--precision", "bfloat16"}, {"--precision", "float16", "--operators", "portable"}} {
		status, stdout, stderr := runGenerate(t, append([]string{"--checkpoint", expanded, "--backend", "onnxruntime", "--prompt", "France capital? Answer:"}, flags...)...)
		require.Zero(t, status, stderr)
		assert.Equal(t, " Paris\n", stdout)
	}
}

// A graph that is exported to be run at once continues from its cache: it is given
// the tokens that it has not seen, whatever its operators are.
func TestExportedGraphDecodesFromItsCache(t *testing.T) {
	dir, err := fixtures.Expanded(t.Context(), fixtures.Dir("capitals"), t.TempDir())
	require.NoError(t, err)
	for want, operators := range map[exporter.Operators]string{
		exporter.OperatorsONNXRuntime: "", exporter.OperatorsPortable: "portable",
	} {
		d, err := openDecoder(t.Context(), generateOptions{
			checkpoint: dir, backend: backendONNXRuntime, precision: "float32", operators: operators, read: &checkpoint.Options{},
		}, io.Discard)
		require.NoError(t, err)
		graph, ok := d.(*graphDecoder)
		require.True(t, ok)
		require.NotNil(t, graph.decoding)
		properties, err := graph.session.Metadata()
		require.NoError(t, err)
		assert.Equal(t, string(want), properties["gptoss.operators"])
		_, err = d.next(t.Context(), []int32{1, 2, 3})
		require.NoError(t, err)
		_, err = d.next(t.Context(), []int32{4})
		require.NoError(t, err)
		assert.Equal(t, 4, graph.decoding.Length())
		require.NoError(t, d.Close())
	}
}

// BenchmarkDecode times one more token behind contexts of several lengths, on a
// model whose layers all have a window: the time must not grow with the context.
func BenchmarkDecode(b *testing.B) {
	dir, err := fixtures.Expanded(b.Context(), fixtures.Dir("capitals"), b.TempDir())
	require.NoError(b, err)
	for name, windowed := range map[string]bool{"windows": true, "as it is": false} {
		for _, context := range []int{64, 512, 4096} {
			b.Run(fmt.Sprintf("%s/%d", name, context), func(b *testing.B) {
				model, err := checkpoint.Open(dir)
				require.NoError(b, err)
				defer model.Close()
				if windowed {
					for i := range model.Config.Sliding {
						model.Config.Sliding[i] = true
					}
				}
				d := newReferenceDecoder(model, reference.Single())
				tokens := make([]int32, context)
				_, err = d.next(b.Context(), tokens)
				require.NoError(b, err)
				for b.Loop() {
					_, err = d.next(b.Context(), tokens[:1])
					require.NoError(b, err)
				}
			})
		}
	}
}
