package conformance

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Diagnosis names the known mistake that explains a failing subject.
type Diagnosis struct {
	// Faults holds the ids of the explanation, sorted: one, a pair, or none.
	Faults []string `json:"faults,omitempty"`
	// Remaining is the largest error ÷ bound that is left when the subject is
	// compared with the faulty model instead of the right one.
	Remaining float64 `json:"remaining"`
	// RemainingMax is the largest |Δ| that is left, on the taps that failed.
	RemainingMax float64 `json:"remaining_max"`
	// Equals lists other explanations that this input cannot tell apart.
	Equals []string `json:"equals,omitempty"`
	// From says what the diagnosis rests on.
	From string `json:"from"`
}

// ID is the explanation as one word: ID, ID+ID, or none.
func (d *Diagnosis) ID() string {
	if d == nil || len(d.Faults) == 0 {
		return "none"
	}
	return strings.Join(d.Faults, "+")
}

// hypothesis is one fault, or two together, as a model.
type hypothesis struct {
	faults []faults.Fault
	model  reference.Model[float64]
}

func (h hypothesis) ids() []string {
	ids := make([]string, len(h.faults))
	for i, f := range h.faults {
		ids[i] = f.ID
	}
	slices.Sort(ids)
	return ids
}

// fit says how well a hypothesis explains a subject.
type fit struct {
	ids     []string
	special int     // how many of them are special cases of other faults
	ratio   float64 // largest error ÷ bound that is left
	rms     float64 // typical error ÷ bound that is left; ranks those that fit
	maxAbs  float64
}

func (f fit) explains() bool { return f.ratio <= 1 }

// hypotheses builds the model of every fault in every variant. Faults of the KV
// cache are left out unless the subject used one: a plain forward pass does not
// show them. decoded weights are worth it when whole models run many times.
func (j *judging) hypotheses(decodeWeights bool) []hypothesis {
	var list []hypothesis
	for _, f := range j.options.Catalogue {
		if f.Cached && len(j.options.Chunks) == 0 {
			continue
		}
		for _, variant := range append([]faults.Fault{f}, f.Variants...) {
			model := faults.Apply(variant, j.model)
			if variant.Checkpoint != nil && decodeWeights {
				model.Weights = model.Weights.Densify(densifyBelow)
			}
			list = append(list, hypothesis{[]faults.Fault{variant}, model})
		}
	}
	return list
}

// special counts the faults that are special cases of others.
func (h hypothesis) special() int {
	n := 0
	for _, f := range h.faults {
		if f.Special {
			n++
		}
	}
	return n
}

// cached reports whether a fault shows only with a KV cache.
func (h hypothesis) cached() bool {
	return slices.ContainsFunc(h.faults, func(f faults.Fault) bool { return f.Cached })
}

// same reports whether two single hypotheses are variants of one fault.
func (h hypothesis) same(g hypothesis) bool { return h.faults[0].ID == g.faults[0].ID }

// and applies a second hypothesis' fault on top. Changed weights are decoded only
// once for every fault, not for every pair.
func (h hypothesis) and(g hypothesis) hypothesis {
	m, f := h.model, g.faults[0]
	if h.faults[0].Checkpoint == nil && f.Checkpoint != nil {
		m.Weights = g.model.Weights // made from the right weights, which are still h's
		f.Checkpoint = nil
	}
	return hypothesis{append(slices.Clone(h.faults), g.faults...), faults.Apply(f, m)}
}

// diagnose looks for the fault, or the pair of faults, under which the subject
// would pass. A pair is named only if no single fault will do.
func (j *judging) diagnose(v *Verdict) (*Diagnosis, error) {
	sharp := sharpFailures(v)
	if len(sharp) > 0 {
		return j.diagnoseStages(sharp)
	}
	return j.diagnoseRuns(v)
}

// sharpFailures lists the taps that failed from the subject's own taps, in
// execution order.
func sharpFailures(v *Verdict) []string {
	var names []string
	for _, f := range v.Findings {
		if f.Verdict == Fail && f.Method != FreeRunning && !slices.Contains(names, f.Tap) {
			names = append(names, f.Tap)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Compare(tapOrder(a), tapOrder(b)) })
	return names
}

// diagnoseStages works from the subject's taps: the faulty stage, applied to the
// subject's own inputs, must give the subject's own output, at every tap that
// failed and at every one that did not.
func (j *judging) diagnoseStages(failed []string) (*Diagnosis, error) {
	singles := j.hypotheses(false)
	spreads, err := j.spanSpreads()
	if err != nil {
		return nil, err
	}
	first := j.fitAll(singles, failed[:1], spreads)
	var fits []fit
	for i, h := range singles {
		if first[i].explains() {
			fits = append(fits, j.fitWhole(h, failed, spreads))
		}
	}
	if !slices.ContainsFunc(fits, fit.explains) {
		fits = j.refitStage(singles, first, failed, spreads)
	}
	if d := bestOf(fits, "taps"); d != nil {
		return d, j.ctx.Err()
	}
	fits = nil
	for _, h := range j.pairsFor(singles, first, failed, spreads) {
		fits = append(fits, j.fitWhole(h, failed, spreads))
	}
	if d := bestOf(fits, "taps"); d != nil {
		return d, j.ctx.Err()
	}
	return &Diagnosis{From: "taps", Remaining: math.Inf(1)}, j.ctx.Err()
}

// refitStage measures the hypotheses that come nearest at the first failing tap
// by the spread of their own perturbed runs from the subject's taps: a fault may
// round where the right stage has nothing to round, and the derived bound knows
// nothing of that.
func (j *judging) refitStage(singles []hypothesis, first []fit, failed []string, spreads map[string]spread) []fit {
	if taps.Integer(failed[0]) {
		return nil
	}
	right := j.fit(hypothesis{model: j.model}, failed[:1], spreads)
	var fits []fit
	for _, i := range nearest(first) {
		if first[i].rms > right.rms/2 {
			continue // not nearer than the right model: no spread makes that an explanation
		}
		own := maps.Clone(spreads)
		if own == nil {
			own = map[string]spread{}
		}
		for _, name := range failed {
			if !taps.Integer(name) {
				own[name] = j.ownSpread(singles[i], name)
			}
		}
		fits = append(fits, j.fitWhole(singles[i], failed, own))
	}
	return fits
}

// ownSpread is the spread of a faulty model's perturbed runs at a tap, from the
// subject's own taps.
func (j *judging) ownSpread(h hypothesis, name string) spread {
	want := known(newEvaluation(j.ctx, &h.model, j.tokens), j.subject).compute(name)
	var own spread
	for seed := range j.options.Samples {
		run := sample(j.ctx, j.model.Weights, j.tokens, j.subject, j.subject, seed, h.faults...)
		own = own.including(rowErrorsOf(run.real(name), want, len(j.tokens)))
	}
	return own
}

// nearest returns the indices of the best fits, whether or not they explain.
func nearest(fits []fit) []int {
	order := make([]int, len(fits))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(fits[a].rms, fits[b].rms) })
	return order[:min(refitted, len(order))]
}

// pairsFor proposes pairs. If some faults explain the first failing tap alone, a
// second one must do something at the first failing tap that they leave
// unexplained; otherwise both must act on the first.
func (j *judging) pairsFor(singles []hypothesis, first []fit, failed []string, spreads map[string]spread) []hypothesis {
	var pairs []hypothesis
	for i, h := range singles {
		if !first[i].explains() {
			continue
		}
		for _, name := range failed[1:] {
			if j.fit(h, []string{name}, spreads).explains() {
				continue
			}
			for _, g := range singles {
				if !g.same(h) && j.acts(g, name) {
					pairs = append(pairs, h.and(g))
				}
			}
			break
		}
	}
	if len(pairs) > 0 {
		return pairs
	}
	var active []hypothesis
	for _, h := range singles {
		if j.acts(h, failed[0]) {
			active = append(active, h)
		}
	}
	for i, h := range active {
		for _, g := range active[i+1:] {
			if !g.same(h) {
				pairs = append(pairs, h.and(g))
			}
		}
	}
	fits := j.fitAll(pairs, failed[:1], spreads)
	var kept []hypothesis
	for i, h := range pairs {
		if fits[i].explains() {
			kept = append(kept, h)
		}
	}
	return kept
}

// acts reports whether a fault changes what a tap should be, given the subject's
// own inputs.
func (j *judging) acts(h hypothesis, name string) bool {
	e := known(newEvaluation(j.ctx, &h.model, j.tokens), j.subject)
	if taps.Integer(name) {
		layer, _ := taps.Split(name)
		gate := taps.Block(layer, taps.GateLogits)
		l := h.model.Layer(j.ctx, layer)
		right := j.model.Stages.Choose(l, j.own.compute(gate))
		return !slices.Equal(right, h.model.Stages.Choose(l, e.compute(gate)))
	}
	return !slices.Equal(j.own.compute(name), e.compute(name))
}

// fitWhole measures a hypothesis on the taps that failed, and then demands that
// it leaves those that passed within their bounds.
func (j *judging) fitWhole(h hypothesis, failed []string, spreads map[string]spread) fit {
	f := j.fit(h, failed, spreads)
	if !f.explains() {
		return f
	}
	var others []string
	for _, name := range j.subject.names {
		if !slices.Contains(failed, name) && (j.direct(name) || j.fromSubject(name)) {
			others = append(others, name)
		}
	}
	f.ratio = max(f.ratio, j.fit(h, others, spreads).ratio)
	return f
}

// fitAll measures many hypotheses, on all cores.
func (j *judging) fitAll(list []hypothesis, names []string, spreads map[string]spread) []fit {
	fits := make([]fit, len(list))
	parallel(len(list), func(i int) { fits[i] = j.fit(list[i], names, spreads) })
	return fits
}

// fit measures how far a hypothesis is from the subject at some taps, judged
// from the subject's own taps.
func (j *judging) fit(h hypothesis, names []string, spreads map[string]spread) fit {
	result := fit{ids: h.ids(), special: h.special()}
	e := known(newEvaluation(j.ctx, &h.model, j.tokens), j.subject)
	var squares, count float64
	for _, name := range names {
		if j.ctx.Err() != nil || result.ratio > 1 {
			break // it does not explain the subject, whatever the other taps say
		}
		if taps.Integer(name) {
			result.ratio = max(result.ratio, j.routingRatio(h, e, name))
			continue
		}
		want, got := e.compute(name), j.subject.reals[name]
		f := j.finding(name, Isolated)
		if s, isSpan := spreads[name]; isSpan {
			_, unresolved := j.reach(name)
			f.withinSpread(j.shape(name), got, want, s, len(unresolved) > 0)
		} else {
			bound := j.bound(e, name, want)
			plain, _, _ := compare(j.shape(name), got, want, bound)
			if f.against(j.shape(name), got, want, hypothetical(bound, len(j.tokens))); j.ratios[name] > 1 && plain > max(1, j.ratios[name]/2) {
				f.Ratio = max(f.Ratio, plain) // hardly nearer than the right model
			}
		}
		result.ratio = max(result.ratio, f.Ratio)
		for i, g := range got {
			d := math.Abs(g - want[i])
			result.maxAbs = max(result.maxAbs, d)
			squares += d * d
			count++
		}
	}
	result.rms = math.Sqrt(squares / max(count, 1))
	return result
}

// hypothetical widens a bound for a faulty model. The bounds are derived for the
// right sequence of operations; a fault may add one more, or move the largest
// intermediate result to another element. So no element is bounded more tightly
// than its row (token) on average, and all get a factor of four. Most faults move
// their stage by far more than that. Where one does not, the widened bound would
// accept any other: so at a tap that failed a hypothesis must be within the plain
// bound, too, or leave no more than half of the right model's error ÷ bound (see
// fit).
func hypothetical(bound []float64, rows int) []float64 {
	width := len(bound) / rows
	for r := range rows {
		row := bound[r*width:][:width]
		mean := 0.0
		for _, b := range row {
			mean += b / float64(width)
		}
		for i := range row {
			row[i] = 4 * max(row[i], mean)
		}
	}
	return bound
}

// routingRatio judges a layer's tapped experts under a hypothesis: what its
// router would choose from the subject's own input.
func (j *judging) routingRatio(h hypothesis, e *evaluation[float64], name string) float64 {
	layer, _ := taps.Split(name)
	gate := taps.Block(layer, taps.GateLogits)
	logits := e.compute(gate)
	allowed, err := j.gateErrors(gate)
	if err != nil {
		return math.Inf(1)
	}
	c := h.model.Weights.Config
	chosen := h.model.Stages.Choose(h.model.Layer(j.ctx, layer), logits)
	if len(chosen) != len(j.subject.integers[name]) {
		return math.Inf(1)
	}
	k, worst := c.ExpertsPerToken, 0.0
	for t := range len(chosen) / k {
		picked := j.subject.integers[name][t*k:][:k]
		if sameSet(picked, chosen[t*k:][:k]) {
			continue
		}
		flip := worstChoice(logits[t*c.Experts:][:c.Experts], allowed[t*c.Experts:][:c.Experts], picked)
		worst = max(worst, errorRatio(max(flip.Margin, 0), 0, flip.Allowed))
	}
	return worst
}

// spanSpreads measures the right model's spread at the taps that no derived
// bound covers.
func (j *judging) spanSpreads() (map[string]spread, error) {
	want := map[string][]float64{}
	for _, name := range j.subject.names {
		if !taps.Integer(name) && !j.direct(name) && j.fromSubject(name) {
			want[name] = j.own.compute(name)
		}
	}
	if len(want) == 0 {
		return nil, nil
	}
	return spreadsOf(j.ctx, j.model.Weights, j.tokens, j.subject, j.subject, j.options.Samples, want, nil)
}

// bestOf names the best of the explanations that fit, and those that fit as well.
func bestOf(fits []fit, from string) *Diagnosis {
	fits = slices.DeleteFunc(fits, func(f fit) bool { return !f.explains() })
	if len(fits) == 0 {
		return nil
	}
	slices.SortStableFunc(fits, func(a, b fit) int { return cmp.Compare(a.rms, b.rms) })
	best := fits[0]
	for _, f := range fits {
		if f.rms <= equalWithin*fits[0].rms && f.special < best.special {
			best = f
		}
	}
	d := &Diagnosis{Faults: best.ids, Remaining: best.ratio, RemainingMax: best.maxAbs, From: from}
	for _, f := range fits {
		if id := strings.Join(f.ids, "+"); f.rms <= equalWithin*fits[0].rms && id != d.ID() && !slices.Contains(d.Equals, id) {
			d.Equals = append(d.Equals, id)
		}
	}
	return d
}

// equalWithin is how much worse an explanation may fit and still count as one
// that the input can't tell apart from the best: rounding alone leaves two runs
// of the same model at errors that differ by less than this.
const equalWithin = 1.25

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
		fits[i] = fit{ids: list[i].ids(), special: list[i].special(), ratio: math.Inf(1), rms: math.Inf(1)}
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

// refitted is how many of the nearest hypotheses are measured by their own spread.
const refitted = 6

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

// screenPairs runs every pair on ever more tokens and keeps those that can still
// explain the subject. The model is causal, so a prefix of the tokens gives a
// prefix of the rows, and most pairs are out after a few.
func (j *judging) screenPairs(singles []hypothesis, out *outcome) []hypothesis {
	var pairs []hypothesis
	for i, h := range singles {
		for _, g := range singles[i+1:] {
			if !g.same(h) {
				pairs = append(pairs, h.and(g))
			}
		}
	}
	for tokens := min(out.first+4, len(j.tokens)); ; tokens = min(4*tokens, len(j.tokens)) {
		fits := j.fitRuns(pairs, out, tokens)
		pairs = survivors(pairs, fits, out.loose)
		if tokens == len(j.tokens) || j.ctx.Err() != nil {
			return pairs
		}
	}
}

// pairsKept is how many pairs stay in the race where rounding makes single rows
// incomparable, and only a ranking is possible: some times the catalogue's size,
// since all pairs of the right fault with one that does not act yet are level.
const pairsKept = 400

func survivors(pairs []hypothesis, fits []fit, loose bool) []hypothesis {
	order := make([]int, 0, len(pairs))
	for i, f := range fits {
		if loose || f.explains() {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(fits[a].rms, fits[b].rms) })
	kept := make([]hypothesis, 0, len(order))
	for _, i := range order[:min(len(order), pairsKept)] {
		kept = append(kept, pairs[i])
	}
	return kept
}

// parallel calls body(0) … body(n-1) on all cores.
func parallel(n int, body func(i int)) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := range next {
				body(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// weighHypotheses compares a subject that tapped only its logits with every
// fault's truth, where single rows can't decide.
//
// The subject's error, projected on the difference that a fault makes, is 0 for
// a right implementation and 1 for one with that fault, whatever else rounding
// does: row by row, then the median weighted by how much the fault changes the
// row. The same projection of the perturbed runs says how much of it is chance.
// If that is large, the fault is indistinguishable from logits alone.
func (j *judging) weighHypotheses(v *Verdict) error {
	if !j.logitsAlone() || v.Word == Fail || len(j.options.Catalogue) == 0 {
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
	v.Indistinguish = slices.Compact(v.Indistinguish) // variants share an id
	if v.Word == Pass && hidden > 0 {
		v.Word = Partial
		v.Reason = fmt.Sprintf("right as far as logits tell; %d faults are below the noise of this precision on this input (taps settle it)", hidden)
	}
	return j.ctx.Err()
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

// String says it in one line.
func (d *Diagnosis) String() string {
	if d.ID() == "none" {
		return "no known fault explains it"
	}
	text := fmt.Sprintf("it matches %s, to %.2g", d.ID(), d.RemainingMax)
	if len(d.Equals) > 0 {
		text += fmt.Sprintf(" (this input can't tell that from %s)", strings.Join(d.Equals, ", "))
	}
	return text
}
