package conformance

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// spreadFactor is how far an implementation may be from the truth, in units of
// the perturbed runs' own spread, where no budget is stored: on any checkpoint
// that is not a fixture. On the fixtures the independent implementations need
// about half of it; TestSpreadFactorIsCalibrated holds the number to them.
const spreadFactor = 4

// Budget says what free-running taps may differ by, keyed by tap.
type Budget map[string]TapBudget

// TapBudget is a budget for one tap, over all its rows (tokens).
type TapBudget struct {
	RMS       float64   `json:"rms"`       // of all elements
	Quantiles []float64 `json:"quantiles"` // of the rows' rms, at 0.5, 0.9 and 0.99
	Max       float64   `json:"max"`       // of all elements
}

// budgetPoints are the quantiles that the golden figures have.
var budgetPoints = []float64{0.5, 0.9, 0.99}

// measure describes an error the way budgets do.
func measure(got, want []float64, rows int) TapBudget {
	e := rowErrorsOf(got, want, rows)
	m := TapBudget{Quantiles: quantiles(e.rms, budgetPoints)}
	for r := range rows {
		m.RMS += e.rms[r] * e.rms[r] / float64(rows)
		m.Max = max(m.Max, e.max[r])
	}
	m.RMS = math.Sqrt(m.RMS)
	return m
}

// withinBudget judges a free-running tap by a stored budget.
func (f *Finding) withinBudget(shape []int, got, want []float64, budget TapBudget) {
	m := measure(got, want, shape[0])
	f.Of = len(got)
	f.Ratio = max(errorRatio(m.RMS, 0, budget.RMS), errorRatio(m.Max, 0, budget.Max))
	for i, q := range m.Quantiles {
		f.Ratio = max(f.Ratio, errorRatio(q, 0, budget.Quantiles[i]))
	}
	f.worstElement(shape, got, want)
	if f.Ratio > 1 {
		f.Verdict = Fail
	}
}

// withinSpread judges a tap by the spread of perturbed runs. Row by row if the
// runs are comparable that way; by the distribution over all rows (loose) if a
// choice of experts that rounding decides stands in between, since after
// another choice single rows have nothing to do with each other.
func (f *Finding) withinSpread(shape []int, got, want []float64, s spread, loose bool) {
	rows := shape[0]
	e := rowErrorsOf(got, want, rows)
	f.Of = len(got)
	if loose {
		for i, q := range quantiles(e.rms, quantilePoints) {
			f.Ratio = max(f.Ratio, errorRatio(q, 0, spreadFactor*s.quantiles[i]))
		}
		f.Ratio = max(f.Ratio, errorRatio(maximum(e.rms), 0, spreadFactor*maximum(s.rms)))
		f.Reason = "by quantiles over all positions, since rounding decides some choices of experts"
	} else {
		allowed := s.allowance()
		for r := range rows {
			ratio := allowed.ratio(e, r)
			f.Ratio = max(f.Ratio, ratio)
			if ratio > 1 {
				f.Over += len(got) / rows
			}
		}
	}
	f.worstElement(shape, got, want)
	if f.Ratio > 1 || f.Ratio != f.Ratio {
		f.Verdict = Fail
	}
}

// allowance is what a spread allows each row: the factor times its own spread, or
// times a large row's if its own happens to be small.
func (s spread) allowance() rowErrors {
	return rowErrors{rms: allowed(s.rms), max: allowed(s.max)}
}

func allowed(spread []float64) []float64 {
	floor := typical(spread)
	out := make([]float64, len(spread))
	for i, v := range spread {
		out[i] = spreadFactor * max(v, floor)
	}
	return out
}

// typical is the ninth decile of the rows' spreads. A handful of runs leaves many
// a row short of its true spread, and with hundreds of rows the luckiest would
// be out by chance.
func typical(spread []float64) float64 {
	if len(spread) == 0 {
		return 0
	}
	return quantiles(spread, []float64{0.9})[0]
}

// ratio is a row's error in units of what it is allowed.
func (allowed rowErrors) ratio(e rowErrors, row int) float64 {
	return max(errorRatio(e.rms[row], 0, allowed.rms[row]), errorRatio(e.max[row], 0, allowed.max[row]))
}

// coarser widens a spread by storing the values in a format.
func (s spread) coarser(format kernel.Format, want []float64, rows int) spread {
	sizes := rowErrorsOf(want, make([]float64, len(want)), rows)
	for r := range rows {
		s.rms[r] += storing(format, sizes.rms[r])
		s.max[r] += storing(format, sizes.max[r])
	}
	for i := range s.quantiles {
		s.quantiles[i] += storing(format, maximum(sizes.rms))
	}
	return s
}

// worstElement records the largest difference, with the bound that the ratio
// implies.
func (f *Finding) worstElement(shape []int, got, want []float64) {
	at, largestError := 0, -1.0
	for i, g := range got {
		if d := math.Abs(g - want[i]); d > largestError {
			at, largestError = i, d
		}
	}
	bound := 0.0
	if f.Ratio > 0 {
		bound = largestError / f.Ratio
	}
	f.Worst = &Worst{Index: unravel(at, shape), Got: got[at], Want: want[at], Bound: bound}
}

func maximum(x []float64) float64 {
	top := 0.0
	for _, v := range x {
		top = max(top, v)
	}
	return top
}

// nearTies reports whether rounding may decide a choice of experts that the
// subject did not tap: whether somewhere the truth's margin is within what the
// spread of the gate logits allows two of them to move.
func (j *judging) nearTies(gates map[string]spread) bool {
	c := j.model.Weights.Config
	for layer := range c.Layers {
		if j.subject.integers[taps.Block(layer, taps.ExpertIndices)] != nil {
			continue
		}
		gate := taps.Block(layer, taps.GateLogits)
		logits, chosen := j.free.real(gate), j.free.indices(layer)
		reach := allowed(gates[gate].max)
		for t := range j.tokens {
			m := margin(logits[t*c.Experts:][:c.Experts], chosen[t*c.ExpertsPerToken:][:c.ExpertsPerToken])
			if m <= 2*reach[t] {
				return true
			}
		}
	}
	return false
}

// explainFlips looks at the rows of a failed span that a choice of experts in
// the same block decides, and accepts those that follow from another choice
// which rounding allows there.
func (j *judging) explainFlips(f *Finding, name string, s spread) error {
	layer, _ := taps.Split(name)
	c := j.model.Weights.Config
	gate := taps.Block(layer, taps.GateLogits)
	logits := j.own.real(gate)
	allowed, err := j.gateSpread(gate, logits)
	if err != nil {
		return err
	}
	shape, got := j.shape(name), j.subject.reals[name]
	rows, width := shape[0], len(got)/shape[0]
	best := append([]float64(nil), j.own.compute(name)...)
	explained, allowance := 0, s.allowance()
	for attempt := range alternativesTried {
		e := rowErrorsOf(got, best, rows)
		alternative := append([]int32(nil), j.own.indices(layer)...)
		open := []int{}
		for t := range rows {
			chosen := alternative[t*c.ExpertsPerToken:][:c.ExpertsPerToken]
			if allowance.ratio(e, t) > 1 && swapNth(attempt, logits[t*c.Experts:][:c.Experts], allowed[t*c.Experts:][:c.Experts], chosen) {
				open = append(open, t)
			}
		}
		if len(open) == 0 {
			break
		}
		other := known(newEvaluation(j.ctx, &j.model, j.tokens), j.subject)
		other.integers[taps.Block(layer, taps.ExpertIndices)] = alternative
		want := other.compute(name)
		fit := rowErrorsOf(got, want, rows)
		for _, t := range open {
			if allowance.ratio(fit, t) <= 1 {
				copy(best[t*width:][:width], want[t*width:][:width])
				explained++
			}
		}
	}
	again := Finding{Tap: f.Tap, Stage: f.Stage, Method: f.Method, From: f.From, Verdict: Pass}
	again.withinSpread(shape, got, best, s, false)
	if explained > 0 {
		again.Reason = fmt.Sprintf("%d tokens went to other experts, as rounding allows", explained)
	}
	*f = again
	return j.ctx.Err()
}

// alternativesTried limits how many other choices of experts are tried for a
// token: the pairs of a chosen and a passed-over expert closest in logit.
const alternativesTried = 8

// swapNth replaces, in a token's choice, the n-th closest pair of a chosen and a
// passed-over expert that rounding allows to swap; false if there are not so many.
func swapNth(n int, logits, allowed []float64, chosen []int32) bool {
	type pair struct {
		slot   int
		expert int32
		gap    float64
	}
	var pairs []pair
	for slot, a := range chosen {
		for b := range logits {
			gap := logits[a] - logits[b]
			if !slices.Contains(chosen, int32(b)) && gap <= allowed[a]+allowed[b] {
				pairs = append(pairs, pair{slot, int32(b), gap})
			}
		}
	}
	if n >= len(pairs) {
		return false
	}
	slices.SortFunc(pairs, func(x, y pair) int { return cmp.Compare(x.gap, y.gap) })
	chosen[pairs[n].slot] = pairs[n].expert
	return true
}
