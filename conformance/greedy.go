package conformance

import (
	"context"
	"fmt"
	"maps"
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
	// Top has the log-probabilities of the likeliest tokens in each one's place, as
	// many as the endpoint lists. It may be nil, and so may any of its elements, where
	// the list is not known in full.
	Top []map[int32]float64
}

// listed returns the ids that are compared in each generated token's place: the
// token itself, then the others that are listed, all rows as wide as the widest.
// Shorter rows repeat the token, which changes no largest error.
func (g Greedy) listed() [][]int32 {
	rows := make([][]int32, len(g.Tokens))
	width := 0
	for i, id := range g.Tokens {
		rows[i] = []int32{id}
		if g.Top != nil {
			rows[i] = append(rows[i], slices.Sorted(maps.Keys(g.Top[i]))...)
		}
		width = max(width, len(rows[i]))
	}
	for i := range rows {
		for len(rows[i]) < width {
			rows[i] = append(rows[i], g.Tokens[i])
		}
	}
	return rows
}

// values returns the log-probabilities of the listed ids, [rows, width]. The token's
// own is the one beside it, and the list's own where it is listed too.
func (g Greedy) values(listed [][]int32) []float64 {
	var out []float64
	for i, row := range listed {
		for column, id := range row {
			p := g.LogProbs[i]
			if column > 0 && g.Top != nil {
				if of, ok := g.Top[i][id]; ok {
					p = of
				}
			}
			out = append(out, p)
		}
	}
	return out
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
// allows; and its log-probability, and those of the tokens listed beside it, must be
// the truth's, within the spread of perturbed runs. No token may be missing from a
// list that is likelier than one that is there, by more than rounding allows. It
// returns an error only if the question makes no sense.
func JudgeGreedy(ctx context.Context, m *checkpoint.Model, prompt []int32, g Greedy, o JudgeOptions) (*Verdict, error) {
	if len(g.Tokens) == 0 || len(g.Tokens) != len(g.LogProbs) {
		return nil, fmt.Errorf("%d generated tokens with %d log-probabilities: there must be as many of both, and at least one", len(g.Tokens), len(g.LogProbs))
	}
	if g.Top != nil && len(g.Top) != len(g.Tokens) {
		return nil, fmt.Errorf("%d generated tokens with %d lists of the likeliest: there must be as many of both", len(g.Tokens), len(g.Top))
	}
	tokens := slices.Concat(prompt, g.Tokens[:len(g.Tokens)-1])
	listed := g.listed()
	for _, list := range append([][]int32{prompt, tokens, g.Tokens}, listed...) {
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
	for at, p := range g.values(listed) {
		if math.IsNaN(p) || math.IsInf(p, 0) {
			i, column := at/len(listed[0]), at%len(listed[0])
			v.Findings = []Finding{{
				Tap: taps.Logits, Stage: StageGeneration, Method: Form, Verdict: Fail, Ratio: math.Inf(1),
				Reason: fmt.Sprintf("the log-probability of token %d, in the place of generated token %d, is %v", listed[i][column], i, p),
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
	listed := g.listed()
	width := len(listed[0])
	got := g.values(listed)
	logProbs := func(logits []float64) []float64 {
		rows := len(logits)/vocab - first
		out := make([]float64, 0, rows*width)
		for i := range rows {
			row := logSoftmax(logits[(first+i)*vocab:][:vocab])
			for _, id := range listed[i] {
				out = append(out, row[id])
			}
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
	rows := len(listed)
	reach := make([]float64, rows) // how far any perturbed run moves a logit of the row
	spreads, err := spreadsOf(j.ctx, j.model.Weights, j.tokens, j.subject, nil, j.options.Samples, gates, func(run source) {
		logits := run.real(taps.Logits)
		s = s.including(rowErrorsOf(logProbs(logits), want, rows))
		reach = largest(reach, rowErrorsOf(logits[first*vocab:], truth[first*vocab:], rows).max)
	})
	if err != nil {
		return err
	}
	s = s.besides(j.softmaxErrors(want, rows))
	j.greedy = &outcome{
		name: "log-probabilities", first: first, width: width, got: got, spread: s, loose: j.nearTies(spreads),
		of: func(e *evaluation[float64]) []float64 { return logProbs(e.real(taps.Logits)) }, needs: []string{taps.Logits},
	}
	f := Finding{Tap: taps.Logits, Stage: StageGeneration, Method: FreeRunning, From: []string{"tokens"}, Verdict: Pass}
	f.withinSpread([]int{rows, width}, got, want, s, j.greedy.loose)
	v.Findings = append(v.Findings, f, j.greedyChoices(first, g, truth, reach))
	if g.Top != nil {
		v.Findings = append(v.Findings, j.greedyLists(first, g, truth, reach))
	}
	return nil
}

// softmaxErrors is how far the last step itself may take log-probabilities from the
// truth, which the perturbed runs leave out: they take theirs in float64.
//
// An endpoint has float32 at best. Its sum over the vocabulary has a relative error
// of √n·u, times the factor that a spread is multiplied with ([spreadFactor]) in
// place of λ (Higham and Mary 2019, Theorem 3.1), and that is an absolute error of
// the logarithm. Rounding a probability near 1, or the logarithm of the sum, adds u
// or so; the difference of logits and the result, as large as the log-probability,
// u each. A confident answer's log-probability is 1e-7: there this is all there is.
func (j *judging) softmaxErrors(want []float64, rows int) rowErrors {
	u := j.subject.roundoff.sum
	n := math.Sqrt(float64(j.model.Weights.Config.VocabSize))
	e := make([]float64, len(want))
	for i, p := range want {
		e[i] = (n + 1 + 2*math.Abs(p)) * u
	}
	return rowErrorsOf(e, make([]float64, len(e)), rows)
}

// besides adds what the perturbed runs leave out.
func (s spread) besides(e rowErrors) spread {
	sum := spread{rms: slices.Clone(s.rms), max: slices.Clone(s.max), quantiles: slices.Clone(s.quantiles)}
	for r := range e.rms {
		sum.rms[r] += e.rms[r]
		sum.max[r] += e.max[r]
	}
	for i := range sum.quantiles {
		sum.quantiles[i] += maximum(e.rms)
	}
	return sum
}

// greedyLists judges that no likelier token is missing from a list: one that is
// not there had at most the logit of the least likely one that is, and each of the
// two may have moved by the reach.
func (j *judging) greedyLists(first int, g Greedy, truth, reach []float64) Finding {
	vocab := j.model.Weights.Config.VocabSize
	f := Finding{Tap: taps.Logits, Stage: StageGeneration, Method: FreeRunning, From: []string{"tokens"}, Verdict: Pass, Of: len(g.Tokens)}
	reach = allowed(reach)
	for i, list := range g.Top {
		least, missing := math.Inf(1), int32(-1)
		row := truth[(first+i)*vocab:][:vocab]
		for id, logit := range row {
			if _, ok := list[int32(id)]; ok {
				least = min(least, logit)
			} else if missing < 0 || logit > row[missing] {
				missing = int32(id)
			}
		}
		if missing < 0 || len(list) == 0 {
			continue
		}
		short, slack := max(row[missing]-least, 0), 2*reach[i]
		if ratio := errorRatio(short, 0, slack); ratio > f.Ratio {
			f.Ratio = ratio
			f.Worst = &Worst{Index: []int{i}, Got: -short, Want: 0, Bound: slack}
		}
		if short > slack {
			f.Over++
			f.Verdict = Fail
			f.Reason = fmt.Sprintf("the likeliest tokens in the place of generated token %d leave out %d, whose logit is %.3g above that of one in the list (rounding allows %.3g)", i, missing, short, slack)
		}
	}
	return f
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
