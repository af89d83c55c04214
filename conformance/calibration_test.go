package conformance_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// TestSpreadFactorIsCalibrated: judged by the spread of perturbed runs, as on a
// checkpoint that is no fixture, the independent implementations use at least a
// quarter of what they are allowed, and no more than all of it: the factor is
// neither too small nor padded.
func TestSpreadFactorIsCalibrated(t *testing.T) {
	largest := 0.0
	for _, p := range []struct{ fixture, prompt string }{{"toy", "full"}, {"edge", "short"}} {
		weights, err := checkpoint.Open(fixtures.Dir(p.fixture))
		require.NoError(t, err)
		defer weights.Close()
		tokens, err := fixtures.Tokens(p.fixture, p.prompt)
		require.NoError(t, err)
		runs, err := golden.Runs(p.fixture)
		require.NoError(t, err)
		judged := 0
		for _, run := range runs {
			precision := reference.Precision(run.Precision)
			if run.Prompt != p.prompt || run.StoredRows != nil || !rightRun(run) {
				continue
			}
			judged++
			results, err := run.Load()
			require.NoError(t, err)
			v, err := conformance.Judge(t.Context(), weights, tokens,
				conformance.Subject{Precision: precision, Taps: results}, conformance.JudgeOptions{Catalogue: []faults.Fault{}})
			require.NoError(t, err)
			assert.Equal(t, conformance.Pass, v.Word, "%s in %s on %s: %s", run.Name(), precision, p.fixture, v.Reason)
			for _, f := range v.Findings {
				if f.Method == conformance.FreeRunning {
					largest = max(largest, f.Ratio)
				}
			}
		}
		require.Positive(t, judged, "no whole run of %s on %s", p.fixture, p.prompt)
	}
	t.Logf("the independent implementations use %.2f of the spread's factor", largest)
	assert.Greater(t, largest, 0.25, "the factor is larger than any implementation needs")
}

// rightRun picks independent implementations in the arithmetic that they claim:
// Equinox' bfloat16 keeps more in float32 than the model does.
func rightRun(run golden.Run) bool {
	switch run.Precision {
	case string(reference.Float32):
		return run.Corrected || run.Implementation == "torch" || run.Implementation == "transformers"
	case string(reference.BFloat16):
		return run.Implementation == "torch" || run.Implementation == "transformers"
	}
	return false
}

// TestBudgetsAreThere: every fixture has a budget for every arithmetic that
// independent implementations ran in, and none for others.
func TestBudgetsAreThere(t *testing.T) {
	for _, fixture := range fixtures.Names() {
		for _, precision := range []reference.Precision{reference.Float32, reference.BFloat16} {
			budget, err := conformance.FixtureBudget(fixture, precision)
			require.NoError(t, err)
			require.Contains(t, budget, "logits", "%s %s", fixture, precision)
			assert.Positive(t, budget["logits"].RMS)
			assert.Greater(t, budget["logits"].Max, budget["logits"].RMS)
			assert.Len(t, budget["logits"].Quantiles, 3)
		}
		none, err := conformance.FixtureBudget(fixture, reference.Float16)
		require.NoError(t, err)
		assert.Nil(t, none, "nobody ran %s in float16", fixture)
	}
	_, err := conformance.FixtureBudget("no such fixture", reference.Float32)
	assert.Error(t, err)
}
