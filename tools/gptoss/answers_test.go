package main

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/fixtures/vocabulary"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// smallModel opens a trained fixture over the rows that it stores.
func smallModel(t *testing.T, fixture string) (*checkpoint.Model, vocabulary.Rows) {
	t.Helper()
	dir, err := fixtures.Expanded(t.Context(), fixtures.Dir(fixture), t.TempDir())
	require.NoError(t, err)
	weights, err := checkpoint.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, weights.Close()) })
	rows, err := vocabulary.Used(fixture, weights.Config.VocabSize)
	require.NoError(t, err)
	small, err := rows.Model(weights)
	require.NoError(t, err)
	return small, rows
}

func TestQuestionsAreTheTokensThatTorchWasAsked(t *testing.T) {
	for _, fixture := range []string{"capitals", "canary"} {
		questions, err := fixtures.Questions(fixture)
		require.NoError(t, err)
		answered, err := golden.Answers(fixture)
		require.NoError(t, err)
		require.Len(t, answered, len(questions))
		for i, q := range questions {
			prompt, answer, err := q.Tokens()
			require.NoError(t, err)
			assert.Equal(t, answered[i].Prompt, prompt, q.Name)
			assert.Equal(t, answered[i].Right, slices.Equal(answered[i].Tokens, answer), q.Name)
		}
	}
}

func TestReferenceSaysWhatTorchSays(t *testing.T) {
	for fixture, step := range map[string]int{"capitals": 7, "canary": 1} {
		weights, rows := smallModel(t, fixture)
		answered, err := golden.Answers(fixture)
		require.NoError(t, err)
		end := rows.Of([]int32{tokenizer.Return})[0]
		for i := 0; i < len(answered); i += step {
			g := answered[i]
			// Torch's float32 logits and ours differ by about 1e-4 here.
			if slices.Min(g.Margins) < 1e-2 {
				t.Logf("%s: left out, torch's own margin is %g", g.Name, slices.Min(g.Margins))
				continue
			}
			said, _, err := greedy(t.Context(), reference.New(weights, reference.Single()), rows.Of(g.Prompt), nil, end)
			require.NoError(t, err)
			assert.Equal(t, rows.Of(g.Tokens), said, "%s: torch says %q, the reference %q", g.Name, rows.Text(rows.Of(g.Tokens)), rows.Text(said))
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
	question := []asked{{rows.Of(prompt), rows.Of(answer)}}

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
		some = append(some, asked{rows.Of(prompt), rows.Of(answer)})
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
