package reference_test

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
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

var precisions = []reference.Precision{reference.Float64, reference.Float32, reference.BFloat16, reference.Float16}

// TestStagesAreThoseOfTheModel runs every stage alone on what the whole model put
// out before it: the same bits must come out.
func TestStagesAreThoseOfTheModel(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	tokens, err := fixtures.Tokens("toy", "window+1")
	require.NoError(t, err)
	positions := make([]int, len(tokens))
	for i := range positions {
		positions[i] = i
	}
	for _, p := range precisions {
		t.Run(string(p), func(t *testing.T) {
			whole, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: p, Taps: taps.All(m.Config)})
			require.NoError(t, err)
			runner, ok := backend.New(p).(conformance.StageRunner)
			require.True(t, ok)
			const layer = 1
			for _, name := range append([]string{taps.Embedding, taps.FinalNorm, taps.Logits}, taps.InBlock...) {
				if name == taps.Input {
					continue // no stage: the output of the block before
				}
				in := conformance.StageInput{
					Taps: []string{name}, Model: m, Layer: layer, Tokens: tokens, Positions: positions, Inputs: map[string]tensor.Tensor{},
				}
				for _, read := range conformance.Reads(name) {
					full := taps.Block(layer, read)
					if read == taps.FinalNorm {
						full = read
					}
					if name == taps.FinalNorm {
						full = taps.Block(m.Config.Layers-1, taps.Output)
					}
					in.Inputs[read] = whole[full]
				}
				results, err := runner.RunStage(t.Context(), in)
				require.NoError(t, err, name)
				want, ok := whole[name]
				if !ok {
					want = whole[taps.Block(layer, name)]
				}
				assert.Equal(t, want, results[name], name)
			}
		})
	}
}

func TestRunStageRefusesBadInput(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	runner := backend.New(reference.Float32).(conformance.StageRunner)
	logits := tensor.FromFloat32s([]int{1, m.Config.Experts}, make([]float32, m.Config.Experts))
	for name, in := range map[string]conformance.StageInput{
		"input q is missing":  {Taps: []string{taps.QRot}},
		"no stage makes it":   {Taps: []string{"nonsense"}},
		"names expert 8 of 8": {Taps: []string{taps.ExpertWeights}, Inputs: map[string]tensor.Tensor{taps.GateLogits: logits, taps.ExpertIndices: tensor.FromInt32s([]int{1, 4}, []int32{0, 1, 2, 8})}},
		"not reals":           {Taps: []string{taps.QRot}, Inputs: map[string]tensor.Tensor{taps.Q: tensor.FromInt32s([]int{1}, []int32{1})}},
	} {
		in.Model = m
		_, err := runner.RunStage(t.Context(), in)
		assert.ErrorContains(t, err, name)
	}
}

// TestDecodingIsTheWholeModel decodes in chunks of several sizes: in each
// precision the logits are the same bits as without a cache.
func TestDecodingIsTheWholeModel(t *testing.T) {
	tokens, err := fixtures.Tokens("toy", "full")
	require.NoError(t, err)
	for _, p := range precisions {
		instance, err := backend.New(p).Open(t.Context(), fixtures.Dir("toy"))
		require.NoError(t, err)
		defer instance.Close()
		whole, err := instance.Forward(t.Context(), tokens)
		require.NoError(t, err)
		for _, chunk := range []int{1, 7, len(tokens)} {
			decoding, err := instance.(conformance.Decoder).Decode(t.Context())
			require.NoError(t, err)
			var data []byte
			for from := 0; from < len(tokens); from += chunk {
				part, err := decoding.Step(t.Context(), tokens[from:min(from+chunk, len(tokens))])
				require.NoError(t, err)
				data = append(data, part.Data...)
			}
			assert.Equal(t, whole[taps.Logits].Data, data, "%s in chunks of %d", p, chunk)
			require.NoError(t, decoding.Close())
		}
	}
}
