//go:build twolayer || full

package conformance_test

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// routingRow compares the experts of one layer of one run with the truth's.
type routingRow struct {
	matched, explained, following, unexplained int
	margin, allowed                            float64 // largest margin of a flip, and what is allowed
	marginAfter, allowedAfter                  float64 // the same, where an earlier flip has been
	logits, weights                            float64 // largest differences of gate logits and gate weights
}

// routingOf judges every flip of a run: the truth's margin between the chosen and
// the passed-over expert must be less than two gate logits may be off together.
// How far they may be off is what an independent implementation in the same
// precision shows at that layer: its largest error in the rows that none of its
// own flips has reached (all rows if there is no such), times driftFactor. A token
// that an earlier flip has reached has other inputs than the truth: there the
// independent implementation's error in all rows counts.
func (f fullWidth) routingOf(layer int, got, yardstick, truth sampled) routingRow {
	c := struct{ experts, k int }{f.model.Config.Experts, f.model.Config.ExpertsPerToken}
	gate, indices := taps.Block(layer, taps.GateLogits), taps.Block(layer, taps.ExpertIndices)
	exact := truth.gates[gate]
	var r routingRow
	own, clean := f.flips(got, truth), f.rowsBefore(f.flips(yardstick, truth), gate)
	for i, v := range yardstick.reals[gate] {
		allowed := 2 * driftFactor * math.Abs(v-truth.reals[gate][i])
		r.allowedAfter = max(r.allowedAfter, allowed)
		if len(clean) == 0 || slices.Contains(clean, i/c.experts) {
			r.allowed = max(r.allowed, allowed)
		}
	}
	for i, v := range got.reals[gate] {
		r.logits = max(r.logits, math.Abs(v-truth.reals[gate][i]))
	}
	for token := range len(exact) / c.experts {
		row := exact[token*c.experts:][:c.experts]
		chosen, right := got.experts[indices][token*c.k:][:c.k], truth.experts[indices][token*c.k:][:c.k]
		if sameExperts(chosen, right) {
			r.matched++
			if len(got.gates[gate]) == 0 {
				continue
			}
			ours := gateWeights(got.gates[gate][token*c.experts:][:c.experts], chosen)
			for e, w := range gateWeights(row, right) {
				r.weights = max(r.weights, math.Abs(w-ours[e]))
			}
			continue
		}
		margin := 0.0
		for _, a := range right {
			for _, b := range chosen {
				if !slices.Contains(chosen, a) && !slices.Contains(right, b) {
					margin = max(margin, row[a]-row[b])
				}
			}
		}
		after := slices.ContainsFunc(own, func(at flip) bool { return at.layer < layer && at.token <= token })
		if after {
			r.marginAfter = max(r.marginAfter, margin)
		} else {
			r.margin = max(r.margin, margin)
		}
		switch {
		case !after && margin <= r.allowed:
			r.explained++
		case after && margin <= r.allowedAfter:
			r.following++
		default:
			r.unexplained++
		}
	}
	return r
}

// gateWeights is the softmax over the chosen logits, by expert.
func gateWeights(logits []float64, chosen []int32) map[int32]float64 {
	weights, sum := map[int32]float64{}, 0.0
	for _, e := range chosen {
		weights[e] = math.Exp(logits[e])
		sum += weights[e]
	}
	for e := range weights {
		weights[e] /= sum
	}
	return weights
}

// reportRouting fails for unexplained flips and writes the table of all runs.
func (f fullWidth) reportRouting(t *testing.T, file string, truth sampled, runs []namedRun) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "# Routing at %d layers\n\n", f.model.Config.Layers)
	fmt.Fprintf(&b, "%d tokens, against float64. A flip is explained if the truth's margin is below what the gate logits of an independent implementation in the same precision show (%d times its largest error, for two logits); where an earlier flip has been, its errors after such flips count too.\n", len(f.tokens), driftFactor)
	for _, run := range runs {
		fmt.Fprintf(&b, "\n## %s\n\n| layer | same experts | explained | after an earlier flip | unexplained | largest margin | allowed | after a flip | allowed | gate logits off | gate weights off |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n", run.name)
		for layer := range f.model.Config.Layers {
			r := f.routingOf(layer, run.run, run.yardstick, truth)
			fmt.Fprintf(&b, "| %d | %.1f %% | %d | %d | %d | %s | %.2g | %s | %.2g | %.2g | %s |\n", layer,
				100*float64(r.matched)/float64(len(f.tokens)), r.explained, r.following, r.unexplained,
				orDash(r.margin), r.allowed, orDash(r.marginAfter), r.allowedAfter, r.logits, orDash(r.weights))
			if r.unexplained > 0 {
				t.Errorf("%s: layer %d: %d tokens go to other experts than rounding explains", run.name, layer, r.unexplained)
			}
		}
	}
	path := filepath.Join(routingDir, file)
	require.NoError(t, os.MkdirAll(routingDir, 0o755))
	require.NoError(t, os.WriteFile(path, []byte(b.String()), 0o644))
	t.Logf("%s written", path)
}

// orDash writes a number, or a dash where there was nothing to measure.
func orDash(x float64) string {
	if x == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2g", x)
}
