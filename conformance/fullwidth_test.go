//go:build twolayer || full

package conformance_test

import (
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// compareExactly holds the reference's float64 to torch's: on every tap max |Δ| ≤
// 1e-12·max(1, max |tap|) (the suite's definition of the truth), and the same
// experts.
func compareExactly(t *testing.T, got, want sampled) {
	t.Helper()
	for name, values := range want.reals {
		require.Len(t, got.reals[name], len(values), name)
		size, worst := 1.0, 0.0
		for i, v := range values {
			size, worst = max(size, math.Abs(v)), max(worst, math.Abs(v-got.reals[name][i]))
		}
		if !(worst <= 1e-12*size) {
			t.Errorf("%s: differs from torch's float64 by %.3g, of a size of %.3g", name, worst, size)
		}
	}
	for name, indices := range want.experts {
		for row := 0; row < len(indices); row += 4 {
			if !sameExperts(indices[row:row+4], got.experts[name][row:row+4]) {
				t.Errorf("%s: token %d goes to %v, in torch to %v", name, row/4, got.experts[name][row:row+4], indices[row:row+4])
			}
		}
	}
}

func sameExperts(a, b []int32) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// driftFactor is how many times another implementation's error a run's error may
// be: the judge's factor on the spread of implementations (conformance/budget.go).
const driftFactor = 4

// flip is a token that went to other experts than the truth's.
type flip struct{ layer, token int }

func (f fullWidth) flips(run, truth sampled) (flips []flip) {
	k := f.model.Config.ExpertsPerToken
	for layer := range f.model.Config.Layers {
		name := taps.Block(layer, taps.ExpertIndices)
		got, want := run.experts[name], truth.experts[name]
		for token := range len(want) / k {
			if !sameExperts(got[token*k:][:k], want[token*k:][:k]) {
				flips = append(flips, flip{layer, token})
			}
		}
	}
	return flips
}

// rowsBefore returns which rows of a tap no flip has reached: the flipped token's
// own row differs from that block's output on, and later tokens', which attend to
// it, from the next block on.
func (f fullWidth) rowsBefore(flips []flip, full string) (rows []int) {
	layer, tap := taps.Split(full)
	if layer < 0 {
		layer = f.model.Config.Layers
	}
	tokens := f.samples.Rows
	if tap == taps.GateLogits {
		tokens = f.samples.GateRows
	}
	for row, token := range tokens {
		reached := slices.ContainsFunc(flips, func(at flip) bool {
			return at.layer < layer && at.token <= token || at.layer == layer && tap == taps.Output && at.token == token
		})
		if !reached {
			rows = append(rows, row)
		}
	}
	return rows
}

// compareDrift holds a run's distance from the float64 truth to that of an
// independent implementation in the same precision, tap by tap: rms over the rows
// that no flip has reached in either, or, where no such row is left, the rms of
// the rows at three quantiles.
func (f fullWidth) compareDrift(t *testing.T, got, yardstick, truth sampled) {
	t.Helper()
	require.NotEmpty(t, got.reals)
	flips := append(f.flips(got, truth), f.flips(yardstick, truth)...)
	worst, at := 0.0, ""
	check := func(name string, ours, theirs float64) {
		if !(ours <= driftFactor*theirs) {
			t.Errorf("%s: rms error %.3g, %.1f times that of the independent implementation", name, ours, ours/theirs)
		}
		if ratio := ours / (driftFactor * theirs); ratio > worst {
			worst, at = ratio, name
		}
	}
	for name, want := range truth.reals {
		require.Len(t, got.reals[name], len(want), name)
		require.Len(t, yardstick.reals[name], len(want), name)
		rows := len(f.samples.Rows)
		if _, tap := taps.Split(name); tap == taps.GateLogits {
			rows = len(f.samples.GateRows)
		}
		ours, theirs := rowDistances(got.reals[name], want, rows), rowDistances(yardstick.reals[name], want, rows)
		if clean := f.rowsBefore(flips, name); len(clean) > 0 {
			check(name, rootMeanSquare(ours, clean), rootMeanSquare(theirs, clean))
			continue
		}
		slices.Sort(ours)
		slices.Sort(theirs)
		for _, quarter := range []int{1, 2, 3} {
			check(name, ours[quarter*rows/4], theirs[quarter*rows/4])
		}
	}
	t.Logf("%d flips; rms errors: at most %.2g of the budget, at %s; logits %.3g", len(flips), worst, at, rmsDistance(got.reals[taps.Logits], truth.reals[taps.Logits]))
}

// rowDistances is the rms of every row's error.
func rowDistances(got, want []float64, rows int) []float64 {
	width := len(want) / rows
	out := make([]float64, rows)
	for r := range out {
		out[r] = rmsDistance(got[r*width:][:width], want[r*width:][:width])
	}
	return out
}

func rootMeanSquare(values []float64, rows []int) float64 {
	sum := 0.0
	for _, r := range rows {
		sum += values[r] * values[r]
	}
	return math.Sqrt(sum / float64(len(rows)))
}

func rmsDistance(a, b []float64) float64 {
	sum := 0.0
	for i, v := range a {
		sum += (v - b[i]) * (v - b[i])
	}
	return math.Sqrt(sum / float64(len(a)))
}

// routingRow compares the experts of one layer of one run with the truth's.
type routingRow struct {
	matched, explained, following, unexplained int
	margin, allowed                            float64 // largest margin of a flip, and what is allowed
	marginAfter, allowedAfter                  float64 // the same, where an earlier flip has been
	logits, weights                            float64 // largest differences of gate logits and gate weights
}

// routingOf judges every flip of a run: the truth's margin between the chosen and
// the passed-over expert must be less than two gate logits may be off together.
// How far they may be off is what an independent implementation in the same
// precision shows at that layer: its largest error in the rows that none of its
// own flips has reached (all rows if there is no such), times driftFactor. A token
// that an earlier flip has reached has other inputs than the truth: there the
// independent implementation's error in all rows counts.
func (f fullWidth) routingOf(layer int, got, yardstick, truth sampled) routingRow {
	c := struct{ experts, k int }{f.model.Config.Experts, f.model.Config.ExpertsPerToken}
	gate, indices := taps.Block(layer, taps.GateLogits), taps.Block(layer, taps.ExpertIndices)
	exact := truth.gates[gate]
	var r routingRow
	own, clean := f.flips(got, truth), f.rowsBefore(f.flips(yardstick, truth), gate)
	for i, v := range yardstick.reals[gate] {
		allowed := 2 * driftFactor * math.Abs(v-truth.reals[gate][i])
		r.allowedAfter = max(r.allowedAfter, allowed)
		if len(clean) == 0 || slices.Contains(clean, i/c.experts) {
			r.allowed = max(r.allowed, allowed)
		}
	}
	for i, v := range got.reals[gate] {
		r.logits = max(r.logits, math.Abs(v-truth.reals[gate][i]))
	}
	for token := range len(exact) / c.experts {
		row := exact[token*c.experts:][:c.experts]
		chosen, right := got.experts[indices][token*c.k:][:c.k], truth.experts[indices][token*c.k:][:c.k]
		if sameExperts(chosen, right) {
			r.matched++
			if len(got.gates[gate]) == 0 {
				continue
			}
			ours := gateWeights(got.gates[gate][token*c.experts:][:c.experts], chosen)
			for e, w := range gateWeights(row, right) {
				r.weights = max(r.weights, math.Abs(w-ours[e]))
			}
			continue
		}
		margin := 0.0
		for _, a := range right {
			for _, b := range chosen {
				if !slices.Contains(chosen, a) && !slices.Contains(right, b) {
					margin = max(margin, row[a]-row[b])
				}
			}
		}
		after := slices.ContainsFunc(own, func(at flip) bool { return at.layer < layer && at.token <= token })
		if after {
			r.marginAfter = max(r.marginAfter, margin)
		} else {
			r.margin = max(r.margin, margin)
		}
		switch {
		case !after && margin <= r.allowed:
			r.explained++
		case after && margin <= r.allowedAfter:
			r.following++
		default:
			r.unexplained++
		}
	}
	return r
}

// gateWeights is the softmax over the chosen logits, by expert.
func gateWeights(logits []float64, chosen []int32) map[int32]float64 {
	weights, sum := map[int32]float64{}, 0.0
	for _, e := range chosen {
		weights[e] = math.Exp(logits[e])
		sum += weights[e]
	}
	for e := range weights {
		weights[e] /= sum
	}
	return weights
}

// reportRouting fails for unexplained flips and writes the table of all runs.
func (f fullWidth) reportRouting(t *testing.T, file string, truth sampled, runs []namedRun) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "# Routing at %d layers\n\n", f.model.Config.Layers)
	fmt.Fprintf(&b, "%d tokens, against float64. A flip is explained if the truth's margin is below what the gate logits of an independent implementation in the same precision show (%d times its largest error, for two logits); where an earlier flip has been, its errors after such flips count too.\n", len(f.tokens), driftFactor)
	for _, run := range runs {
		fmt.Fprintf(&b, "\n## %s\n\n| layer | same experts | explained | after an earlier flip | unexplained | largest margin | allowed | after a flip | allowed | gate logits off | gate weights off |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n", run.name)
		for layer := range f.model.Config.Layers {
			r := f.routingOf(layer, run.run, run.yardstick, truth)
			fmt.Fprintf(&b, "| %d | %.1f %% | %d | %d | %d | %s | %.2g | %s | %.2g | %.2g | %s |\n", layer,
				100*float64(r.matched)/float64(len(f.tokens)), r.explained, r.following, r.unexplained,
				orDash(r.margin), r.allowed, orDash(r.marginAfter), r.allowedAfter, r.logits, orDash(r.weights))
			if r.unexplained > 0 {
				t.Errorf("%s: layer %d: %d tokens go to other experts than rounding explains", run.name, layer, r.unexplained)
			}
		}
	}
	path := filepath.Join(routingDir, file)
	require.NoError(t, os.MkdirAll(routingDir, 0o755))
	require.NoError(t, os.WriteFile(path, []byte(b.String()), 0o644))
	t.Logf("%s written", path)
}

// orDash writes a number, or a dash where there was nothing to measure.
func orDash(x float64) string {
	if x == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2g", x)
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
