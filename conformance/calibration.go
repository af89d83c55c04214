package conformance

import (
	"slices"

	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// budgetFactor is how much further from the truth than the worst of the
// independent implementations a free run may be, on the very prompt that these
// ran. Two right implementations differ by less than that (the worst is within
// 2.1 times the best on every tap of toy in float32); the mildest fault that a
// free run shows differs by a thousand times in float32.
const budgetFactor = 2

// FixtureBudget is the free-running budget of a fixture's prompt "full": for
// every tap the worst of the independent implementations (torch and transformers,
// and Flax and Equinox with their known faults mended), times a factor. The
// figures stand in golden/model/FIXTURE/spread.json, which `make golden` writes.
//
// It is nil for an arithmetic that no independent implementation ran in.
func FixtureBudget(fixture string, p reference.Precision) (Budget, error) {
	measured, err := golden.ReadSpread(fixture)
	if err != nil {
		return nil, err
	}
	var budget Budget
	for _, run := range measured.Runs {
		if run.Precision != string(p) || !isIndependent(run) {
			continue
		}
		if budget == nil {
			budget = Budget{}
		}
		for name, s := range run.Taps {
			if bySlot(name) {
				continue // the figures leave out slots that went to other experts
			}
			b := budget[name]
			b.RMS = max(b.RMS, budgetFactor*s.RMS)
			b.Max = max(b.Max, budgetFactor*s.Max)
			b.Quantiles = largest(b.Quantiles, scaled(budgetFactor, s.Quantiles["0.5"], s.Quantiles["0.9"], s.Quantiles["0.99"]))
			budget[name] = b
		}
	}
	return budget, nil
}

// isIndependent picks implementations that share no code with ours or each other.
// Flax and Equinox count when their known faults were mended.
func isIndependent(run golden.SpreadRun) bool {
	return run.Corrected || run.Implementation == "torch" || run.Implementation == "transformers"
}

// bySlot reports whether a tap has a row for each chosen expert, so that its rows
// mean other things when other experts are chosen.
func bySlot(full string) bool {
	_, name := taps.Split(full)
	return slices.Contains([]string{taps.ExpertIndices, taps.ExpertWeights, taps.Prelinear, taps.Activated, taps.ExpertOutputs}, name)
}

func scaled(factor float64, values ...float64) []float64 {
	for i := range values {
		values[i] *= factor
	}
	return values
}
