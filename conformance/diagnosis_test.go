package conformance_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// partlyWrong runs the reference by hand, with a fault in some layers: every block
// is run by the right model or by the wrong one. It shares nothing with faults.In.
func partlyWrong[F reference.Float](t *testing.T, p *proving, a reference.Arithmetic[F], id string, layers ...int) map[string]tensor.Tensor {
	t.Helper()
	f, ok := faults.ByID(id)
	require.True(t, ok, id)
	right := reference.New(p.weights, a)
	wrong := faults.Apply(f, reference.New(p.weights, a))
	results := map[string]tensor.Tensor{}
	observer := reference.Observer[F]{
		Reals: func(name string, values []F) {
			shape, err := taps.Shape(p.weights.Config, name, len(p.tokens))
			require.NoError(t, err)
			wide := make([]float32, len(values)) // holds float32 and bfloat16 exactly
			for i, v := range values {
				wide[i] = float32(v)
			}
			results[name] = tensor.FromFloat32s(shape, wide)
		},
		Integers: func(name string, values []int32) {
			shape, err := taps.Shape(p.weights.Config, name, len(p.tokens))
			require.NoError(t, err)
			results[name] = tensor.FromInt32s(shape, values)
		},
	}
	var cache reference.Cache[F]
	x := right.Embed(t.Context(), p.tokens, observer)
	for i := range p.weights.Config.Layers {
		m := &right
		if slices.Contains(layers, i) {
			m = &wrong
		}
		x = m.Block(t.Context(), i, x, &cache, observer)
	}
	right.Logits(t.Context(), x, observer)
	return results
}

// TestFaultsInOneLayerAreNamed: from all taps, from the blocks' outputs and from
// logits alone.
func TestFaultsInOneLayerAreNamed(t *testing.T) {
	ground := provingGround(t)
	toy, edge := ground[0], ground[1]
	memory := new(conformance.Memory)
	for _, c := range []struct {
		*proving
		id    string
		layer int
	}{
		{toy, "sinks-dropped", 1}, {toy, "sinks-dropped", 2}, {toy, "window-one-too-many", 2}, {toy, "window-ignored", 0},
		{toy, "swiglu-gate-up-swapped", 0}, {toy, "rope-interleaved", 1}, {toy, "router-bias-dropped", 2},
		{toy, "mxfp4-nibbles-swapped", 1}, {toy, "rmsnorm-plus-one", 1},
		{edge, "sinks-dropped", 0}, {edge, "swiglu-gate-up-swapped", 2}, {edge, "router-bias-dropped", 1},
	} {
		all := partlyWrong(t, c.proving, reference.Single(), c.id, c.layer)
		outputs := maps.Clone(all)
		only(taps.Embedding, taps.Output)(outputs)
		for from, s := range map[string]conformance.Subject{
			"taps":          {Precision: reference.Float32, Taps: all},
			"taps/bfloat16": {Precision: reference.BFloat16, Taps: partlyWrong(t, c.proving, reference.Short(reference.BFloat16.Format()), c.id, c.layer)},
			"outputs":       {Precision: reference.Float32, Taps: outputs},
			"logits":        {Precision: reference.Float32, Taps: map[string]tensor.Tensor{taps.Logits: all[taps.Logits]}},
		} {
			t.Run(fmt.Sprintf("%s/%s/%d/%s", c.fixture, c.id, c.layer, from), func(t *testing.T) {
				t.Parallel()
				v, err := conformance.Judge(t.Context(), c.weights, c.tokens, s, conformance.JudgeOptions{Memory: memory, Samples: 3})
				require.NoError(t, err)
				require.Equal(t, conformance.Fail, v.Word)
				assert.Equal(t, c.id, v.Diagnosis.ID(), "%s", v.Diagnosis)
				assert.Equal(t, []int{c.layer}, v.Diagnosis.Layers, "%s", v.Diagnosis)
			})
		}
	}
}

// TestLayersAreReported: two of three layers, in words and in JSON.
func TestLayersAreReported(t *testing.T) {
	p := provingGround(t)[0]
	v, err := conformance.Judge(t.Context(), p.weights, p.tokens,
		conformance.Subject{Precision: reference.Float32, Taps: partlyWrong(t, p, reference.Single(), "sinks-dropped", 1, 2)}, conformance.JudgeOptions{Samples: 3})
	require.NoError(t, err)
	assert.Equal(t, "block_1.attn_core", v.FirstDivergence)
	assert.Equal(t, "sinks-dropped", v.Diagnosis.ID())
	assert.Equal(t, "sinks-dropped in layers 1, 2", v.Diagnosis.Name())
	assert.Contains(t, v.Diagnosis.String(), "it matches sinks-dropped in layers 1, 2, to")
	text, err := json.Marshal(v.Diagnosis)
	require.NoError(t, err)
	assert.Contains(t, string(text), `"faults":["sinks-dropped"],"layers":[1,2]`)
}

// TestTheSimplerFaultIsNamed: what a fault in all layers explains as well is not
// called a fault in one of them, in a model of one layer or of one windowed layer.
func TestTheSimplerFaultIsNamed(t *testing.T) {
	p := provingGround(t)[0]
	for layers, ids := range map[int][]string{1: {"sinks-dropped", "rope-interleaved", "window-ignored"}, 2: {"window-one-too-many", "window-ignored"}} {
		weights := *p.weights
		weights.Config.Layers, weights.Config.Sliding, weights.Blocks = layers, weights.Config.Sliding[:layers], weights.Blocks[:layers]
		small := &proving{fixture: p.fixture, weights: &weights, tokens: p.tokens}
		for _, id := range ids {
			all := partlyWrong(t, small, reference.Single(), id, 0)
			for _, results := range []map[string]tensor.Tensor{all, {taps.Logits: all[taps.Logits]}} {
				v, err := conformance.Judge(t.Context(), &weights, small.tokens,
					conformance.Subject{Precision: reference.Float32, Taps: results}, conformance.JudgeOptions{Samples: 3})
				require.NoError(t, err)
				assert.Equal(t, id, v.Diagnosis.Name(), "%d layers", layers)
			}
		}
	}
}

// TestTheNearestWindowIsNamed: one token beyond the window a window that is one
// too many and none at all are the same.
func TestTheNearestWindowIsNamed(t *testing.T) {
	p := provingGround(t)[0]
	window := p.weights.Config.SlidingWindow
	for beyond, want := range map[int]string{1: "window-one-too-many", 2: "window-ignored"} {
		short := &proving{fixture: p.fixture, weights: p.weights, tokens: p.tokens[:window+beyond]}
		f, _ := faults.ByID("window-ignored")
		all := tapsOf(t, faults.Apply(f, reference.New(short.weights, reference.Single())), short.tokens)
		for _, results := range []map[string]tensor.Tensor{all, {taps.Logits: all[taps.Logits]}} {
			v, err := conformance.Judge(t.Context(), short.weights, short.tokens,
				conformance.Subject{Precision: reference.Float32, Taps: results}, conformance.JudgeOptions{Samples: 3})
			require.NoError(t, err)
			require.Equal(t, conformance.Fail, v.Word)
			assert.Equal(t, want, v.Diagnosis.ID(), "%d tokens beyond the window", beyond)
			if beyond == 1 {
				assert.Equal(t, []string{"window-ignored", "window-hard-coded-128"}, v.Diagnosis.Equals)
			}
		}
	}
}

// TestDiagnosesAgree: on what explains both, with its layers.
func TestDiagnosesAgree(t *testing.T) {
	d := func(id string, layers []int, equals ...string) *conformance.Diagnosis {
		return &conformance.Diagnosis{Faults: []string{id}, Layers: layers, Equals: equals}
	}
	agreed := conformance.Agreed(d("sinks-dropped", []int{1}, "sinks-zero in layers 1, 12"), d("sinks-zero", []int{1, 12}))
	assert.Equal(t, []string{"sinks-zero"}, agreed.Faults)
	assert.Equal(t, []int{1, 12}, agreed.Layers)
	assert.Equal(t, "none", conformance.Agreed(d("sinks-dropped", []int{1}), d("sinks-dropped", nil)).Name())
	assert.Equal(t, "sinks-dropped", conformance.Agreed(nil, d("sinks-dropped", nil)).Name())
	pair := &conformance.Diagnosis{Faults: []string{"sinks-dropped", "window-ignored"}}
	assert.Equal(t, "sinks-dropped+window-ignored", conformance.Agreed(pair, pair).Name())
}

// TestDiagnosisStops: a cancelled judgement is an error, wherever it is, also among
// the faults in single layers.
func TestDiagnosisStops(t *testing.T) {
	p := provingGround(t)[0]
	all := partlyWrong(t, p, reference.Single(), "router-bias-dropped", 2)
	outputs := maps.Clone(all)
	only(taps.Embedding, taps.Output)(outputs)
	for name, results := range map[string]map[string]tensor.Tensor{"logits": {taps.Logits: all[taps.Logits]}, "outputs": outputs} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			judge := func(after int64) (blocks int64, err error) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var count atomic.Int64
				ctx = conformance.WithProgress(ctx, func() {
					if count.Add(1) == after {
						cancel()
					}
				})
				_, err = conformance.Judge(ctx, p.weights, p.tokens, conformance.Subject{Precision: reference.Float32, Taps: results}, conformance.JudgeOptions{Samples: 3})
				return count.Load(), err
			}
			blocks, err := judge(-1)
			require.NoError(t, err)
			for part := range int64(8) {
				_, err := judge(1 + part*blocks/8)
				require.ErrorIs(t, err, context.Canceled, "after %d of %d blocks", 1+part*blocks/8, blocks)
			}
		})
	}
}
