package conformance

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// judge compares a subject's result with the golden, by the stage's derived
// bound; in float64 by the rule for two float64 evaluations.
func (in injection) judge(ctx context.Context, p reference.Precision, results map[string]tensor.Tensor) (Finding, error) {
	f := Finding{Tap: in.tap, Method: Injected, Verdict: Pass}
	c := in.input.Model.Config
	full := in.full()
	shape, err := taps.Shape(c, full, in.tokens())
	if err != nil {
		return f, err
	}
	result, ok := results[in.tap]
	malformed := func(format string, arguments ...any) (Finding, error) {
		f.Method, f.Verdict, f.Ratio, f.Reason = Form, Fail, math.Inf(1), fmt.Sprintf(format, arguments...)
		return f, nil
	}
	if !ok {
		return malformed("the implementation did not return it")
	}
	if !slices.Equal(result.Shape, shape) || result.Check() != nil {
		return malformed("shape is %v, want %v", result.Shape, shape)
	}
	got, err := numbers(result)
	if err != nil {
		return malformed("%v", err)
	}
	for i, v := range got {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return malformed("%v at %v", v, unravel(i, shape))
		}
	}
	if in.tap == taps.ExpertIndices {
		return in.judgeChoice(f, got)
	}
	want, bound := in.want, []float64(nil)
	if p == reference.Float64 {
		bound = goldenBounds(in.tap, want)
		if in.bitwise {
			clear(bound)
		}
		if in.tap == taps.QRot || in.tap == taps.KRot {
			if err := in.addAngles(bound); err != nil {
				return f, err
			}
		}
	} else {
		expected, err := entry(&in.bounds.mutex, &in.bounds.known, p).get(func() (expectation, error) { return in.expect(ctx, p) })
		if err != nil {
			return f, err
		}
		want, bound = expected.want, expected.bound
	}
	got = in.cut(got)
	if len(got) != len(want) {
		return f, fmt.Errorf("golden has %d values for %d of %s", len(want), len(got), in.tap)
	}
	if in.rows != nil {
		shape[0] = len(in.rows)
	}
	f.against(shape, got, want, bound)
	if f.Worst != nil && in.rows != nil {
		f.Worst.Index[0] = in.rows[f.Worst.Index[0]]
	}
	return f, nil
}

// expect returns what a subject of a precision must give, and how near.
func (in injection) expect(ctx context.Context, p reference.Precision) (expectation, error) {
	e, err := in.evaluation(ctx)
	if err != nil {
		return expectation{}, err
	}
	full := in.full()
	layer, name := taps.Split(full)
	whole := e.compute(full)
	want := in.want
	if in.exact != nil {
		want = in.cut(whole)
	}
	bound := checks[name].bound(bounding{roundoff: roundoffOf(p.Format()), truth: e, layer: layer, name: name}, whole)
	return expectation{want, in.cut(bound)}, ctx.Err()
}

// cut selects the golden's rows.
func (in injection) cut(values []float64) []float64 {
	if in.rows == nil {
		return values
	}
	width := len(values) / in.tokens()
	var chosen []float64
	for _, row := range in.rows {
		chosen = append(chosen, values[row*width:][:width]...)
	}
	return chosen
}

// evaluation knows the injected inputs in float64.
func (in injection) evaluation(ctx context.Context) (*evaluation[float64], error) {
	m := reference.New(in.input.Model, reference.Exact())
	e := newEvaluation(ctx, &m, make([]int32, in.tokens()))
	e.places = in.input.Positions
	for name, t := range in.input.Inputs {
		full := taps.Block(0, name)
		if name == taps.FinalNorm {
			full = name
		}
		if taps.Integer(name) {
			indices, err := t.Int32s()
			if err != nil {
				return nil, err
			}
			e.integers[full] = indices
			continue
		}
		values, err := t.Float64s()
		if err != nil {
			return nil, err
		}
		e.reals[full] = values
	}
	return e, nil
}

// judgeChoice accepts a choice of experts if its logits, in order, are the
// largest ones: exact ties may fall either way.
func (in injection) judgeChoice(f Finding, got []float64) (Finding, error) {
	logits, err := in.input.Inputs[taps.GateLogits].Float64s()
	if err != nil {
		return f, err
	}
	c := in.input.Model.Config
	f.Of = len(got)
	for t := range in.tokens() {
		row := logits[t*c.Experts:][:c.Experts]
		best := reference.TopK(row, c.ExpertsPerToken)
		seen := map[float64]bool{}
		for slot, want := range best {
			expert := got[t*c.ExpertsPerToken+slot]
			if expert >= 0 && int(expert) < c.Experts && !seen[expert] && row[int(expert)] == row[want] {
				seen[expert] = true
				continue
			}
			f.Over++
			f.Verdict, f.Ratio = Fail, math.Inf(1)
			if f.Worst == nil {
				f.Worst = &Worst{Index: []int{t, slot}, Got: expert, Want: float64(want)}
			}
		}
	}
	return f, nil
}

// angleRoundoffs is how many units of roundoff a float64 angle may be off, times
// its position: one for the frequency, one for the product, in each of the two
// evaluations.
const angleRoundoffs = 4

// addAngles widens RoPE's float64 bounds by what the angles may be off.
func (in injection) addAngles(bound []float64) error {
	name := Reads(in.tap)[0]
	x, err := in.input.Inputs[name].Float64s()
	if err != nil {
		return err
	}
	rotary := reference.NewRotary(in.input.Model.Config)
	half := in.input.Model.Config.HeadDim / 2
	perToken := len(x) / len(in.input.Positions)
	for i := range bound {
		first := i - i%(2*half) + i%half
		turn := angleRoundoffs * reference.Float64.Format().UnitRoundoff() * float64(in.input.Positions[i/perToken])
		bound[i] += rotary.Concentration * turn * (math.Abs(x[first]) + math.Abs(x[first+half]))
	}
	return nil
}
