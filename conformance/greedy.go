package conformance

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Greedy is all that a text endpoint gives away: the tokens that it generated
// after a prompt, always the most likely one, and their log-probabilities.
type Greedy struct {
	Precision reference.Precision
	Tokens    []int32
	LogProbs  []float64
}

// Names under which a file holds a [Greedy].
const (
	GeneratedTokens   = "generated_tokens"   // [n] I32 or I64
	GeneratedLogProbs = "generated_logprobs" // [n] reals
)

// JudgeGreedy judges generated tokens and their log-probabilities.
//
// Every token must be the truth's most likely one, given the prompt and the
// subject's own tokens before it, or fall short of it by no more than rounding
// allows; and its log-probability must be the truth's, within the spread of
// perturbed runs. It returns an error only if the question makes no sense.
func JudgeGreedy(ctx context.Context, m *checkpoint.Model, prompt []int32, g Greedy, o JudgeOptions) (*Verdict, error) {
	if len(g.Tokens) == 0 || len(g.Tokens) != len(g.LogProbs) {
		return nil, fmt.Errorf("%d generated tokens with %d log-probabilities: there must be as many of both, and at least one", len(g.Tokens), len(g.LogProbs))
	}
	tokens := slices.Concat(prompt, g.Tokens[:len(g.Tokens)-1])
	for _, list := range [][]int32{prompt, tokens, g.Tokens} {
		if err := reference.CheckTokens(m.Config, list); err != nil {
			return nil, err
		}
	}
	if o.Samples == 0 {
		o.Samples = defaultSamples
	}
	if o.Catalogue == nil {
		o.Catalogue = faults.All()
	}
	subject := &observed{precision: g.Precision, roundoff: roundoffOf(g.Precision.Format()), names: []string{taps.Logits}}
	j := newJudging(ctx, o.Memory.densified(m), tokens, subject, o)
	v := &Verdict{Word: Pass}
	for i, p := range g.LogProbs {
		if math.IsNaN(p) || math.IsInf(p, 0) {
			v.Findings = []Finding{{
				Tap: taps.Logits, Stage: StageGeneration, Method: Form, Verdict: Fail, Ratio: math.Inf(1),
				Reason: fmt.Sprintf("the log-probability of generated token %d is %v", i, p),
			}}
			v.conclude()
			return v, nil
		}
	}
	if err := j.judgeGreedy(v, len(prompt)-1, g); err != nil {
		return nil, err
	}
	v.Unexercised = j.unexercised()
	v.conclude()
	var err error
	if v.Word == Fail && len(o.Catalogue) > 0 {
		v.Diagnosis, err = j.diagnoseRuns(v)
	}
	return v, err
}

// judgeGreedy fills in the findings. first is the position whose logits gave the
// first generated token.
func (j *judging) judgeGreedy(v *Verdict, first int, g Greedy) error {
	vocab := j.model.Weights.Config.VocabSize
	logProbs := func(logits []float64) []float64 {
		rows := len(logits)/vocab - first
		out := make([]float64, rows)
		for i := range rows {
			out[i] = logSoftmax(logits[(first+i)*vocab:][:vocab])[g.Tokens[i]]
		}
		return out
	}
	truth := j.free.real(taps.Logits)
	want := logProbs(truth)
	gates := map[string][]float64{}
	for layer := range j.model.Weights.Config.Layers {
		gate := taps.Block(layer, taps.GateLogits)
		gates[gate] = j.free.real(gate)
	}
	var s spread
	reach := make([]float64, len(want)) // how far any perturbed run moves a logit of the row
	spreads, err := spreadsOf(j.ctx, j.model.Weights, j.tokens, j.subject, nil, j.options.Samples, gates, func(run source) {
		logits := run.real(taps.Logits)
		s = s.including(rowErrorsOf(logProbs(logits), want, len(want)))
		reach = largest(reach, rowErrorsOf(logits[first*vocab:], truth[first*vocab:], len(want)).max)
	})
	if err != nil {
		return err
	}
	j.greedy = &outcome{
		name: "log-probabilities", first: first, width: 1, got: g.LogProbs, spread: s, loose: j.nearTies(spreads),
		of: func(e *evaluation[float64]) []float64 { return logProbs(e.real(taps.Logits)) }, needs: []string{taps.Logits},
	}
	f := Finding{Tap: taps.Logits, Stage: StageGeneration, Method: FreeRunning, From: []string{"tokens"}, Verdict: Pass}
	f.withinSpread([]int{len(want), 1}, g.LogProbs, want, s, j.greedy.loose)
	v.Findings = append(v.Findings, f, j.greedyChoices(first, g, truth, reach))
	return nil
}

// greedyChoices judges that each generated token was the most likely one.
func (j *judging) greedyChoices(first int, g Greedy, truth, reach []float64) Finding {
	vocab := j.model.Weights.Config.VocabSize
	f := Finding{Tap: taps.Logits, Stage: StageGeneration, Method: FreeRunning, From: []string{"tokens"}, Verdict: Pass, Of: len(g.Tokens)}
	reach = allowed(reach)
	for i, id := range g.Tokens {
		row := truth[(first+i)*vocab:][:vocab]
		short := slices.Max(row) - row[id]
		slack := 2 * reach[i]
		if ratio := errorRatio(short, 0, slack); ratio > f.Ratio {
			f.Ratio = ratio
			f.Worst = &Worst{Index: []int{i}, Got: -short, Want: 0, Bound: slack}
		}
		if short > slack {
			f.Over++
			f.Verdict = Fail
			f.Reason = fmt.Sprintf("generated token %d is %d, whose logit is %.3g below the most likely one's (rounding allows %.3g)", i, id, short, slack)
		}
	}
	return f
}
