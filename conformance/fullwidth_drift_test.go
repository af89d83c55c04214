//go:build twolayer || full

package conformance_test

import (
	"math"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// compareExactly holds the reference's float64 to torch's: on every tap max |Δ| ≤
// 1e-12·max(1, max |tap|) (the suite's definition of the truth), and the same
// experts.
func compareExactly(t *testing.T, got, want sampled) {
	t.Helper()
	for name, values := range want.reals {
		require.Len(t, got.reals[name], len(values), name)
		size, worst := 1.0, 0.0
		for i, v := range values {
			size, worst = max(size, math.Abs(v)), max(worst, math.Abs(v-got.reals[name][i]))
		}
		if !(worst <= 1e-12*size) {
			t.Errorf("%s: differs from torch's float64 by %.3g, of a size of %.3g", name, worst, size)
		}
	}
	for name, indices := range want.experts {
		for row := 0; row < len(indices); row += 4 {
			if !sameExperts(indices[row:row+4], got.experts[name][row:row+4]) {
				t.Errorf("%s: token %d goes to %v, in torch to %v", name, row/4, got.experts[name][row:row+4], indices[row:row+4])
			}
		}
	}
}

func sameExperts(a, b []int32) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// driftFactor is how many times another implementation's error a run's error may
// be: the judge's factor on the spread of implementations (conformance/budget.go).
const driftFactor = 4

// flip is a token that went to other experts than the truth's.
type flip struct{ layer, token int }

func (f fullWidth) flips(run, truth sampled) (flips []flip) {
	k := f.model.Config.ExpertsPerToken
	for layer := range f.model.Config.Layers {
		name := taps.Block(layer, taps.ExpertIndices)
		got, want := run.experts[name], truth.experts[name]
		for token := range len(want) / k {
			if !sameExperts(got[token*k:][:k], want[token*k:][:k]) {
				flips = append(flips, flip{layer, token})
			}
		}
	}
	return flips
}

// rowsBefore returns which rows of a tap no flip has reached: the flipped token's
// own row differs from that block's output on, and later tokens', which attend to
// it, from the next block on.
func (f fullWidth) rowsBefore(flips []flip, full string) (rows []int) {
	layer, tap := taps.Split(full)
	if layer < 0 {
		layer = f.model.Config.Layers
	}
	tokens := f.samples.Rows
	if tap == taps.GateLogits {
		tokens = f.samples.GateRows
	}
	for row, token := range tokens {
		reached := slices.ContainsFunc(flips, func(at flip) bool {
			return at.layer < layer && at.token <= token || at.layer == layer && tap == taps.Output && at.token == token
		})
		if !reached {
			rows = append(rows, row)
		}
	}
	return rows
}

// compareDrift holds a run's distance from the float64 truth to that of an
// independent implementation in the same precision, tap by tap: rms over the rows
// that no flip has reached in either, or, where no such row is left, the rms of
// the rows at three quantiles.
func (f fullWidth) compareDrift(t *testing.T, got, yardstick, truth sampled) {
	t.Helper()
	require.NotEmpty(t, got.reals)
	flips := append(f.flips(got, truth), f.flips(yardstick, truth)...)
	worst, at := 0.0, ""
	check := func(name string, ours, theirs float64) {
		if !(ours <= driftFactor*theirs) {
			t.Errorf("%s: rms error %.3g, %.1f times that of the independent implementation", name, ours, ours/theirs)
		}
		if ratio := ours / (driftFactor * theirs); ratio > worst {
			worst, at = ratio, name
		}
	}
	for name, want := range truth.reals {
		require.Len(t, got.reals[name], len(want), name)
		require.Len(t, yardstick.reals[name], len(want), name)
		rows := len(f.samples.Rows)
		if _, tap := taps.Split(name); tap == taps.GateLogits {
			rows = len(f.samples.GateRows)
		}
		ours, theirs := rowDistances(got.reals[name], want, rows), rowDistances(yardstick.reals[name], want, rows)
		if clean := f.rowsBefore(flips, name); len(clean) > 0 {
			check(name, rootMeanSquare(ours, clean), rootMeanSquare(theirs, clean))
			continue
		}
		slices.Sort(ours)
		slices.Sort(theirs)
		for _, quarter := range []int{1, 2, 3} {
			check(name, ours[quarter*rows/4], theirs[quarter*rows/4])
		}
	}
	t.Logf("%d flips; rms errors: at most %.2g of the budget, at %s; logits %.3g", len(flips), worst, at, rmsDistance(got.reals[taps.Logits], truth.reals[taps.Logits]))
}

// rowDistances is the rms of every row's error.
func rowDistances(got, want []float64, rows int) []float64 {
	width := len(want) / rows
	out := make([]float64, rows)
	for r := range out {
		out[r] = rmsDistance(got[r*width:][:width], want[r*width:][:width])
	}
	return out
}

func rootMeanSquare(values []float64, rows []int) float64 {
	sum := 0.0
	for _, r := range rows {
		sum += values[r] * values[r]
	}
	return math.Sqrt(sum / float64(len(rows)))
}

func rmsDistance(a, b []float64) float64 {
	sum := 0.0
	for i, v := range a {
		sum += (v - b[i]) * (v - b[i])
	}
	return math.Sqrt(sum / float64(len(a)))
}
