package onnxruntime

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/exporter/pairwise"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// stranger is a checkpoint of widths that no fixture has: one key/value head,
// an odd number of layers, three experts of seven, a window of 5.
func stranger(t *testing.T) *checkpoint.Model {
	t.Helper()
	c := config.Config{
		Layers: 3, Experts: 7, ExpertsPerToken: 3, VocabSize: 100,
		HiddenSize: 96, IntermediateSize: 64, HeadDim: 32, Heads: 5, KVHeads: 1,
		SlidingWindow: 5, Sliding: config.Alternating(3),
		InitialContextLength: 4096, RopeTheta: 150000, RopeScalingFactor: 32, RopeNTKAlpha: 1, RopeNTKBeta: 32,
		SwiGLULimit: 7, SwiGLUAlpha: config.OpenAISwiGLUAlpha, NormEpsilon: config.OpenAINormEpsilon,
	}
	dir := filepath.Join(t.TempDir(), "stranger")
	require.NoError(t, fixtures.Synthesize(t.Context(), c, 7, fixtures.Healthy, dir))
	m, err := checkpoint.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// Every combination of the table must run, at some level of optimization, and
// pass the judge; with a cache also when it decodes token by token.
func TestEveryPairOfOptionsIsRight(t *testing.T) {
	m := stranger(t)
	tokens := make([]int32, pairwise.Length)
	for i := range tokens {
		tokens[i] = int32((i*37 + 11) % m.Config.VocabSize)
	}
	for i, c := range pairwise.Table() {
		t.Run(c.Name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "m.onnx")
			require.NoError(t, exporter.Export(t.Context(), m, path, c.Options))
			s := open(t, path, Options{Threads: 1, GraphOptimization: Levels[i%len(Levels)]})
			precision := reference.Float32
			if c.Options.Precision != "" {
				precision = reference.Precision(c.Options.Precision)
			}
			judge := func(results map[string]tensor.Tensor) {
				v, err := conformance.Judge(t.Context(), m, tokens, conformance.Subject{Precision: precision, Taps: results},
					conformance.JudgeOptions{Catalogue: []faults.Fault{}})
				require.NoError(t, err)
				require.Contains(t, []conformance.Word{conformance.Pass, conformance.Partial}, v.Word, v.Reason)
			}
			results, err := s.Run(t.Context(), tokens)
			require.NoError(t, err)
			if c.Options.LastLogitsOnly {
				require.Equal(t, []int{1, m.Config.VocabSize}, results[taps.Logits].Shape)
				ours, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: precision})
				require.NoError(t, err)
				rows, err := ours[taps.Logits].Float32s()
				require.NoError(t, err)
				last, err := results[taps.Logits].Float32s()
				require.NoError(t, err)
				judge(map[string]tensor.Tensor{
					taps.Logits: tensor.FromFloat32s([]int{len(tokens), m.Config.VocabSize}, append(rows[:len(rows)-len(last)], last...)),
				})
				// The reference's logits do not follow from the graph's taps.
				delete(results, taps.Logits)
			}
			if len(results) > 0 {
				judge(results)
			}
			if !s.HasCache() {
				return
			}
			d, err := s.Decode()
			require.NoError(t, err)
			defer d.Close()
			var logits []float32
			for i := range tokens {
				step, err := d.Step(t.Context(), tokens[i:i+1])
				require.NoError(t, err)
				values, err := step.Float32s()
				require.NoError(t, err)
				logits = append(logits, values...)
			}
			judge(map[string]tensor.Tensor{taps.Logits: tensor.FromFloat32s([]int{len(tokens), m.Config.VocabSize}, logits)})
		})
	}
}
