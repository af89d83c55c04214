package conformance_test

import (
	"context"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/fixtures/vocabulary"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// trainedModel is a trained fixture over the rows that it stores, with what torch
// says to its questions, in row numbers.
type trainedModel struct {
	weights *checkpoint.Model
	rows    vocabulary.Rows
	answers []golden.Answer
}

func openTrained(t *testing.T, fixture string) trainedModel {
	t.Helper()
	dir, err := fixtures.Expanded(t.Context(), fixtures.Dir(fixture), t.TempDir())
	require.NoError(t, err)
	all, err := checkpoint.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, all.Close()) })
	m := trainedModel{}
	m.rows, err = vocabulary.Used(fixture, all.Config.VocabSize)
	require.NoError(t, err)
	m.weights, err = m.rows.Model(all)
	require.NoError(t, err)
	m.answers, err = golden.Answers(fixture)
	require.NoError(t, err)
	for i, a := range m.answers {
		m.answers[i].Prompt, m.answers[i].Tokens = m.rows.Of(a.Prompt), m.rows.Of(a.Tokens)
	}
	return m
}

// step takes the next tokens of a sequence and returns the logits [vocab] behind
// the last.
type step func(ctx context.Context, tokens []int32) ([]float64, error)

// speaker starts sequences.
type speaker func() (next step, end func() error, err error)

// referenceSpeaker decodes with the Go reference's KV cache.
func referenceSpeaker[F reference.Float](m reference.Model[F]) speaker {
	return func() (step, func() error, error) {
		cache := new(reference.Cache[F])
		vocab := m.Weights.Config.VocabSize
		next := func(ctx context.Context, tokens []int32) ([]float64, error) {
			logits, err := m.Forward(ctx, tokens, cache, reference.Observer[F]{})
			if err != nil {
				return nil, err
			}
			last := make([]float64, vocab)
			for i, v := range logits[len(logits)-vocab:] {
				last[i] = float64(v)
			}
			return last, nil
		}
		return next, func() error { return nil }, nil
	}
}

// graphSpeaker exports the model and decodes with the graph's KV cache. A graph
// without one is run again over everything, for every token.
func graphSpeaker(t *testing.T, m *checkpoint.Model, o exporter.Options) speaker {
	t.Helper()
	path := filepath.Join(t.TempDir(), "model.onnx")
	o.LastLogitsOnly = true
	require.NoError(t, exporter.Export(t.Context(), m, path, o))
	session, err := onnxruntime.Open(path, onnxruntime.Options{Threads: 1})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, session.Close()) })
	return func() (step, func() error, error) {
		if !session.HasCache() {
			var all []int32
			return func(ctx context.Context, tokens []int32) ([]float64, error) {
				all = append(all, tokens...)
				out, err := session.RunTaps(ctx, all, []string{taps.Logits})
				if err != nil {
					return nil, err
				}
				return lastRow(out[taps.Logits], len(all), m.Config.VocabSize)
			}, func() error { return nil }, nil
		}
		decoding, err := session.Decode()
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context, tokens []int32) ([]float64, error) {
			out, err := decoding.Step(ctx, tokens)
			if err != nil {
				return nil, err
			}
			return lastRow(out, len(tokens), m.Config.VocabSize)
		}, decoding.Close, nil
	}
}

// lastRow takes the last position's logits; a graph may put out those alone.
func lastRow(logits tensor.Tensor, tokens, vocab int) ([]float64, error) {
	values, err := logits.Float64s()
	if err != nil {
		return nil, err
	}
	if len(values) != vocab && len(values) != tokens*vocab {
		return nil, fmt.Errorf("logits of shape %v for %d tokens and a vocabulary of %d", logits.Shape, tokens, vocab)
	}
	return values[len(values)-vocab:], nil
}

// say decodes greedily until the model returns, or for as long as limit.
func say(ctx context.Context, s speaker, prompt []int32, end int32, limit int) (said []int32, err error) {
	next, done, err := s()
	if err != nil {
		return nil, err
	}
	defer func() {
		if closing := done(); err == nil {
			err = closing
		}
	}()
	for tokens := prompt; len(said) < limit && !slices.Contains(said, end); tokens = said[len(said)-1:] {
		logits, err := next(ctx, tokens)
		if err != nil {
			return said, err
		}
		for _, v := range logits {
			if math.IsNaN(v) {
				return said, fmt.Errorf("a logit behind token %d of the answer is NaN", len(said))
			}
		}
		said = append(said, reference.TopK(logits, 1)[0])
	}
	return said, nil
}

// answerLimit is what torch was allowed.
const answerLimit = 24

// allQuestions makes everything answer every question of capitals: minutes, and so
// for the larger tiers (capitals_all_test.go).
var allQuestions = false

// decidedMargin is how far torch's logit must lead for rounding not to change the
// choice.
//
// A block rounds 14 times in a row (norm, q and k, rotation, scores, their
// exponentials, the sum over values, projection, residual sum; norm, the first
// layer, activation, the second, the experts' sum, residual sum), and the model
// twice more. Each moves a value by u/√3 of itself in rms (a uniform error up to
// the unit roundoff u), independently: together √(14·layers + 2)·u/√3. In
// float32 each of them is also a sum of up to n terms that rounds at every term,
// √n times as much; the 16-bit formats sum in float32. Errors of that size,
// relative, move a logit by as much of what logits typically are, their standard
// deviation over the vocabulary. The choice hangs on the difference of two logits
// in two runs, torch's and the subject's, √4 as much, and three standard
// deviations of it count as explained.
func decidedMargin(c config.Config, p reference.Precision, deviation float64) float64 {
	terms := 1
	if p == reference.Float32 {
		terms = max(c.HiddenSize, c.IntermediateSize, c.Heads*c.HeadDim)
	}
	roundings := float64(14*c.Layers + 2)
	return 3 * math.Sqrt(4*roundings*float64(terms)/3) * p.Format().UnitRoundoff() * deviation
}

// deviationOf returns the logits' standard deviation over the vocabulary.
func deviationOf(logits []float64) float64 {
	var sum, squares float64
	for _, v := range logits {
		sum += v
		squares += v * v
	}
	n := float64(len(logits))
	return math.Sqrt(squares/n - sum/n*sum/n)
}

// answersFinding compares what a speaker says to every n-th question with what
// torch says. Up to the first token that differs both have read the same; that
// one must be a choice that torch made by less than decided.
func (m trainedModel) answersFinding(t *testing.T, s speaker, every int, decided float64) conformance.Finding {
	t.Helper()
	f := conformance.Finding{Tap: taps.Logits, Stage: conformance.StageGeneration, Method: conformance.Golden, Verdict: conformance.Pass}
	end := m.rows.Of([]int32{tokenizer.Return})[0]
	asked, same, near := 0, 0, 0
	for i := 0; i < len(m.answers); i += every {
		a := m.answers[i]
		said, err := say(t.Context(), s, a.Prompt, end, answerLimit)
		require.NoError(t, err, a.Name)
		asked++
		f.Of += len(a.Tokens)
		if slices.Min(a.Margins) < decided {
			near++
			t.Logf("%s: torch's own margin is %.3g, and rounding decides below %.3g", a.Name, slices.Min(a.Margins), decided)
		}
		if slices.Equal(said, a.Tokens) {
			same++
			continue
		}
		at := 0
		for at < len(said) && at < len(a.Tokens) && said[at] == a.Tokens[at] {
			at++
		}
		ratio := math.Inf(1) // one of them is the other's beginning: both stop by the same rule
		if at < len(said) && at < len(a.Tokens) {
			ratio = a.Margins[at] / decided
			f.Worst = &conformance.Worst{Index: []int{i, at}, Got: float64(m.rows[said[at]]), Want: float64(m.rows[a.Tokens[at]]), Bound: decided}
		}
		f.Ratio = max(f.Ratio, ratio)
		t.Logf("%s: says %q, torch %q; at token %d torch's margin is %.3g of what rounding explains", a.Name, m.rows.Text(said), m.rows.Text(a.Tokens), at, ratio)
		if ratio > 1 {
			f.Over++
			f.Verdict = conformance.Fail
		}
	}
	f.Reason = fmt.Sprintf("greedy tokens: %d of %d answers are torch's; in %d torch's own margin is below %.2g", same, asked, near, decided)
	t.Log(f.Reason)
	// Nothing is proved by answers that rounding decides.
	assert.Less(t, near*10, asked, "questions that rounding may decide")
	return f
}

// spoken is one way to run a trained model.
type spoken struct {
	name      string
	precision reference.Precision
	every     int  // in the default tier, every n-th question of capitals is asked; odd, as kinds of questions take turns in fours
	recorded  bool // it decodes with a KV cache and is a row of the report
	open      func(t *testing.T, m *checkpoint.Model) speaker
}

func allSpoken() []spoken {
	onnx := func(o exporter.Options) func(*testing.T, *checkpoint.Model) speaker {
		return func(t *testing.T, m *checkpoint.Model) speaker { return graphSpeaker(t, m, o) }
	}
	const single, short = reference.Float32, reference.BFloat16
	return []spoken{
		{"reference-float32", single, 1, true, func(_ *testing.T, m *checkpoint.Model) speaker {
			return referenceSpeaker(reference.New(m, reference.Single()))
		}},
		{"reference-bfloat16", short, 11, true, func(_ *testing.T, m *checkpoint.Model) speaker {
			return referenceSpeaker(reference.New(m, reference.Short(kernel.BFloat16)))
		}},
		{"onnxruntime-packed-cache", single, 5, true, onnx(exporter.Options{KVCache: true})},
		{"onnxruntime-dense-cache", single, 7, false, onnx(exporter.Options{KVCache: true, Experts: exporter.ExpertsDense})},
		{"onnxruntime-own-operators-cache", single, 7, false, onnx(exporter.Options{KVCache: true, Operators: exporter.OperatorsONNXRuntime})},
		{"onnxruntime-bfloat16-cache", short, 7, false, onnx(exporter.Options{KVCache: true, Precision: exporter.PrecisionBFloat16})},
		{"onnxruntime-packed", single, 31, false, onnx(exporter.Options{})},
		{"onnxruntime-dense", single, 31, false, onnx(exporter.Options{Experts: exporter.ExpertsDense})},
		{"onnxruntime-own-operators", single, 31, false, onnx(exporter.Options{Operators: exporter.OperatorsONNXRuntime})},
	}
}

// TestTrainedModels compares the greedy answers of the trained fixtures with
// torch's: of the reference to all questions, of everything else to a sample in
// the default tier and to all with -tags twolayer.
func TestTrainedModels(t *testing.T) {
	for _, fixture := range []string{"capitals", "canary"} {
		t.Run(fixture, func(t *testing.T) {
			m := openTrained(t, fixture)
			next, _, err := referenceSpeaker(reference.New(m.weights, reference.Single()))()
			require.NoError(t, err)
			logits, err := next(t.Context(), m.answers[0].Prompt)
			require.NoError(t, err)
			deviation := deviationOf(logits)
			for _, s := range allSpoken() {
				if allQuestions {
					s.every = 1
				}
				t.Run(s.name, func(t *testing.T) {
					f := m.answersFinding(t, s.open(t, m.weights), s.every, decidedMargin(m.weights.Config, s.precision, deviation))
					f.From = []string{"answers/" + fixture + ".json"}
					if f.Verdict != conformance.Pass {
						t.Errorf("%d answers differ from torch's by more than rounding explains", f.Over)
					}
					if s.recorded {
						recorder.Case(conformance.Case{
							Stage: conformance.StageGeneration, Implementation: s.name, Precision: s.precision, Fixture: fixture,
							Prompt: "questions", Verdict: f.Verdict, Findings: []conformance.Finding{f},
							Repeat: fmt.Sprintf("go test ./conformance -run 'TestTrainedModels/%s/%s'", fixture, s.name),
						})
					}
				})
			}
		})
	}
}

// TestCanaryNamesTheFault shows that the canary says ` pass` because of the right
// arithmetic, and not whatever runs it.
func TestCanaryNamesTheFault(t *testing.T) {
	m := openTrained(t, "canary")
	end := m.rows.Of([]int32{tokenizer.Return})[0]
	answer := func(s speaker) string {
		said, err := say(t.Context(), s, m.answers[0].Prompt, end, answerLimit)
		require.NoError(t, err)
		return m.rows.Text(said)
	}
	right := reference.New(m.weights, reference.Single())
	assert.Equal(t, " pass<|return|>", answer(referenceSpeaker(right)))
	for _, id := range []string{"window-one-too-many", "sinks-dropped", "rope-truncated-bounds"} {
		fault, found := faults.ByID(id)
		require.True(t, found, id)
		assert.Equal(t, " fail: "+id+"<|return|>", answer(referenceSpeaker(faults.Apply(fault, right))))
	}
	// The same fault in a graph.
	stages := exporter.Portable()
	visible := stages.Visible
	stages.Visible = func(s *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		if window > 0 {
			window++
		}
		return visible(s, queries, keys, window)
	}
	assert.Equal(t, " fail: window-one-too-many<|return|>", answer(graphSpeaker(t, m.weights, exporter.Options{Stages: &stages})))
}
