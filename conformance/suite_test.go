package conformance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// engine is an implementation for the suite's own tests: the reference, with
// something done to what it puts out.
type engine struct {
	name  string
	fail  error // of Open
	spoil func(map[string]tensor.Tensor) error
}

func (e engine) Name() string                   { return e.name }
func (e engine) Precision() reference.Precision { return reference.Float32 }

func (e engine) Open(_ context.Context, dir string) (Instance, error) {
	if e.fail != nil {
		return nil, e.fail
	}
	m, err := checkpoint.Open(dir)
	return running{e, m}, err
}

type running struct {
	engine
	model *checkpoint.Model
}

func (r running) Close() error { return r.model.Close() }

func (r running) Forward(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error) {
	results, err := reference.Run(ctx, r.model, tokens, reference.Options{Precision: reference.Float32, Taps: taps.All(r.model.Config)})
	if err == nil && r.spoil != nil {
		err = r.spoil(results)
	}
	return results, err
}

// toy is one prompt that is quick to run.
func toy(t *testing.T) input {
	t.Helper()
	tokens, err := fixtures.Tokens("toy", "window+1")
	require.NoError(t, err)
	return input{"toy", fixtures.Prompt{Name: "window+1", Tokens: tokens}}
}

// change adds to one element of a float32 tap.
func change(name string, by float32) func(map[string]tensor.Tensor) error {
	return func(results map[string]tensor.Tensor) error {
		values, err := results[name].Float32s()
		if err != nil {
			return err
		}
		values[5] += by
		results[name] = tensor.FromFloat32s(results[name].Shape, values)
		return nil
	}
}

func TestSuiteTellsWordsApart(t *testing.T) {
	in := toy(t)
	for _, test := range []struct {
		engine engine
		stage  string
		want   Word
		says   string
	}{
		{engine{name: "right"}, StageAttention, Pass, ""},
		{engine{name: "wrong", spoil: change("block_1.attn_core", 1)}, StageAttention, Fail, "block_1.attn_core"},
		{engine{name: "wrong-elsewhere", spoil: change("block_1.attn_core", 1)}, StageEmbedding, Pass, ""},
		{engine{name: "nan", spoil: change("logits", float32(math.NaN()))}, StageLogits, Fail, "NaN"},
		{engine{name: "infinite", spoil: change("block_0.q", float32(math.Inf(1)))}, StageAttention, Fail, "Inf"},
		{engine{name: "misshapen", spoil: func(results map[string]tensor.Tensor) error {
			t := results["logits"]
			t.Shape = []int{t.Shape[1], t.Shape[0]}
			results["logits"] = t
			return nil
		}}, StageLogits, Fail, "shape"},
		{engine{name: "silent", spoil: func(results map[string]tensor.Tensor) error { clear(results); return nil }}, StageLogits, Error, "empty"},
		{engine{name: "broken", fail: errors.New("out of memory")}, StageLogits, Error, "out of memory"},
		{engine{name: "unwilling", fail: fmt.Errorf("no experts: %w", errors.ErrUnsupported)}, StageLogits, Unsupported, "no experts"},
		{engine{name: "breaks", spoil: func(map[string]tensor.Tensor) error { return errors.New("device lost") }}, StageRope, Error, "device lost"},
		{engine{name: "logits-alone", spoil: func(results map[string]tensor.Tensor) error {
			for name := range results {
				if name != taps.Logits {
					delete(results, name)
				}
			}
			return nil
		}}, StageRope, Unsupported, "no tap of this stage"},
	} {
		t.Run(test.engine.name, func(t *testing.T) {
			failures := filepath.Join(t.TempDir(), "failures")
			s := NewSuite(Options{Recorder: NewRecorder(), Failures: failures, WithoutHypotheses: true}, test.engine)
			defer s.Close()
			c := s.stageCase(test.engine, in, test.stage)
			assert.Equal(t, test.want, c.Verdict, c.failureText())
			assert.Contains(t, c.failureText(), test.says)
			if test.want == Fail {
				kept, err := tensor.OpenSafetensors(filepath.Join(failures, test.engine.name+".toy.window+1.safetensors"))
				require.NoError(t, err)
				assert.NotEmpty(t, kept.Names())
				require.NoError(t, kept.Close())
			} else if test.stage != StageEmbedding {
				assert.NoDirExists(t, failures)
			}
		})
	}
}

// TestSuiteWeighsLogitsBesideOtherTaps: see TestMoreTapsForgiveNothing.
func TestSuiteWeighsLogitsBesideOtherTaps(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	tokens, err := fixtures.Tokens("toy", "full")
	require.NoError(t, err)
	f, ok := faults.ByID("topk-not-renormalized")
	require.True(t, ok)
	results, err := reference.Observe(t.Context(), faults.Apply(f, reference.New(m, reference.Short(reference.BFloat16.Format()))), tokens)
	require.NoError(t, err)
	maps.DeleteFunc(results, func(name string, _ tensor.Tensor) bool {
		_, tap := taps.Split(name)
		return !slices.Contains([]string{taps.Output, taps.FinalNorm, taps.Logits}, tap)
	})
	subject := Subject{Precision: reference.BFloat16, Taps: results}
	s := NewSuite(Options{})
	defer s.Close()
	in := input{"toy", fixtures.Prompt{Name: "unbudgeted", Tokens: tokens}} // the stored budget would fail it, too
	v, err := s.verdict(m, in, subject)
	require.NoError(t, err)
	assert.Equal(t, Fail, v.Word)
}

func TestSuiteRecordsEveryRunOnce(t *testing.T) {
	in, recorder := toy(t), NewRecorder()
	e := engine{name: "right"}
	s := NewSuite(Options{Recorder: recorder}, e)
	defer s.Close()
	for _, stage := range Stages[:len(Stages)-1] {
		c := s.stageCase(e, in, stage)
		assert.NotEmpty(t, c.Findings, stage)
		recorder.Case(c)
	}
	report := recorder.Report(About{})
	require.Len(t, report.Runs, 1)
	assert.Len(t, report.Runs[0].Errors, 3)
	found := map[string]bool{}
	for _, c := range report.Cases {
		for _, f := range c.Findings {
			found[f.Tap] = true
		}
	}
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	for _, name := range taps.All(m.Config) {
		assert.True(t, found[name], "no stage judged %s", name)
	}
}

func TestSuiteSkipsOnRequest(t *testing.T) {
	e := engine{name: "right"}
	s := NewSuite(Options{Skip: []string{StageRope, StageGeneration}}, e)
	defer s.Close()
	assert.Equal(t, Skipped, s.stageCase(e, toy(t), StageRope).Verdict)
	assert.Equal(t, Skipped, s.generationCase(e, toy(t), StageGeneration).Verdict)
}

func TestSuiteWithoutInputs(t *testing.T) {
	_, err := NewSuite(Options{}).inputs()
	assert.Error(t, err, "no implementation")
	nothing := func(Implementation, string, string) bool { return false }
	_, err = NewSuite(Options{Select: nothing}, engine{}).inputs()
	assert.ErrorContains(t, err, "nothing would be judged")
}

func TestMissingGoldenSaysWhatToDo(t *testing.T) {
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	var goldens goldenRuns
	_, err = goldens.truthOf(m.Config, "toy", fixtures.Prompt{Name: "new", Tokens: []int32{1, 1, 1}})
	assert.ErrorContains(t, err, "make golden")
	_, err = goldens.truthOf(m.Config, "no-such-fixture", fixtures.Prompt{})
	assert.ErrorContains(t, err, "make golden")
}

// TestGoldenRuleIsSharp holds the float64 rule to what it must tell apart: 1e-12
// of the largest value is accepted, and a tenth more is not.
func TestGoldenRuleIsSharp(t *testing.T) {
	in := toy(t)
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	defer m.Close()
	var goldens goldenRuns
	truth, err := goldens.truthOf(m.Config, in.fixture, in.prompt)
	require.NoError(t, err)
	exact, err := reference.Run(t.Context(), m, in.prompt.Tokens, reference.Options{Precision: reference.Float64, Taps: taps.All(m.Config)})
	require.NoError(t, err)
	values, err := exact["embedding"].Float64s()
	require.NoError(t, err)
	largest := 1.0
	for _, v := range values {
		largest = max(largest, math.Abs(v))
	}
	for by, want := range map[float64]Word{0.9e-12: Pass, 1.1e-12: Fail} {
		moved := slices.Clone(values)
		moved[7] += by * largest
		findings, err := truth.findings(reference.Float64, map[string]tensor.Tensor{"embedding": tensor.FromFloat64s(exact["embedding"].Shape, moved)})
		require.NoError(t, err)
		require.Len(t, findings, 1)
		assert.Equal(t, want, findings[0].Verdict)
		assert.Equal(t, []int{0, 7}, findings[0].Worst.Index)
	}
	findings, err := truth.findings(reference.Float64, exact)
	require.NoError(t, err)
	assert.Len(t, findings, len(taps.All(m.Config)), "every tap is compared")
}

// TestInjectionsCoverEveryCase lists what the golden stage cases put to the test.
func TestInjectionsCoverEveryCase(t *testing.T) {
	var covered []string
	for _, stage := range []string{StageRMSNorm, StageRope, StageAttention, StageGating, StageExperts, StageLogits} {
		cases, err := golden.Stage(stage)
		require.NoError(t, err)
		for _, c := range cases {
			injections, err := injectionsOf(c)
			require.NoError(t, err)
			for _, in := range injections {
				covered = append(covered, in.tap)
			}
		}
	}
	for _, name := range []string{
		taps.AttnNormed, taps.Q, taps.K, taps.V, taps.QRot, taps.KRot, taps.AttnCore, taps.MLPNormed, taps.GateLogits,
		taps.ExpertIndices, taps.ExpertWeights, taps.Prelinear, taps.Activated, taps.ExpertOutputs, taps.FinalNorm, taps.Logits,
	} {
		assert.Contains(t, covered, name)
	}
	_, err := injectionsOf(golden.Case{Stage: StageRope, Name: "new"})
	assert.Error(t, err)
	_, err = injectionsOf(golden.Case{Stage: "unknown", Name: "new"})
	assert.Error(t, err)
}

// TestInjectionFails feeds results that are wrong into every injected case.
func TestInjectionFails(t *testing.T) {
	cases, err := golden.Stage(StageGating)
	require.NoError(t, err)
	injections, err := injectionsOf(cases[0])
	require.NoError(t, err)
	for _, in := range injections {
		shape, err := taps.Shape(in.input.Model.Config, in.full(), in.tokens())
		require.NoError(t, err)
		n := tensor.Tensor{Shape: shape}.Elements()
		for name, wrong := range map[string]map[string]tensor.Tensor{
			"missing":   {},
			"misshapen": {in.tap: tensor.FromFloat32s([]int{n}, make([]float32, n))},
			"zero":      {in.tap: tensor.FromFloat32s(shape, make([]float32, n))},
			"NaN":       {in.tap: tensor.FromFloat32s(shape, slices.Repeat([]float32{float32(math.NaN())}, n))},
		} {
			f, err := in.judge(t.Context(), reference.Float32, wrong)
			require.NoError(t, err)
			assert.Equal(t, Fail, f.Verdict, "%s: %s", in.tap, name)
		}
	}
}

func TestRepeatCommand(t *testing.T) {
	assert.Equal(t, `go test -count=1 -run '^TestRope$/^toy$/^window\+1$/^it$' ./conformance`, repeatCommand("TestRope/toy/window+1/it"))
	t.Chdir(os.TempDir())
	assert.Equal(t, `go test -count=1 -run '^TestRope$' .`, repeatCommand("TestRope"))
}
