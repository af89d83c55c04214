package conformance_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	backend "github.com/gptoss-conformance/gptoss/conformance/backends/reference"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// TestLayoutsAgree runs one model from both layouts: the same digest, and the
// same bits on every tap.
func TestLayoutsAgree(t *testing.T) {
	tokens, err := fixtures.Tokens("toy", "full")
	require.NoError(t, err)
	digests, layouts := map[string]string{}, map[string]map[string]any{}
	for _, dir := range []string{fixtures.Dir("toy"), fixtures.HuggingFaceDir("toy")} {
		m, err := checkpoint.Open(dir)
		require.NoError(t, err)
		defer m.Close()
		digests[m.Source.Layout], err = m.Digest(t.Context())
		require.NoError(t, err)
		instance, err := backend.New(reference.BFloat16).Open(t.Context(), dir)
		require.NoError(t, err)
		defer instance.Close()
		results, err := instance.(conformance.Tapper).ForwardTaps(t.Context(), tokens, taps.All(m.Config))
		require.NoError(t, err)
		layouts[m.Source.Layout] = map[string]any{}
		for name, value := range results {
			layouts[m.Source.Layout][name] = value
		}
	}
	require.Len(t, layouts, 2)
	assert.Equal(t, digests[checkpoint.OpenAI], digests[checkpoint.HuggingFace])
	assert.Equal(t, layouts[checkpoint.OpenAI], layouts[checkpoint.HuggingFace])
}
