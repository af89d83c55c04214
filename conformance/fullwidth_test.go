//go:build twolayer || full

package conformance_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// The tiers at full width (gpt-oss-20b's): -tags twolayer runs two layers, -tags
// full all 24. Both run on a generated checkpoint, which is made on first use in
// the cache directory, against what OpenAI's torch model put out on it, layer by
// layer (tools/oracles/stream.py). With GPTOSS_CHECKPOINT they run on that model
// instead, or on its first two layers; the truth is then our own float64, which
// the generated checkpoint holds to torch.

const fullWidthTokens = 160 // beyond the window of 128

// routingDir is where the tables of the experts' choice are left: not among the
// report's files, which every run of this package's tests makes anew.
var routingDir = filepath.Join("..", "build", "routing")

// fullWidth is a checkpoint at full width with what it is compared with.
type fullWidth struct {
	model   *checkpoint.Model
	tokens  []int32
	samples golden.Samples                  // which elements are compared
	runs    map[reference.Precision]sampled // torch's, or the reference's own
	own     bool                            // runs are the reference's
}

// sampled is the part of a run that is compared: samples of its reals, as in
// golden.Samples, and everybody's experts.
type sampled struct {
	reals   map[string][]float64
	gates   map[string][]float64 // gate logits of every token; not of torch's runs
	experts map[string][]int32
}

func newSampled() sampled {
	return sampled{map[string][]float64{}, map[string][]float64{}, map[string][]int32{}}
}

// isSampled reports whether samples of a tap are stored.
func isSampled(full string) bool {
	_, name := taps.Split(full)
	return slices.Contains([]string{taps.GateLogits, taps.ExpertIndices, taps.PostAttention, taps.Output, taps.FinalNorm, taps.Logits}, name)
}

// keep stores what is compared of a tap.
func (s sampled) keep(o golden.Samples, full string, width int, values func(i int) float64, n int) {
	if !isSampled(full) {
		return
	}
	rows, columns := o.Rows, o.Columns
	switch _, name := taps.Split(full); name {
	case taps.Logits:
		columns = o.Vocabulary
	case taps.GateLogits:
		s.gates[full] = make([]float64, n)
		for i := range n {
			s.gates[full][i] = values(i)
		}
		rows, columns = o.GateRows, make([]int, width)
		for c := range columns {
			columns[c] = c
		}
	}
	var some []float64
	for _, r := range rows {
		for _, c := range columns {
			some = append(some, values(r*width+c))
		}
	}
	s.reals[full] = some
}

// keepTensor is keep for a backend's tensor.
func (s sampled) keepTensor(t testing.TB, o golden.Samples, full string, value tensor.Tensor) {
	if taps.Integer(full) {
		indices, err := value.Int32s()
		require.NoError(t, err)
		s.experts[full] = indices
		return
	}
	reals, err := value.Float64s()
	require.NoError(t, err)
	s.keep(o, full, value.Shape[len(value.Shape)-1], func(i int) float64 { return reals[i] }, len(reals))
}

// openFullWidth opens or makes the checkpoint, and reads torch's runs.
func openFullWidth(t *testing.T, name string, layers int) fullWidth {
	t.Helper()
	f := fullWidth{runs: map[reference.Precision]sampled{}}
	var err error
	f.samples, err = golden.ReadSamples(name)
	require.NoError(t, err)
	path := os.Getenv("GPTOSS_CHECKPOINT")
	f.own = path != ""
	if path == "" {
		path = generated(t, layers)
	}
	model, err := checkpoint.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { model.Close() })
	if f.own && name == "twolayer" {
		model, err = model.Cut(layers)
		require.NoError(t, err)
	}
	f.model = model
	f.tokens = fixtures.Draw(1, "prompt.full", fullWidthTokens, model.Config.VocabSize)
	if f.own {
		for i := range f.samples.Columns {
			f.samples.Columns[i] %= model.Config.HiddenSize
		}
		for i := range f.samples.Vocabulary {
			f.samples.Vocabulary[i] %= model.Config.VocabSize
		}
		return f
	}
	require.Equal(t, f.samples.Tokens, f.tokens, "the oracle ran on other tokens: run tools/oracles/stream.py again")
	start := time.Now()
	digest, err := model.Digest(t.Context())
	require.NoError(t, err)
	require.Equal(t, f.samples.Digest, digest, "%s is not the checkpoint that torch ran on: delete it, and it is made again", path)
	t.Logf("%s: digest checked in %.0f s", path, time.Since(start).Seconds())
	for _, p := range []reference.Precision{reference.Float64, reference.Float32, reference.BFloat16} {
		f.runs[p] = readSampled(t, f.samples, p)
	}
	return f
}

// generated returns the cached checkpoint, which it makes if it is missing.
func generated(t *testing.T, layers int) string {
	cache, err := library.CacheDir()
	require.NoError(t, err)
	dir := filepath.Join(cache, "checkpoints", fixtures.CacheName("20b", layers, 1))
	if _, err := os.Stat(filepath.Join(dir, fixtures.ConfigFile)); err == nil {
		return dir
	}
	start := time.Now()
	require.NoError(t, fixtures.Synthesize(t.Context(), fixtures.GPTOSS20B(layers), 1, fixtures.Deep, dir))
	t.Logf("%s: made in %.0f s", dir, time.Since(start).Seconds())
	return dir
}

func readSampled(t *testing.T, o golden.Samples, p reference.Precision) sampled {
	tensors, err := o.Load(string(p))
	require.NoError(t, err)
	s := newSampled()
	for name, value := range tensors {
		if taps.Integer(name) {
			s.experts[name], err = value.Int32s()
		} else {
			s.reals[name], err = value.Float64s()
		}
		require.NoError(t, err)
	}
	return s
}

// runReference runs the reference in one precision and returns what is compared.
// Each block's stages are judged as soon as it is done, so that no more than one
// block's taps are in memory.
func (f fullWidth) runReference(t *testing.T, p reference.Precision, judgeStages bool) sampled {
	t.Helper()
	switch p {
	case reference.Float32:
		return observeRun(t, f, p, reference.Single(), tensor.FromFloat32s, judgeStages)
	case reference.Float64:
		return observeRun(t, f, p, reference.Exact(), tensor.FromFloat64s, judgeStages)
	default:
		return observeRun(t, f, p, reference.Short(p.Format()), tensor.FromFloat64s, judgeStages)
	}
}

func observeRun[F reference.Float](t *testing.T, f fullWidth, p reference.Precision, a reference.Arithmetic[F], store func([]int, []F) tensor.Tensor, judgeStages bool) sampled {
	s := newSampled()
	block := map[string]tensor.Tensor{} // taps of the block that runs, and what it starts from
	worst := map[string]float64{}
	start := time.Now()
	stages := func(last string) {
		if !judgeStages {
			return
		}
		findings, err := conformance.JudgeStages(t.Context(), f.model, f.tokens, conformance.Subject{Precision: p, Taps: block})
		require.NoError(t, err)
		for _, finding := range findings {
			worst[finding.Stage] = max(worst[finding.Stage], finding.Ratio)
			if finding.Verdict != conformance.Pass {
				t.Errorf("%s: %s", p, finding)
			}
		}
		value := block[last]
		block = map[string]tensor.Tensor{last: value}
	}
	m := reference.New(f.model, a)
	_, err := m.Forward(t.Context(), f.tokens, nil, reference.Observer[F]{
		Reals: func(name string, values []F) {
			s.keep(f.samples, name, len(values)/len(f.tokens), func(i int) float64 { return float64(values[i]) }, len(values))
			layer, tap := taps.Split(name)
			if judgeStages && name != taps.Logits { // the logits' bound would take 93 GFLOP more
				shape, err := taps.Shape(f.model.Config, name, len(f.tokens))
				require.NoError(t, err)
				block[name] = store(shape, values)
			}
			if tap == taps.Output {
				stages(name)
				t.Logf("%s: layer %d of %d after %.1f s", p, layer+1, f.model.Config.Layers, time.Since(start).Seconds())
			}
			if tap == taps.FinalNorm {
				stages(name)
			}
		},
		Integers: func(name string, values []int32) {
			s.experts[name] = values
			shape, err := taps.Shape(f.model.Config, name, len(f.tokens))
			require.NoError(t, err)
			block[name] = tensor.FromInt32s(shape, values)
		},
	})
	require.NoError(t, err)
	for _, stage := range conformance.Stages {
		if ratio, ok := worst[stage]; ok {
			t.Logf("%s: %s: worst error is %.2g of its bound", p, stage, ratio)
		}
	}
	return s
}

// runGraph exports the model with an operator set, runs it, and returns what is
// compared.
func (f fullWidth) runGraph(t *testing.T, operators exporter.Operators, judgeStages bool) sampled {
	t.Helper()
	directory := t.TempDir()
	path := filepath.Join(directory, "m.onnx")
	start := time.Now()
	require.NoError(t, exporter.Export(t.Context(), f.model, path, exporter.Options{
		Operators: operators, HiddenStates: true, BlockDebug: true,
	}))
	t.Logf("exported in %.1f s", time.Since(start).Seconds())
	session, err := onnxruntime.Open(path, onnxruntime.Options{})
	require.NoError(t, err)
	defer session.Close()
	var wanted []string
	for _, name := range session.Outputs() {
		if isSampled(name) || judgeStages {
			wanted = append(wanted, name)
		}
	}
	start = time.Now()
	results, err := session.RunTaps(t.Context(), f.tokens, wanted)
	require.NoError(t, err)
	t.Logf("ran in %.1f s", time.Since(start).Seconds())
	s := newSampled()
	for name, value := range results {
		s.keepTensor(t, f.samples, name, value)
	}
	if judgeStages {
		delete(results, taps.Logits) // as in observeRun
		findings, err := conformance.JudgeStages(t.Context(), f.model, f.tokens, conformance.Subject{Precision: reference.Float32, Taps: results})
		require.NoError(t, err)
		for _, finding := range findings {
			if finding.Verdict != conformance.Pass {
				t.Errorf("%s", finding)
			}
		}
		t.Logf("%d taps judged by their stages' bounds", len(findings))
	}
	return s
}

// namedRun is a run with the independent one that it is measured by.
type namedRun struct {
	name           string
	run, yardstick sampled
}

// runTier is both tiers' test.
func (f fullWidth) runTier(t *testing.T, routingFile string) {
	t.Helper()
	runs := map[string]sampled{}
	step := func(name string, run func(t *testing.T) sampled) {
		t.Run(name, func(t *testing.T) { runs[name] = run(t) })
	}
	step("reference-float64", func(t *testing.T) sampled {
		s := f.runReference(t, reference.Float64, false)
		if f.own {
			f.runs[reference.Float64] = s
		} else {
			compareExactly(t, s, f.runs[reference.Float64])
			f.runs[reference.Float64] = s // the same to 1e-12, and whole
		}
		return s
	})
	step("reference-float32", func(t *testing.T) sampled { return f.runReference(t, reference.Float32, false) })
	step("reference-bfloat16", func(t *testing.T) sampled { return f.runReference(t, reference.BFloat16, false) })
	twoLayers := f.model.Config.Layers <= 2
	step("onnx-onnxruntime", func(t *testing.T) sampled { return f.runGraph(t, exporter.OperatorsONNXRuntime, twoLayers) })
	step("onnx-portable", func(t *testing.T) sampled { return f.runGraph(t, exporter.OperatorsPortable, twoLayers) })
	f.compare(t, runs, routingFile)
	for _, p := range []reference.Precision{reference.Float32, reference.BFloat16} {
		t.Run("stages/reference-"+string(p), func(t *testing.T) { f.runReference(t, p, true) })
	}
}

// compare measures every run that was made by an independent one in the same
// precision.
func (f fullWidth) compare(t *testing.T, runs map[string]sampled, routingFile string) {
	truth, single, short := f.runs[reference.Float64], f.runs[reference.Float32], f.runs[reference.BFloat16]
	yardsticks := map[string]sampled{
		"reference-float32": single, "onnx-onnxruntime": single, "onnx-portable": single, "reference-bfloat16": short,
		"torch-float32": runs["reference-float32"], "torch-bfloat16": runs["reference-bfloat16"],
	}
	if f.own { // of a real checkpoint there are no runs of torch
		yardsticks = map[string]sampled{
			"reference-float32": runs["onnx-onnxruntime"],
			"onnx-onnxruntime":  runs["reference-float32"], "onnx-portable": runs["reference-float32"],
		}
	}
	runs["torch-float32"], runs["torch-bfloat16"] = single, short
	var named []namedRun
	for _, name := range slices.Sorted(maps.Keys(yardsticks)) {
		if len(runs[name].reals) > 0 && len(yardsticks[name].reals) > 0 { // -run may leave some out
			named = append(named, namedRun{name, runs[name], yardsticks[name]})
		}
	}
	if len(truth.gates) == 0 {
		return
	}
	for _, r := range named {
		t.Run("drift/"+r.name, func(t *testing.T) { f.compareDrift(t, r.run, r.yardstick, truth) })
	}
	t.Run("routing", func(t *testing.T) { f.reportRouting(t, routingFile, truth, named) })
}
