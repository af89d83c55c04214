package conformance_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// TestLayoutsAgree runs every fixture from every layout, as our own converter
// writes them: the same digest, and the same bits on every tap in every
// precision.
func TestLayoutsAgree(t *testing.T) {
	for _, fixture := range fixtures.Names() {
		t.Run(fixture, func(t *testing.T) {
			t.Parallel()
			tokens, err := fixtures.Tokens(fixture, "short")
			require.NoError(t, err)
			original, err := checkpoint.Open(fixtures.Dir(fixture))
			require.NoError(t, err)
			defer original.Close()
			digest, err := original.Digest(t.Context())
			require.NoError(t, err)
			for layout, name := range map[string]string{
				checkpoint.OpenAI:      "openai",
				checkpoint.HuggingFace: "huggingface",
				checkpoint.Flax:        "model.msgpack",
				checkpoint.Equinox:     "model.eqx",
			} {
				path := filepath.Join(t.TempDir(), name)
				require.NoError(t, original.Write(t.Context(), layout, path, checkpoint.WriteOptions{}))
				requireSame(t, original, digest, path, layout, tokens)
			}
		})
	}
	t.Run("transformers' own twin", func(t *testing.T) {
		original, err := checkpoint.Open(fixtures.Dir("toy"))
		require.NoError(t, err)
		defer original.Close()
		digest, err := original.Digest(t.Context())
		require.NoError(t, err)
		tokens, err := fixtures.Tokens("toy", "full")
		require.NoError(t, err)
		requireSame(t, original, digest, fixtures.HuggingFaceDir("toy"), checkpoint.HuggingFace, tokens)
	})
}

// requireSame opens a checkpoint and compares it with the original.
func requireSame(t *testing.T, original *checkpoint.Model, digest, path, layout string, tokens []int32) {
	t.Helper()
	m, err := checkpoint.Open(path)
	require.NoError(t, err)
	defer m.Close()
	assert.Equal(t, layout, m.Source.Layout)
	same, err := m.Digest(t.Context())
	require.NoError(t, err)
	assert.Equal(t, digest, same, layout)
	for _, p := range []reference.Precision{reference.Float64, reference.Float32, reference.BFloat16} {
		assert.Equal(t, allTaps(t, original, p, tokens), allTaps(t, m, p, tokens), "%s in %s", layout, p)
	}
}

func allTaps(t *testing.T, m *checkpoint.Model, p reference.Precision, tokens []int32) map[string]tensor.Tensor {
	t.Helper()
	results, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: p, Taps: taps.All(m.Config)})
	require.NoError(t, err)
	return results
}
