package conformance

import (
	"slices"
	"sync"
	"testing"

	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// injectedFixture names stage cases in reports, where a fixture would stand.
const injectedFixture = "injected"

// injection is one tap of a stage case: what goes in, and what OpenAI's torch
// model made of it in float64.
type injection struct {
	tap   string
	input StageInput
	// want holds the golden's float64 values. The subject's result is cut to
	// them: rows (nil: all) of the first axis, and then columns [from, from+n) of
	// the golden's rows.
	want []float64
	rows []int
	// exact replaces Inputs for a float64 subject, where those are a golden
	// result rounded to the case's type. What belongs to the rounded ones is the
	// float64 stage's own result then, for all but float64 subjects.
	exact map[string]tensor.Tensor
	// bitwise asks for the golden's very values of a float64 subject.
	bitwise bool
	// bounds are the same for every subject of a precision.
	bounds *boundMemory
}

// boundMemory computes an injection's expectation once per precision.
type boundMemory struct {
	mutex sync.Mutex
	known map[reference.Precision]*remembered[expectation]
}

type expectation struct{ want, bound []float64 }

// Injected judges one stage of every implementation that can run single stages
// on the golden stage cases: real widths, far positions, awkward values. Sub-tests
// are injected/case/tap/implementation.
func (s *Suite) Injected(t *testing.T, stage string) {
	t.Helper()
	cases, err := golden.Stage(stage)
	if err != nil {
		t.Fatal(err)
	}
	t.Run(injectedFixture, func(t *testing.T) {
		for _, c := range cases {
			t.Run(c.Name, func(t *testing.T) {
				injections, err := injectionsOf(c)
				if err != nil {
					t.Fatal(err)
				}
				for _, injection := range injections {
					t.Run(injection.tap, func(t *testing.T) {
						for _, implementation := range s.implementations {
							runner, ok := implementation.(StageRunner)
							if !ok || !starts(implementation.Precision(), c.DType) {
								continue
							}
							t.Run(implementation.Name(), func(t *testing.T) {
								t.Parallel()
								s.conclude(t, s.injectedCase(implementation, runner, c, injection))
							})
						}
					})
				}
			})
		}
	})
}

// starts reports whether an arithmetic can start from a case's inputs as they
// are: its own type's, or a narrower one's.
func starts(p reference.Precision, dtype tensor.DType) bool {
	switch p {
	case reference.Float64, reference.Float32:
		return true
	case reference.BFloat16:
		return dtype == tensor.BF16
	}
	return false
}

func (s *Suite) injectedCase(implementation Implementation, runner StageRunner, g golden.Case, in injection) Case {
	precision := implementation.Precision()
	stage := StageOf(in.full()) // a case of one stage may hold another's on the way
	c := Case{
		Stage: stage, Implementation: implementation.Name(), Precision: precision,
		Fixture: injectedFixture, Prompt: g.Name, Verdict: Pass,
	}
	if slices.Contains(s.options.Skip, stage) {
		c.Verdict, c.Reason = Skipped, "as the options ask"
		return c
	}
	input := in.input
	input.Taps = []string{in.tap}
	input.Inputs = map[string]tensor.Tensor{}
	if precision == reference.Float64 && in.exact != nil {
		in.input.Inputs = in.exact
	}
	for name, t := range in.input.Inputs {
		stored, err := storedAs(precision, t)
		if err != nil {
			c.Verdict, c.Reason = Error, err.Error()
			return c
		}
		input.Inputs[name] = stored
	}
	results, err := runner.RunStage(s.ctx, input)
	if err != nil {
		c.Verdict, c.Reason = wordFor(err), err.Error()
		return c
	}
	f, err := in.judge(s.ctx, precision, results)
	if err != nil {
		c.Verdict, c.Reason = Error, err.Error()
		return c
	}
	f.Stage, f.From = stage, []string{g.File}
	c.Findings, c.Verdict = []Finding{f}, f.Verdict
	return c
}

// storedAs stores values that a precision holds exactly in its own type.
func storedAs(p reference.Precision, t tensor.Tensor) (tensor.Tensor, error) {
	if !t.DType.Float() {
		return t, nil
	}
	values, err := t.Float64s()
	if err != nil {
		return t, err
	}
	single := make([]float32, len(values))
	for i, v := range values {
		single[i] = float32(v)
	}
	switch p {
	case reference.Float64:
		return tensor.FromFloat64s(t.Shape, values), nil
	case reference.Float32:
		return tensor.FromFloat32s(t.Shape, single), nil
	case reference.BFloat16:
		return tensor.FromBFloat16s(t.Shape, single), nil
	}
	return tensor.FromFloat16s(t.Shape, single), nil
}

// full is the tap's name in a model of one layer.
func (in injection) full() string {
	if in.tap == taps.FinalNorm || in.tap == taps.Logits {
		return in.tap
	}
	return taps.Block(0, in.tap)
}

func (in injection) tokens() int {
	for _, t := range in.input.Inputs {
		return t.Shape[0]
	}
	return 0
}
