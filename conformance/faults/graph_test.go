package faults_test

import (
	"fmt"
	"math"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// TestStages: a fault is filed under the stage that the judge has for its tap.
func TestStages(t *testing.T) {
	for _, f := range faults.All() {
		for _, form := range append([]faults.Fault{f}, f.Variants...) {
			want := conformance.StageOf(form.Tap)
			if form.Cached {
				want = "generation"
			}
			assert.Equal(t, want, form.Stage, f.ID)
		}
	}
}

// shows is how much a fault must change the logits of a fixture, of their rms, to
// be looked for there: a thousand times what rounding in float32 does.
const shows = 1e-2

// TestGraphsHaveTheSameFault: exported with a fault, a graph computes what the
// reference with that fault computes, and not what the right one does.
func TestGraphsHaveTheSameFault(t *testing.T) {
	var models []model
	for _, name := range []string{"toy", "toy128", "edge"} {
		models = append(models, open(t, name))
	}
	for _, f := range faults.All() {
		for i, form := range append([]faults.Fault{f}, f.Variants...) {
			assert.Equal(t, form.Stages.Wide == nil, form.Graph == nil, "%s: graphs are forgotten", f.ID)
			if form.Graph == nil {
				continue // a changed checkpoint is exported like any other
			}
			// Outside of the experts it does not matter how these are stored.
			ways := []exporter.Experts{exporter.ExpertsDense}
			if form.Stage == "experts" {
				ways = append(ways, exporter.ExpertsPacked)
			}
			for _, experts := range ways {
				t.Run(fmt.Sprintf("%s/%d/%s", f.ID, i, experts), func(t *testing.T) {
					t.Parallel()
					for _, m := range models {
						truth := logits(t, m, faults.Apply(form, reference.New(m.weights, reference.Exact())), form.Cached)
						wrong := distance(m.right, truth)
						if wrong < shows {
							continue
						}
						graph := distance(m.graph(t, form, experts), truth)
						rounding := distance(logits(t, m, faults.Apply(form, reference.New(m.weights, reference.Single())), form.Cached), truth)
						t.Logf("%s: fault %.2g, graph %.2g, reference %.2g", m.name, wrong, graph, rounding)
						// Another order of summation may round a few times worse; a fault that was
						// not the same would be 100 times worse at least.
						assert.Less(t, graph, 10*rounding)
						assert.Less(t, rounding, shows/20)
						return
					}
					assert.Fail(t, "no fixture shows it")
				})
			}
		}
	}
}

// model is a fixture with its right logits in float64.
type model struct {
	name    string
	weights *checkpoint.Model
	tokens  []int32
	right   []float64
}

// calls takes the tokens apart: into the calls of a program with a cache where a
// fault needs one.
func (m model) calls(cached bool) [][]int32 {
	if !cached {
		return [][]int32{m.tokens}
	}
	first := len(m.tokens) * 3 / 5
	calls := [][]int32{m.tokens[:first], m.tokens[first : first+5]}
	for i := first + 5; i < len(m.tokens); i++ {
		calls = append(calls, m.tokens[i:i+1])
	}
	return calls
}

func open(t *testing.T, name string) model {
	t.Helper()
	weights, err := checkpoint.Open(fixtures.Dir(name))
	require.NoError(t, err)
	t.Cleanup(func() { weights.Close() })
	m := model{name: name, weights: weights}
	m.tokens, err = fixtures.Tokens(name, "full")
	require.NoError(t, err)
	m.right = logits(t, m, reference.New(weights, reference.Exact()), false)
	return m
}

func logits[F reference.Float](t *testing.T, m model, computed reference.Model[F], cached bool) []float64 {
	t.Helper()
	var all []float64
	var cache reference.Cache[F]
	for _, tokens := range m.calls(cached) {
		values, err := computed.Forward(t.Context(), tokens, &cache, reference.Observer[F]{})
		require.NoError(t, err)
		for _, v := range values {
			all = append(all, float64(v))
		}
	}
	return all
}

// graph exports the model with a fault and returns the logits of the graph.
func (m model) graph(t *testing.T, f faults.Fault, experts exporter.Experts) []float64 {
	t.Helper()
	weights := m.weights
	if f.Checkpoint != nil {
		weights = f.Checkpoint(weights)
	}
	stages := exporter.Portable()
	if f.Graph != nil {
		f.Graph(&stages)
	}
	path := filepath.Join(t.TempDir(), "faulty.onnx")
	options := exporter.Options{Experts: experts, Stages: &stages, KVCache: f.Cached}
	require.NoError(t, exporter.Export(t.Context(), weights, path, options))
	session, err := onnxruntime.Open(path, onnxruntime.Options{Threads: 1})
	require.NoError(t, err)
	defer session.Close()
	if !f.Cached {
		results, err := session.Run(t.Context(), m.tokens)
		require.NoError(t, err)
		values, err := results[taps.Logits].Float64s()
		require.NoError(t, err)
		return values
	}
	decoding, err := session.Decode()
	require.NoError(t, err)
	defer decoding.Close()
	var all []float64
	for _, tokens := range m.calls(true) {
		step, err := decoding.Step(t.Context(), tokens)
		require.NoError(t, err)
		values, err := step.Float64s()
		require.NoError(t, err)
		all = append(all, values...)
	}
	return all
}

// distance is the rms of the difference over the rms of b.
func distance(a, b []float64) float64 {
	var apart, whole float64
	for i, v := range b {
		apart += (a[i] - v) * (a[i] - v)
		whole += v * v
	}
	return math.Sqrt(apart / whole)
}
