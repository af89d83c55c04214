package conformance

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// diagnoseRuns works from whole runs, when the subject tapped nothing between
// the tokens and its output: every fault's float64 run is compared with it.
func (j *judging) diagnoseRuns(v *Verdict) (*Diagnosis, error) {
	out := j.outcome(v)
	if out == nil {
		return &Diagnosis{From: "nothing that runs could be compared by", Remaining: math.Inf(1)}, nil
	}
	from := "whole runs, by " + out.name + " alone"
	singles := j.hypotheses(true)
	for _, propose := range []func() []hypothesis{
		func() []hypothesis { return singles },
		func() []hypothesis { return j.screen(j.inSingleLayers(singles), out) },
		func() []hypothesis { return j.screenPairs(singles, out) },
	} {
		list := propose()
		fits := j.refit(list, j.fitRuns(list, out, len(j.tokens)), out)
		if d := bestOf(j.nearer(list, fits, out), from); d != nil {
			return d, j.ctx.Err()
		}
	}
	return &Diagnosis{From: from, Remaining: math.Inf(1)}, j.ctx.Err()
}

// outcome is the one output by which whole runs are compared: [rows, width], a
// row for each token from the first one on.
type outcome struct {
	name  string
	first int // the token of the first row
	width int
	got   []float64
	spread
	loose bool // rows can't be compared one by one
	// of computes the same output for a run over the first tokens, from the taps
	// that it needs.
	of    func(e *evaluation[float64]) []float64
	needs []string
}

// outcome picks the logits, or the first tap that diverged if there are none or
// nothing is wrong with them.
func (j *judging) outcome(v *Verdict) *outcome {
	if j.greedy != nil {
		return j.greedy
	}
	name := taps.Logits
	if !slices.ContainsFunc(v.Findings, func(f Finding) bool { return f.Tap == taps.Logits && f.Verdict == Fail }) {
		name = v.FirstDivergence
	}
	got, ok := j.subject.reals[name]
	if !ok {
		return nil
	}
	return &outcome{
		name: name, got: got, width: len(got) / len(j.tokens), spread: j.spreads[name], loose: j.loose,
		of: func(e *evaluation[float64]) []float64 { return e.real(name) }, needs: []string{name},
	}
}

// fitRuns runs hypotheses on the first tokens and compares their outcome.
func (j *judging) fitRuns(list []hypothesis, out *outcome, tokens int) []fit {
	fits := make([]fit, len(list))
	rows := tokens - out.first
	got := out.got[:rows*out.width]
	parallel(len(list), func(i int) {
		fits[i] = fitOf(list[i])
		fits[i].ratio, fits[i].rms = math.Inf(1), math.Inf(1)
		if j.ctx.Err() != nil {
			return
		}
		want := out.of(j.runOf(list[i], tokens))
		f := Finding{Tap: out.name, Verdict: Pass}
		f.withinSpread([]int{rows, out.width}, got, want, out.head(rows), out.loose)
		fits[i].ratio = f.Ratio
		fits[i].maxAbs = math.Abs(f.Worst.Got - f.Worst.Want)
		fits[i].rms = median(rowErrorsOf(got, want, rows).rms)
	})
	return fits
}

// refit measures the nearest hypotheses again by the spread of their own perturbed
// runs, if none fits by the right model's. A fault that makes activations larger
// makes their rounding errors larger too.
func (j *judging) refit(list []hypothesis, fits []fit, out *outcome) []fit {
	if slices.ContainsFunc(fits, fit.explains) {
		return fits
	}
	right := j.fitRuns([]hypothesis{{model: j.model}}, out, len(j.tokens))[0]
	for _, i := range nearest(fits) {
		h := list[i]
		if h.cached() || j.ctx.Err() != nil || fits[i].rms > right.rms/2 {
			continue // a wide spread excuses much, but not being no nearer than the right model
		}
		want := out.of(j.runOf(h, len(j.tokens)))
		own := *out
		own.spread = spread{}
		for seed := range j.options.Samples {
			run := out.sampled(sample(j.ctx, j.model.Weights, j.tokens, j.subject, nil, seed, h.faults...))
			own.spread = own.including(rowErrorsOf(run, want, len(want)/out.width))
		}
		own.spread = j.asStored(out.name, own.spread, want)
		fits[i] = j.fitRuns(list[i:i+1], &own, len(j.tokens))[0]
	}
	return fits
}

// sampled is the outcome of a perturbed run.
func (out *outcome) sampled(run source) []float64 {
	e := &evaluation[float64]{reals: map[string][]float64{}}
	for _, name := range out.needs {
		e.reals[name] = run.real(name)
	}
	return out.of(e)
}

// nearer keeps the fits that explain the subject better than rounding does: those
// at less than half the right model's distance, and those whose difference the
// subject shows by more than chance (see weighHypotheses). A fault that changes
// less than rounding fits any run of the right model.
func (j *judging) nearer(list []hypothesis, fits []fit, out *outcome) []fit {
	rows := len(out.got) / out.width
	truth := out.of(j.runOf(hypothesis{model: j.model}, len(j.tokens)))
	distance := median(rowErrorsOf(out.got, truth, rows).rms)
	var samples [][]float64
	kept := make([]fit, 0, len(fits))
	for i, f := range fits {
		if !f.explains() {
			continue
		}
		if f.rms > distance/2 {
			if samples == nil {
				for seed := range j.options.Samples {
					samples = append(samples, j.storedAs(out.name, out.sampled(sample(j.ctx, j.model.Weights, j.tokens, j.subject, nil, seed))))
				}
			}
			other := out.of(j.runOf(list[i], len(j.tokens)))
			share, noise := shareOf(out.got, truth, other, samples, rows)
			if !(share > 0.5) || noise > noiseAllowed {
				continue
			}
		}
		kept = append(kept, f)
	}
	return kept
}

// storedAs rounds values as the subject's storage of a tap did.
func (j *judging) storedAs(name string, values []float64) []float64 {
	format, ok := j.subject.coarse[name]
	if !ok {
		return values
	}
	stored := make([]float64, len(values))
	for i, v := range values {
		stored[i] = format.Nearest(v)
	}
	return stored
}

// runOf evaluates a hypothesis from the first tokens: with the subject's own
// routing if all of it is known, and with a KV cache if the subject used one.
func (j *judging) runOf(h hypothesis, tokens int) *evaluation[float64] {
	e := newEvaluation(j.ctx, &h.model, j.tokens[:tokens])
	if routing, complete := j.subject.routing(j.model.Weights.Config); complete && tokens == len(j.tokens) {
		for layer, indices := range routing {
			e.integers[taps.Block(layer, taps.ExpertIndices)] = indices
		}
	}
	if h.cached() {
		e.reals[taps.Logits] = decoded(j.ctx, h.model, j.tokens[:tokens], j.options.Chunks)
	}
	return e
}

// decoded runs a model with a KV cache, so many tokens at a time. If the context
// ends meanwhile, what is missing is zero, and nobody looks at it.
func decoded(ctx context.Context, m reference.Model[float64], tokens []int32, chunks []int) []float64 {
	var cache reference.Cache[float64]
	vocab := m.Weights.Config.VocabSize
	logits := make([]float64, 0, len(tokens)*vocab)
	for i, from := 0, 0; from < len(tokens); i++ {
		to := min(from+max(1, chunks[min(i, len(chunks)-1)]), len(tokens))
		step, err := m.Forward(ctx, tokens[from:to], &cache, reference.Observer[float64]{})
		if err != nil {
			return logits[:len(tokens)*vocab]
		}
		logits = append(logits, step...)
		from = to
	}
	return logits
}

// head is the spread of the first rows.
func (s spread) head(rows int) spread {
	return spread{rms: s.rms[:rows], max: s.max[:rows], quantiles: s.quantiles}
}

// inSingleLayers lists every fault in every layer. A model of real size is left
// out, whose runs take too long.
func (j *judging) inSingleLayers(singles []hypothesis) []hypothesis {
	c := j.model.Weights.Config
	if c.Layers == 1 || isWide(c) {
		return nil
	}
	var sets [][]int
	for layer := range c.Layers {
		sets = append(sets, []int{layer})
	}
	return j.confined(singles, sets)
}

// screenPairs lists the pairs that can still explain the subject.
func (j *judging) screenPairs(singles []hypothesis, out *outcome) []hypothesis {
	var pairs []hypothesis
	for i, h := range singles {
		for _, g := range singles[i+1:] {
			if !g.same(h) {
				pairs = append(pairs, h.and(g))
			}
		}
	}
	return j.screen(pairs, out)
}

// screen runs hypotheses on ever more tokens and keeps those that can still
// explain the subject. The model is causal, so a prefix of the tokens gives a
// prefix of the rows, and most hypotheses are out after a few.
func (j *judging) screen(list []hypothesis, out *outcome) []hypothesis {
	for tokens := min(out.first+4, len(j.tokens)); ; tokens = min(4*tokens, len(j.tokens)) {
		list = survivors(list, j.fitRuns(list, out, tokens), out.loose)
		if tokens == len(j.tokens) || j.ctx.Err() != nil {
			return list
		}
	}
}

// screened is how many hypotheses stay in the race where rounding makes single
// rows incomparable, and only a ranking is possible: some times the catalogue's
// size, since all pairs of the right fault with one that does not act yet are level.
const screened = 400

func survivors(list []hypothesis, fits []fit, loose bool) []hypothesis {
	order := make([]int, 0, len(list))
	for i, f := range fits {
		if loose || f.explains() {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(fits[a].rms, fits[b].rms) })
	kept := make([]hypothesis, 0, len(order))
	for _, i := range order[:min(len(order), screened)] {
		kept = append(kept, list[i])
	}
	return kept
}

// weighHypotheses compares a subject's logits with every fault's truth, where
// single rows can't decide. Other taps beside the logits spare a subject that only
// if they leave nothing to chance (see weighs): hidden states alone may each be as
// near as rounding allows while the logits drift the way of a fault.
//
// The subject's error, projected on the difference that a fault makes, is 0 for
// a right implementation and 1 for one with that fault, whatever else rounding
// does: row by row, then the median weighted by how much the fault changes the
// row. The same projection of the perturbed runs says how much of it is chance.
// If that is large, the fault is indistinguishable from logits alone.
func (j *judging) weighHypotheses(v *Verdict) error {
	if !j.weighs() || v.Word == Fail || len(j.options.Catalogue) == 0 {
		return nil
	}
	if !j.loose && isWide(j.model.Weights.Config) {
		return nil // the budget decides row by row, and a hundred runs would take an hour
	}
	logits := j.subject.reals[taps.Logits]
	truth := j.truth.real(taps.Logits)
	rows := len(j.tokens)
	list := j.hypotheses(true)
	shares := make([]float64, len(list))
	noise := make([]float64, len(list))
	samples := make([][]float64, len(j.sampleLogits))
	for i, s := range j.sampleLogits {
		samples[i] = j.storedAs(taps.Logits, s)
	}
	parallel(len(list), func(i int) {
		if j.ctx.Err() != nil {
			return
		}
		other := j.runOf(list[i], rows).real(taps.Logits)
		shares[i], noise[i] = shareOf(logits, truth, other, samples, rows)
	})
	hidden := 0
	for i, h := range list {
		id := h.faults[0].ID
		switch {
		case math.IsNaN(shares[i]): // the same numbers: on this input the mistake is none
			v.Indistinguish = append(v.Indistinguish, id)
		case noise[i] > noiseAllowed:
			v.Indistinguish = append(v.Indistinguish, id)
			hidden++
		case shares[i] > 0.5:
			v.Word = Fail
			v.FirstDivergence = taps.Logits
			v.Reason = fmt.Sprintf("the logits are closer to a model with %s than to the right one (%.2f of its difference, chance gives %.2f)", id, shares[i], noise[i])
		}
	}
	if !j.logitsAlone() { // the other taps may tell what the logits do not
		v.Indistinguish = nil
		return j.ctx.Err()
	}
	v.Indistinguish = slices.Compact(v.Indistinguish) // variants share an id
	if v.Word == Pass && hidden > 0 {
		v.Word = Partial
		v.Reason = fmt.Sprintf("right as far as logits tell; %d faults are below the noise of this precision on this input (taps settle it)", hidden)
	}
	return j.ctx.Err()
}

// weighs reports whether the logits are to be weighed against the faults' truths:
// unless every stage before them was judged by its derived bound, which settles
// more than the logits can.
func (j *judging) weighs() bool {
	_, has := j.subject.reals[taps.Logits]
	return has && !j.bounded(taps.Logits)
}

// logitsAlone reports whether the subject put out its logits and nothing else.
func (j *judging) logitsAlone() bool {
	return len(j.subject.names) == 1 && j.subject.names[0] == taps.Logits
}

// noiseAllowed is how much of a fault's difference perturbed runs may show by
// chance for the fault to be distinguishable. The verdict falls at a half, so
// this leaves a factor of two on either side.
const noiseAllowed = 0.25

// shareOf is the share of a fault's difference that a subject shows, and the
// largest that perturbed runs of the right model show by chance.
func shareOf(got, truth, other []float64, samples [][]float64, rows int) (share, noise float64) {
	for _, s := range samples {
		noise = max(noise, math.Abs(projection(s, truth, other, rows)))
	}
	return projection(got, truth, other, rows), noise
}

// projection is the share of a fault's difference that a subject shows: the
// weighted median over rows of <got − truth, other − truth> ÷ |other − truth|².
// NaN if the fault changes nothing.
func projection(got, truth, other []float64, rows int) float64 {
	type row struct{ share, weight float64 }
	width := len(truth) / rows
	list := make([]row, 0, rows)
	total := 0.0
	for r := range rows {
		var dot, size float64
		for i := r * width; i < (r+1)*width; i++ {
			d := other[i] - truth[i]
			dot += (got[i] - truth[i]) * d
			size += d * d
		}
		if size > 0 {
			list = append(list, row{dot / size, size})
			total += size
		}
	}
	slices.SortFunc(list, func(a, b row) int { return cmp.Compare(a.share, b.share) })
	passed := 0.0
	for _, r := range list {
		passed += r.weight
		if passed >= total/2 {
			return r.share
		}
	}
	return math.NaN()
}
