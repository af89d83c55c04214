package recorded_test

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/backends/recorded"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

func TestGoldenServesEveryPromptThatItBeginsWith(t *testing.T) {
	torch := recorded.Golden("torch", reference.Float32)
	assert.Equal(t, "torch-float32", torch.Name())
	instance, err := torch.Open(t.Context(), fixtures.Dir("toy"))
	require.NoError(t, err)
	defer instance.Close()
	whole, _, err := golden.Model("toy", "torch", "float32")
	require.NoError(t, err)
	for _, name := range []string{"one", "window", "window+1", "full"} {
		tokens, err := fixtures.Tokens("toy", name)
		require.NoError(t, err)
		results, err := instance.Forward(t.Context(), tokens)
		require.NoError(t, err)
		assert.Len(t, results, len(whole))
		for tap, got := range results {
			require.NoError(t, got.Check())
			assert.Equal(t, len(tokens), got.Shape[0])
			assert.Equal(t, whole[tap].Data[:len(got.Data)], got.Data, tap)
		}
	}
}

func TestGoldenLeavesSampledTapsOut(t *testing.T) {
	// Of edge's prompt "full" only some rows are stored in float64, but for the logits.
	instance, err := recorded.Golden("torch", reference.Float64).Open(t.Context(), fixtures.Dir("edge"))
	require.NoError(t, err)
	tokens, err := fixtures.Tokens("edge", "full")
	require.NoError(t, err)
	results, err := instance.Forward(t.Context(), tokens)
	require.NoError(t, err)
	assert.Contains(t, results, taps.Logits)
	assert.NotContains(t, results, taps.FinalNorm)
}

func TestMissingRecordingIsUnsupported(t *testing.T) {
	instance, err := recorded.Golden("torch", reference.Float32).Open(t.Context(), fixtures.Dir("toy"))
	require.NoError(t, err)
	_, err = instance.Forward(t.Context(), []int32{255, 255})
	assert.ErrorIs(t, err, errors.ErrUnsupported)
	instance, err = recorded.Golden("nobody", reference.Float32).Open(t.Context(), fixtures.Dir("toy"))
	require.NoError(t, err)
	_, err = instance.Forward(t.Context(), []int32{55})
	assert.ErrorIs(t, err, errors.ErrUnsupported)
}

func TestMissingGoldenIsAnError(t *testing.T) {
	instance, err := recorded.Golden("torch", reference.Float32).Open(t.Context(), t.TempDir())
	require.NoError(t, err)
	_, err = instance.Forward(t.Context(), []int32{55})
	require.Error(t, err)
	assert.NotErrorIs(t, err, errors.ErrUnsupported)
}

func TestNewReplaysWhateverItIsGiven(t *testing.T) {
	want := map[string]tensor.Tensor{"logits": tensor.FromFloat32s([]int{1, 1}, []float32{1})}
	instance, err := recorded.New("it", reference.Float16, func(_ context.Context, dir string, tokens []int32) (map[string]tensor.Tensor, error) {
		assert.Equal(t, "somewhere", dir)
		assert.Equal(t, []int32{3}, tokens)
		return want, nil
	}).Open(t.Context(), "somewhere")
	require.NoError(t, err)
	got, err := instance.Forward(t.Context(), []int32{3})
	require.NoError(t, err)
	assert.Equal(t, want, got)
}
