package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// answered is a golden of tools/oracles/tokens/answers.py: what torch says.
type answered struct {
	Name     string    `json:"name"`
	Prompt   []int32   `json:"prompt"`
	Tokens   []int32   `json:"tokens"`  // greedy, in float32
	Margins  []float64 `json:"margins"` // of each token over the second, in float32
	BFloat16 []int32   `json:"torch bfloat16"`
	Right    bool      `json:"right"`
}

func readAnswered(t *testing.T, fixture string) []answered {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "golden", "answers", fixture+".json"))
	require.NoError(t, err)
	var file struct {
		About struct{ SHA256 string }
		Cases []answered
	}
	require.NoError(t, json.Unmarshal(text, &file))
	weights, err := os.ReadFile(filepath.Join(fixtures.Dir(fixture), fixtures.WeightsFile))
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("%x", sha256.Sum256(weights)), file.About.SHA256, "the answers are those of another model: see tools/oracles/tokens/answers.py")
	return file.Cases
}

// smallModel opens a trained fixture over the rows that it stores.
func smallModel(t *testing.T, fixture string) (*checkpoint.Model, vocabularyRows) {
	t.Helper()
	dir, err := fixtures.Expanded(t.Context(), fixtures.Dir(fixture), t.TempDir())
	require.NoError(t, err)
	weights, err := checkpoint.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, weights.Close()) })
	rows, err := usedRows(fixture, weights.Config.VocabSize)
	require.NoError(t, err)
	return rows.model(weights), rows
}

func TestQuestionsAreTheTokensThatTorchWasAsked(t *testing.T) {
	for _, fixture := range []string{"capitals", "canary"} {
		questions, err := fixtures.Questions(fixture)
		require.NoError(t, err)
		golden := readAnswered(t, fixture)
		require.Len(t, golden, len(questions))
		for i, q := range questions {
			prompt, answer, err := q.Tokens()
			require.NoError(t, err)
			assert.Equal(t, golden[i].Prompt, prompt, q.Name)
			assert.Equal(t, golden[i].Right, slices.Equal(golden[i].Tokens, answer), q.Name)
		}
	}
}

func TestReferenceSaysWhatTorchSays(t *testing.T) {
	for fixture, step := range map[string]int{"capitals": 7, "canary": 1} {
		weights, rows := smallModel(t, fixture)
		golden := readAnswered(t, fixture)
		end := rows.of([]int32{tokenizer.Return})[0]
		for i := 0; i < len(golden); i += step {
			g := golden[i]
			// Torch's float32 logits and ours differ by about 1e-4 here.
			if slices.Min(g.Margins) < 1e-2 {
				t.Logf("%s: left out, torch's own margin is %g", g.Name, slices.Min(g.Margins))
				continue
			}
			said, _, err := greedy(t.Context(), reference.New(weights, reference.Single()), asked{prompt: rows.of(g.Prompt)}, end)
			require.NoError(t, err)
			assert.Equal(t, rows.of(g.Tokens), said, "%s: torch says %q, the reference %q", g.Name, rows.text(rows.of(g.Tokens)), rows.text(said))
		}
	}
}

func TestCanary(t *testing.T) {
	weights, rows := smallModel(t, "canary")
	questions, err := fixtures.Questions("canary")
	require.NoError(t, err)
	prompt, answer, err := questions[0].Tokens()
	require.NoError(t, err)
	require.GreaterOrEqual(t, len(prompt), 30)
	require.LessOrEqual(t, len(prompt), 120)
	require.Greater(t, len(prompt), weights.Config.SlidingWindow)
	question := []asked{{rows.of(prompt), rows.of(answer)}}

	right := ask(t.Context(), reference.New(weights, reference.Single()), rows, question)
	assert.Equal(t, " pass<|return|>", right.said)
	short := ask(t.Context(), reference.New(weights, reference.Short(reference.BFloat16.Format())), rows, question)
	assert.Equal(t, " pass<|return|>", short.said)
	assert.Greater(t, min(right.margin, short.margin), 1.0, "a wide margin")

	trained, err := trainedFaults("canary")
	require.NoError(t, err)
	require.NotEmpty(t, trained)
	for _, id := range trained {
		fault, found := faults.ByID(id)
		require.True(t, found, id)
		said := ask(t.Context(), faults.Apply(fault, reference.New(weights, reference.Single())), rows, question)
		assert.NotEqual(t, verdictPass, said.verdict(id), "%s is not noticed", id)
	}
}

func TestFaultsChangeWhatCapitalsSays(t *testing.T) {
	weights, rows := smallModel(t, "capitals")
	questions, err := fixtures.Questions("capitals")
	require.NoError(t, err)
	var some []asked
	for i := 0; i < len(questions); i += 11 {
		prompt, answer, err := questions[i].Tokens()
		require.NoError(t, err)
		some = append(some, asked{rows.of(prompt), rows.of(answer)})
	}
	right := ask(t.Context(), reference.New(weights, reference.Single()), rows, some)
	assert.GreaterOrEqual(t, right.right, len(some)*9/10)
	for _, id := range []string{"sinks-dropped", "window-ignored", "swiglu-no-clamp", "softmax-before-topk"} {
		fault, found := faults.ByID(id)
		require.True(t, found, id)
		wrong := ask(t.Context(), faults.Apply(fault, reference.New(weights, reference.Single())), rows, some)
		assert.Less(t, wrong.right, right.right, id)
	}
}
