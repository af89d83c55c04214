package conformance

import (
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// RoutingLayer sums up how a layer's choice of experts compares with the truth.
type RoutingLayer struct {
	Layer       int     `json:"layer"`
	Tokens      int     `json:"tokens"`
	Matched     int     `json:"matched"`      // tokens with the truth's experts, in any order
	Explained   int     `json:"explained"`    // tokens with other experts, as rounding allows
	Unexplained int     `json:"unexplained"`  // tokens with other experts, against the margin
	MinMargin   float64 `json:"min_margin"`   // smallest float64 margin between chosen and passed over, in the truth
	WeightDelta float64 `json:"weight_delta"` // largest, over the tokens that matched
	Flips       []Flip  `json:"flips,omitempty"`
}

// Flip is a token that went to other experts than the truth sends it to.
type Flip struct {
	Token      int     `json:"token"`
	Chosen     int32   `json:"chosen"`      // by the subject, wrongly by the truth
	PassedOver int32   `json:"passed_over"` // by the subject, though the truth chose it
	Margin     float64 `json:"margin"`      // float64 logit of the passed-over less that of the chosen, from the subject's own input
	Allowed    float64 `json:"allowed"`     // how far the two logits may be off together
	Explained  bool    `json:"explained"`
	Why        string  `json:"why"`
}

// judgeRouting compares a layer's tapped experts with the float64 gate logits of
// the subject's own input to the router.
//
// logits and allowed are those logits and how far each may be off in the
// subject's arithmetic; truth is the whole float64 run, which says what the
// right experts would have been. A token may choose expert a over b only if b's
// logit does not exceed a's by more than both may be off: exact ties go either
// way. Whatever the truth chose, that is the sharp question; a choice that
// differs from the truth's though it follows from the subject's own input is
// explained by what happened upstream.
func judgeRouting(layer, experts, k int, chosen []int32, logits, allowed, truth []float64) (RoutingLayer, Finding) {
	report := RoutingLayer{Layer: layer, Tokens: len(chosen) / k, MinMargin: math.Inf(1)}
	name := taps.Block(layer, taps.ExpertIndices)
	finding := Finding{Tap: name, Stage: StageOf(name), Method: Routing, Verdict: Pass, Of: report.Tokens}
	for t := range report.Tokens {
		row := func(x []float64) []float64 { return x[t*experts:][:experts] }
		picked := chosen[t*k:][:k]
		right := reference.TopK(row(truth), k)
		report.MinMargin = min(report.MinMargin, margin(row(truth), right))

		flip := worstChoice(row(logits), row(allowed), picked)
		flip.Token = t
		if ratio := errorRatio(max(flip.Margin, 0), 0, flip.Allowed); ratio > finding.Ratio {
			finding.Ratio = ratio
			finding.Worst = &Worst{Index: []int{t}, Got: flip.Margin, Want: 0, Bound: flip.Allowed}
		}
		if !flip.Explained {
			finding.Over++
			finding.Verdict = Fail
			finding.Reason = fmt.Sprintf("token %d goes to expert %d and not to %d, whose float64 logit is larger by %.3g (allowed: %.3g)",
				t, flip.Chosen, flip.PassedOver, flip.Margin, flip.Allowed)
		}
		switch {
		case sameSet(picked, right):
			report.Matched++
		case flip.Explained:
			report.Explained++
			report.Flips = append(report.Flips, upstream(flip, row(logits), picked, right))
		default:
			report.Unexplained++
			report.Flips = append(report.Flips, flip)
		}
	}
	return report, finding
}

// worstChoice finds the pair of a chosen and a passed-over expert that is
// hardest to justify.
func worstChoice(logits, allowed []float64, picked []int32) Flip {
	worst := Flip{Margin: math.Inf(-1), Explained: true}
	hardest := math.Inf(-1)
	for _, a := range picked {
		for b := range logits {
			if slices.Contains(picked, int32(b)) {
				continue
			}
			gap, slack := logits[b]-logits[a], allowed[a]+allowed[b]
			if excess := gap - slack; excess > hardest {
				hardest = excess
				worst = Flip{Chosen: a, PassedOver: int32(b), Margin: gap, Allowed: slack, Explained: gap <= slack}
			}
		}
	}
	worst.Why = "the margin is larger than rounding allows: a fault"
	if worst.Explained {
		worst.Why = "the margin is within what rounding allows"
	}
	return worst
}

// upstream describes a flip that follows from the subject's own input or from
// a near tie.
func upstream(f Flip, logits []float64, picked, right []int32) Flip {
	for _, a := range picked {
		if !slices.Contains(right, a) {
			f.Chosen = a
		}
	}
	for _, b := range right {
		if !slices.Contains(picked, b) {
			f.PassedOver = b
		}
	}
	f.Margin = logits[f.PassedOver] - logits[f.Chosen]
	if f.Margin <= 0 {
		f.Why = "the subject's own input to the router, moved by rounding upstream, prefers this expert in float64 too"
	}
	return f
}

// margin is the distance between the lowest logit that is chosen and the highest
// that is passed over; infinite if all experts are chosen.
func margin(logits []float64, chosen []int32) float64 {
	lowest, highest := math.Inf(1), math.Inf(-1)
	for e, v := range logits {
		if slices.Contains(chosen, int32(e)) {
			lowest = min(lowest, v)
		} else {
			highest = max(highest, v)
		}
	}
	return lowest - highest
}

func sameSet(a, b []int32) bool {
	for _, e := range a {
		if !slices.Contains(b, e) {
			return false
		}
	}
	return len(a) == len(b)
}
