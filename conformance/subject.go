package conformance

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sort"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Subject is what an implementation put out: any of the registry's taps, in any
// float storage, and which arithmetic made them.
type Subject struct {
	Precision reference.Precision
	Taps      map[string]tensor.Tensor
}

// observed is a subject whose form has been checked, widened to float64.
type observed struct {
	precision reference.Precision
	roundoff  roundoff
	names     []string // known taps, in execution order
	reals     map[string][]float64
	integers  map[string][]int32
	// coarse holds the storage format of taps that were stored in a shorter
	// format than they were computed in. Such a tap is not what the next stage
	// read, only near it.
	coarse  map[string]kernel.Format
	ignored []string // names that are no taps
}

// observe checks a subject's form. A tap of a wrong shape, of integers where
// reals belong, or with values that are not finite becomes a failed finding. No
// tap at all is an error.
func observe(c config.Config, tokens []int32, s Subject) (*observed, []Finding, error) {
	format := s.Precision.Format()
	o := &observed{
		precision: s.Precision,
		roundoff:  roundoffOf(format),
		reals:     map[string][]float64{},
		integers:  map[string][]int32{},
		coarse:    map[string]kernel.Format{},
	}
	var malformed []Finding
	for _, name := range taps.All(c) {
		t, ok := s.Taps[name]
		if !ok {
			continue
		}
		o.names = append(o.names, name)
		if reason := o.read(c, name, t, len(tokens)); reason != "" {
			malformed = append(malformed, Finding{
				Tap: name, Stage: StageOf(name), Method: Form, Verdict: Fail, Ratio: math.Inf(1), Reason: reason,
			})
		}
	}
	for name := range s.Taps {
		if !taps.Known(c, name) {
			o.ignored = append(o.ignored, name)
		}
	}
	sort.Strings(o.ignored)
	if len(o.names) == 0 {
		return nil, nil, errors.New("the subject has no tensor that this model knows: name them as the registry does (logits, block_0.attn_core, …)" + didFind(o.ignored))
	}
	return o, malformed, nil
}

func didFind(names []string) string {
	if len(names) == 0 {
		return "; it is empty"
	}
	if len(names) > 5 {
		names = append(slices.Clone(names[:5]), "…")
	}
	return fmt.Sprintf("; it has %q", names)
}

// read stores one tap, or says what is wrong with it.
func (o *observed) read(c config.Config, name string, t tensor.Tensor, tokens int) string {
	want, err := taps.Shape(c, name, tokens)
	if err != nil {
		return err.Error()
	}
	if len(t.Shape) == len(want)+1 && t.Shape[0] == 1 {
		t.Shape = t.Shape[1:] // a batch of one prompt
	}
	if !slices.Equal(t.Shape, want) {
		return fmt.Sprintf("shape is %v, want %v%s", t.Shape, want, shapeHint(t.Shape, want))
	}
	if len(t.Data) != t.Elements()*t.DType.Size() {
		return fmt.Sprintf("%d bytes do not fit shape %v of %s", len(t.Data), t.Shape, t.DType)
	}
	if taps.Integer(name) {
		return o.readIndices(c, name, t)
	}
	values, err := t.Float64s()
	if err != nil {
		return err.Error()
	}
	for i, v := range values {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Sprintf("%v at %v", v, unravel(i, want))
		}
	}
	o.reals[name] = values
	if format := storageFormat(t.DType); o.loses(format, values) {
		o.coarse[name] = format
	}
	return ""
}

// shapeHint guesses how a tap came by a wrong shape.
func shapeHint(got, want []int) string {
	if len(want) < 2 || len(got) < len(want)-1 {
		return ""
	}
	reversed := slices.Clone(got)
	slices.Reverse(reversed)
	switch {
	case want[0] > 1 && (slices.Equal(got, want[1:]) || got[0] == 1 && slices.Equal(got[len(got)-len(want)+1:], want[1:])):
		return ": a row for every token is needed, not the last token's alone"
	case slices.Equal(reversed, want):
		return ": it is transposed"
	case len(got) == len(want) && slices.Equal(got[:len(got)-1], want[:len(want)-1]) && got[len(got)-1] > want[len(want)-1]:
		return ": cut the padding off"
	}
	return ""
}

// loses reports whether storing values in a format changed values of the
// subject's arithmetic: it has fewer digits, or its normal range ends above some.
func (o *observed) loses(format kernel.Format, values []float64) bool {
	own := o.precision.Format()
	if format.Digits < own.Digits {
		return true
	}
	smallest := math.Ldexp(1, format.MinExponent)
	return format.MinExponent > own.MinExponent &&
		slices.ContainsFunc(values, func(v float64) bool { return math.Abs(v) < smallest })
}

func (o *observed) readIndices(c config.Config, name string, t tensor.Tensor) string {
	indices, err := t.Int32s()
	if err != nil {
		return err.Error()
	}
	k := c.ExpertsPerToken
	for i, e := range indices {
		if e < 0 || int(e) >= c.Experts {
			return fmt.Sprintf("expert %d at %v, of %d experts", e, unravel(i, t.Shape), c.Experts)
		}
		if slices.Contains(indices[i-i%k:i], e) {
			return fmt.Sprintf("expert %d twice for token %d", e, i/k)
		}
	}
	o.integers[name] = indices
	return ""
}

// storageFormat is the format of a float storage type.
func storageFormat(d tensor.DType) kernel.Format {
	switch d {
	case tensor.F64:
		return reference.Float64.Format()
	case tensor.F32:
		return reference.Float32.Format()
	case tensor.F16:
		return reference.Float16.Format()
	default:
		return reference.BFloat16.Format()
	}
}

// storing is how far storing a value in a format may move it.
func storing(format kernel.Format, value float64) float64 {
	return format.UnitRoundoff()*math.Abs(value) + format.Tiny()
}

// routing returns the subject's experts layer by layer, nil where they are not
// tapped, and whether all of them are.
func (o *observed) routing(c config.Config) (layers [][]int32, complete bool) {
	layers, complete = make([][]int32, c.Layers), true
	for i := range layers {
		layers[i] = o.integers[taps.Block(i, taps.ExpertIndices)]
		complete = complete && layers[i] != nil
	}
	return layers, complete
}

// known starts an evaluation of a model from the subject's own taps.
func known[F reference.Float](e *evaluation[F], o *observed) *evaluation[F] {
	if wide, ok := any(e).(*evaluation[float64]); ok {
		maps.Copy(wide.reals, o.reals) // shared, not copied: evaluations never write to what they know
	} else {
		for name, values := range o.reals {
			converted := make([]F, len(values))
			for i, v := range values {
				converted[i] = F(v)
			}
			e.reals[name] = converted
		}
	}
	for name, values := range o.integers {
		e.integers[name] = values
	}
	return e
}
