package golden_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Every generated fixture has the float64 truth of every tap, with the
// registry's shapes.
func TestTruthHoldsEveryTap(t *testing.T) {
	for _, s := range fixtures.Generated {
		tensors, run, err := golden.Model(s.Name, "torch", "float64")
		require.NoError(t, err)
		full, err := fixtures.Tokens(s.Name, "full")
		require.NoError(t, err)
		assert.Equal(t, full, run.Tokens)
		for _, name := range taps.All(s.Config) {
			got, ok := tensors[name]
			require.True(t, ok, "%s: %s is missing", s.Name, name)
			want, err := taps.Shape(s.Config, name, len(run.Rows(got)))
			require.NoError(t, err)
			assert.Equal(t, want, got.Shape, "%s: %s", s.Name, name)
			if !taps.Integer(name) {
				assert.EqualValues(t, "F64", got.DType, "%s: %s", s.Name, name)
			}
		}
		assert.Len(t, run.Rows(tensors[taps.Logits]), len(full), "%s: the logits are whole", s.Name)
	}
}

// The goldens belong to the checkpoints that are committed.
func TestGoldensMatchTheFixtures(t *testing.T) {
	require.NotEmpty(t, golden.Models())
	for _, fixture := range golden.Models() {
		m, err := golden.ReadManifest(fixture)
		require.NoError(t, err)
		weights := filepath.Join(fixtures.Dir(fixture), fixtures.WeightsFile)
		assert.NoError(t, golden.CheckFile(weights, m.CheckpointSHA256), "golden/model/%s was made from another checkpoint", fixture)
	}
}

// Everything under golden is listed in a manifest with its digest.
func TestManifestsAreComplete(t *testing.T) {
	assert.NoError(t, golden.Check())
}

// The real implementations that are right agree with the truth to float32
// rounding; those that are shipped wrong don't, and the figures are on record.
func TestRecordedErrorsSeparateRightFromWrong(t *testing.T) {
	runs, err := golden.Runs("toy")
	require.NoError(t, err)
	for _, r := range runs {
		if r.Precision != "float32" {
			continue
		}
		wrong := !r.Corrected && (r.Implementation == "flax" || r.Implementation == "equinox")
		assert.Equal(t, wrong, r.LogitsMaxError > 0.1, "%s: %g", r.File, r.LogitsMaxError)
	}
}

func TestUnknownRunSaysWhatThereIs(t *testing.T) {
	_, _, err := golden.Model("toy", "nonesuch", "float64")
	assert.ErrorContains(t, err, "torch float64 full")
	_, _, err = golden.Model("nonesuch", "torch", "float64")
	assert.ErrorContains(t, err, "make golden")
}

// 25 MB is the limit for what is committed under fixtures and golden together;
// 20 of them are for what is made here.
func TestCommittedDataStaysSmall(t *testing.T) {
	const limit = 25e6
	total := int64(0)
	for _, dir := range []string{".", "../fixtures"} {
		require.NoError(t, filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			info, err := entry.Info()
			if err == nil {
				total += info.Size()
			}
			return err
		}))
	}
	assert.LessOrEqual(t, total, int64(limit), fmt.Sprintf("%.1f MB", float64(total)/1e6))
}

// A file that is damaged is an error, never data.
func TestDamagedFileIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "damaged.safetensors")
	require.NoError(t, os.WriteFile(path, []byte("damaged"), 0o644))
	assert.ErrorContains(t, golden.CheckFile(path, "00"), "make golden")
	assert.ErrorContains(t, golden.CheckFile(path+".missing", "00"), "make golden")
}
