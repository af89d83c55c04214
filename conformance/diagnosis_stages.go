package conformance

import (
	"maps"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// diagnoseStages works from the subject's taps: the faulty stage, applied to the
// subject's own inputs, must give the subject's own output, at every tap that
// failed and at every one that did not.
func (j *judging) diagnoseStages(failed []string) (*Diagnosis, error) {
	singles := j.hypotheses(false)
	spreads, err := j.spanSpreads()
	if err != nil {
		return nil, err
	}
	fits, first := j.fitStages(singles, failed, spreads)
	if d := bestOf(fits, "taps"); d != nil {
		return d, j.ctx.Err()
	}
	fits, _ = j.fitStages(j.confined(singles, j.suspects(failed)), failed, spreads)
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

// fitStages measures hypotheses: all of them at the first tap that failed, and on
// the others those that explain it. first has what it found at the first.
func (j *judging) fitStages(list []hypothesis, failed []string, spreads map[string]spread) (fits, first []fit) {
	first = j.fitAll(list, failed[:1], spreads)
	for i, h := range list {
		if first[i].explains() {
			fits = append(fits, j.fitWhole(h, failed, spreads))
		}
	}
	if !slices.ContainsFunc(fits, fit.explains) {
		fits = j.refitStage(list, first, failed, spreads)
	}
	return fits, first
}

// suspects are the sets of layers that may have a fault which the others don't
// have: the layers of the taps that failed. Where a tap is computed over several
// layers, each of them may be it, and so may all.
func (j *judging) suspects(failed []string) [][]int {
	var certain, possible []int
	for _, name := range failed {
		switch layers := j.passes(name); len(layers) {
		case 0:
			return nil // it failed without a layer's doing
		case 1:
			certain = append(certain, layers...)
		default:
			possible = append(possible, layers...)
		}
	}
	sets := [][]int{sortedSet(certain, possible)}
	for _, layer := range sortedSet(possible) {
		if set := sortedSet(certain, []int{layer}); !slices.Equal(set, sets[0]) {
			sets = append(sets, set)
		}
	}
	return sets
}

// sortedSet is the union of some lists.
func sortedSet(lists ...[]int) []int {
	union := slices.Concat(lists...)
	slices.Sort(union)
	return slices.Compact(union)
}

// passes lists the layers whose stages make a tap from the subject's taps.
func (j *judging) passes(name string) []int {
	var layers []int
	seen := map[string]bool{}
	var walk func(name string)
	walk = func(name string) {
		seen[name] = true
		if layer, tap := taps.Split(name); layer >= 0 && tap != taps.Input { // an input is the output before it
			layers = append(layers, layer)
		}
		for _, read := range readsOf(j.model.Weights.Config, name) {
			_, isReal := j.subject.reals[read]
			_, isInteger := j.subject.integers[read]
			if !isReal && !isInteger && !seen[read] {
				walk(read)
			}
		}
	}
	walk(name)
	return sortedSet(layers)
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
	result := fitOf(h)
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
			bound := j.bound(h.bounding(e, name), name, want)
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

// bounding is the evaluation from which a tap's bound is derived: a bound reads
// the weights and the configuration of the tap's own layer, which a model with a
// fault in some layers does not have in one place.
func (h hypothesis) bounding(e *evaluation[float64], name string) *evaluation[float64] {
	layer, _ := taps.Split(name)
	if h.everywhere == nil || !slices.Contains(h.layers(), layer) {
		return e
	}
	own := *e
	own.model = h.everywhere
	return &own
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
