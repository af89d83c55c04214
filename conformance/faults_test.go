package conformance_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// The tests in this file test the tester: every fault of the catalogue, on the
// reference and as an ONNX graph, goes through the same judge that users run, and
// must fail, at the tap and in the layer where it acts, and be named.

// proving is an input that faults are looked for on.
type proving struct {
	fixture, prompt string
	weights         *checkpoint.Model
	tokens          []int32

	once  sync.Once
	right map[string]tensor.Tensor // float64
}

// provingGround lists the inputs, those that show most at the least cost first. A
// fault is tried on one after the other until it shows; one that shows on none is
// a hole in the fixtures, and fails.
func provingGround(t *testing.T) []*proving {
	t.Helper()
	list := []*proving{
		{fixture: "toy", prompt: "full"}, {fixture: "edge", prompt: "short"}, {fixture: "edge", prompt: "full"}, {fixture: "toy128", prompt: "full"},
	}
	for _, p := range list {
		weights, err := checkpoint.Open(fixtures.Dir(p.fixture))
		require.NoError(t, err)
		t.Cleanup(func() { weights.Close() })
		p.weights = weights
		p.tokens, err = fixtures.Tokens(p.fixture, p.prompt)
		require.NoError(t, err)
	}
	return list
}

// engine makes a subject with a fault in it.
type engine struct {
	name      string
	precision reference.Precision
	run       func(t *testing.T, f faults.Fault, p *proving) map[string]tensor.Tensor
}

func faultyEngines() []engine {
	return []engine{
		{"reference-float32", reference.Float32, func(t *testing.T, f faults.Fault, p *proving) map[string]tensor.Tensor {
			return tapsOf(t, faults.Apply(f, reference.New(p.weights, reference.Single())), p.tokens)
		}},
		{"reference-bfloat16", reference.BFloat16, func(t *testing.T, f faults.Fault, p *proving) map[string]tensor.Tensor {
			arithmetic := reference.Short(reference.BFloat16.Format())
			return tapsOf(t, faults.Apply(f, reference.New(p.weights, arithmetic)), p.tokens)
		}},
		{"onnxruntime-float32", reference.Float32, graphTaps},
	}
}

// TestEveryFaultIsCaughtAndNamed is the proof that the suite works. Half the usual
// number of perturbed runs has to do: with all taps at hand the derived bounds
// decide, and there are 300 subjects to judge.
func TestEveryFaultIsCaughtAndNamed(t *testing.T) {
	ground := provingGround(t)
	memory := new(conformance.Memory)
	require.GreaterOrEqual(t, len(faults.All()), 50, "the catalogue has shrunk")
	for _, f := range faults.All() {
		for i, form := range append([]faults.Fault{f}, f.Variants...) {
			if form.Cached {
				continue // TestCacheFaultsAreCaughtAndNamed
			}
			acts := firstDifferences(form) // the same for every engine
			for _, e := range faultyEngines() {
				t.Run(fmt.Sprintf("%s/%d/%s", f.ID, i, e.name), func(t *testing.T) {
					t.Parallel()
					for _, p := range ground {
						results := e.run(t, form, p)
						v, err := conformance.Judge(t.Context(), p.weights, p.tokens,
							conformance.Subject{Precision: e.precision, Taps: results}, conformance.JudgeOptions{Memory: memory, Samples: 3})
						require.NoError(t, err)
						if v.Word != conformance.Fail {
							continue
						}
						requireNamed(t, form, acts(t, p), v)
						return
					}
					t.Errorf("no fixture shows %s to the judge", f.ID)
				})
			}
		}
	}
}

// requireNamed checks that a verdict says where and why.
func requireNamed(t *testing.T, f faults.Fault, acts string, v *conformance.Verdict) {
	t.Helper()
	_, tap := taps.Split(v.FirstDivergence)
	require.Equal(t, f.Tap, tap, "%s", v.Reason)
	require.Equal(t, acts, v.FirstDivergence, "%s", v.Reason)
	require.GreaterOrEqual(t, ownRatio(f, v), 10.0, "no more than ten times what rounding explains: the bound is loose, or the fixture weak")
	require.NotNil(t, v.Diagnosis)
	require.Empty(t, v.Diagnosis.Layers, "it is in all layers")
	named := append([]string{v.Diagnosis.ID()}, v.Diagnosis.Equals...)
	require.Contains(t, named, f.ID, "%s", v.Reason)
	if v.Diagnosis.ID() != f.ID {
		require.Positive(t, f.Special, "named %s instead", v.Diagnosis.ID())
	}
}

// ownRatio is the largest error ÷ bound at a fault's own tap, judged by itself.
func ownRatio(f faults.Fault, v *conformance.Verdict) float64 {
	largest := 0.0
	for _, finding := range v.Findings {
		if _, tap := taps.Split(finding.Tap); tap == f.Tap && finding.Method != conformance.FreeRunning {
			largest = max(largest, finding.Ratio)
		}
	}
	return largest
}

// firstDifferences returns a function that finds the first tap that a fault
// changes in float64 by more than rounding, in whole runs, and remembers it.
func firstDifferences(f faults.Fault) func(t *testing.T, p *proving) string {
	var mutex sync.Mutex
	found := map[*proving]string{}
	return func(t *testing.T, p *proving) string {
		mutex.Lock()
		defer mutex.Unlock()
		if _, ok := found[p]; !ok {
			found[p] = firstDifference(t, f, p)
		}
		return found[p]
	}
}

func firstDifference(t *testing.T, f faults.Fault, p *proving) string {
	t.Helper()
	p.once.Do(func() { p.right = tapsOf(t, reference.New(p.weights, reference.Exact()), p.tokens) })
	wrong := tapsOf(t, faults.Apply(f, reference.New(p.weights, reference.Exact())), p.tokens)
	for _, name := range taps.All(p.weights.Config) {
		if taps.Integer(name) {
			if !slices.Equal(p.right[name].Data, wrong[name].Data) {
				return name
			}
			continue
		}
		r, err := p.right[name].Float64s()
		require.NoError(t, err)
		w, err := wrong[name].Float64s()
		require.NoError(t, err)
		for i := range r {
			if d := r[i] - w[i]; d > 1e-9 || d < -1e-9 || d != d { // a million roundings of float64
				return name
			}
		}
	}
	return ""
}

// TestCacheFaultsAreCaughtAndNamed: faults of the KV cache, from the logits of
// decoding token by token.
func TestCacheFaultsAreCaughtAndNamed(t *testing.T) {
	ground := provingGround(t)
	tried := 0
	for _, f := range faults.All() {
		if !f.Cached {
			continue
		}
		tried++
		t.Run(f.ID, func(t *testing.T) {
			t.Parallel()
			for _, p := range ground {
				// A prompt, a second one that crosses toy's window of 12, then token by token.
				chunks := []int{5, 9, 1}
				v, err := conformance.Judge(t.Context(), p.weights, p.tokens,
					conformance.Subject{Precision: reference.Float32, Taps: decodedLogits(t, f, p, chunks)}, conformance.JudgeOptions{Chunks: chunks})
				require.NoError(t, err)
				if v.Word != conformance.Fail {
					continue
				}
				require.Equal(t, f.ID, v.Diagnosis.ID(), "%s", v.Diagnosis)
				return
			}
			t.Errorf("no fixture shows %s to the judge", f.ID)
		})
	}
	require.GreaterOrEqual(t, tried, 2, "kv-cache-position and kv-cache-window at the least")
}

// TestPairsAreNamed: two faults at a time, from all taps and from logits alone.
func TestPairsAreNamed(t *testing.T) {
	p := provingGround(t)[0]
	for _, pair := range []string{"sinks-dropped+window-ignored", "rope-no-yarn+window-ignored", "qkv-order+swiglu-alpha-1"} {
		first, second, _ := strings.Cut(pair, "+")
		model := reference.New(p.weights, reference.Single())
		for _, id := range []string{first, second} {
			f, ok := faults.ByID(id)
			require.True(t, ok, id)
			model = faults.Apply(f, model)
		}
		all := tapsOf(t, model, p.tokens)
		for name, results := range map[string]map[string]tensor.Tensor{
			"taps": all, "logits": {taps.Logits: all[taps.Logits]},
		} {
			t.Run(pair+"/"+name, func(t *testing.T) {
				t.Parallel()
				v, err := conformance.Judge(t.Context(), p.weights, p.tokens,
					conformance.Subject{Precision: reference.Float32, Taps: results}, conformance.JudgeOptions{})
				require.NoError(t, err)
				require.Equal(t, pair, v.Diagnosis.Name(), "%s", v.Diagnosis)
			})
		}
	}
}

// tapsOf runs a model and keeps every tap.
func tapsOf[F reference.Float](t *testing.T, m reference.Model[F], tokens []int32) map[string]tensor.Tensor {
	t.Helper()
	results, err := reference.Observe(t.Context(), m, tokens)
	require.NoError(t, err)
	return results
}

func decodedLogits(t *testing.T, f faults.Fault, p *proving, chunks []int) map[string]tensor.Tensor {
	t.Helper()
	model := faults.Apply(f, reference.New(p.weights, reference.Single()))
	var cache reference.Cache[float32]
	var logits []float32
	for i, from := 0, 0; from < len(p.tokens); i++ {
		to := min(from+chunks[min(i, len(chunks)-1)], len(p.tokens))
		step, err := model.Forward(t.Context(), p.tokens[from:to], &cache, reference.Observer[float32]{})
		require.NoError(t, err)
		logits = append(logits, step...)
		from = to
	}
	return map[string]tensor.Tensor{
		taps.Logits: tensor.FromFloat32s([]int{len(p.tokens), p.weights.Config.VocabSize}, logits),
	}
}

// graphTaps exports a model with a fault and runs the graph.
func graphTaps(t *testing.T, f faults.Fault, p *proving) map[string]tensor.Tensor {
	t.Helper()
	weights := p.weights
	if f.Checkpoint != nil {
		weights = f.Checkpoint(weights)
	}
	stages := exporter.Portable()
	if f.Graph != nil {
		f.Graph(&stages)
	}
	path := filepath.Join(t.TempDir(), "faulty.onnx")
	require.NoError(t, exporter.Export(context.Background(), weights, path, exporter.Options{
		Experts: exporter.ExpertsDense, Stages: &stages, HiddenStates: true, BlockDebug: true,
	}))
	session, err := onnxruntime.Open(path, onnxruntime.Options{Threads: 1})
	require.NoError(t, err)
	defer session.Close()
	results, err := session.Run(t.Context(), p.tokens)
	require.NoError(t, err)
	return results
}
