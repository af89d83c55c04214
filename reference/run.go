package reference

import (
	"context"
	"fmt"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Options say how [Run] runs a model and what it returns.
type Options struct {
	Precision Precision
	Taps      []string // registry names; nil means logits alone
	// Routing, if it is not nil, forces each layer's experts: [layers][tokens·k]
	// indices. Their weights still come from the model's own gate logits.
	Routing [][]int32
	// Progress, if it is not nil, is called after every block with the number of
	// blocks done.
	Progress func(blocks int)
}

// Run evaluates a checkpoint on tokens and returns the taps asked for, in the
// registry's shapes, stored in the precision's own type.
func Run(ctx context.Context, m *checkpoint.Model, tokens []int32, o Options) (map[string]tensor.Tensor, error) {
	wanted, err := selectTaps(m.Config, o.Taps)
	if err != nil {
		return nil, err
	}
	if o.Precision == Float32 {
		return run(ctx, New(m, Single()), tokens, o, wanted, tensor.FromFloat32s)
	}
	arithmetic, store := Exact(), tensor.FromFloat64s
	if o.Precision != Float64 {
		arithmetic = Short(o.Precision.Format())
		store = func(shape []int, values []float64) tensor.Tensor {
			if o.Precision == BFloat16 {
				return tensor.FromBFloat16s(shape, convert[float32](values))
			}
			return tensor.FromFloat16s(shape, convert[float32](values))
		}
	}
	return run(ctx, New(m, arithmetic), tokens, o, wanted, store)
}

func selectTaps(c config.Config, names []string) (map[string]bool, error) {
	if names == nil {
		names = []string{taps.Logits}
	}
	wanted := make(map[string]bool, len(names))
	for _, name := range names {
		if !taps.Known(c, name) {
			return nil, fmt.Errorf("no tap is called %q in a model of %d layers", name, c.Layers)
		}
		wanted[name] = true
	}
	return wanted, nil
}

func run[F Float](ctx context.Context, m Model[F], tokens []int32, o Options, wanted map[string]bool, store func([]int, []F) tensor.Tensor) (map[string]tensor.Tensor, error) {
	if o.Routing != nil {
		m.Stages.Choose = Replay(m.Stages.Choose, o.Routing)
	}
	results := make(map[string]tensor.Tensor, len(wanted))
	shape := func(name string) []int {
		s, err := taps.Shape(m.Weights.Config, name, len(tokens))
		if err != nil {
			panic(err) // the model observed a tap that its own registry lacks
		}
		return s
	}
	observer := Observer[F]{
		Reals: func(name string, values []F) {
			if wanted[name] {
				results[name] = store(shape(name), values)
			}
			if layer, tap := taps.Split(name); tap == taps.Output && o.Progress != nil {
				o.Progress(layer + 1)
			}
		},
		Integers: func(name string, values []int32) {
			if wanted[name] {
				results[name] = tensor.FromInt32s(shape(name), values)
			}
		},
	}
	if _, err := m.Forward(ctx, tokens, nil, observer); err != nil {
		return nil, err
	}
	return results, nil
}

// Replay returns a routing stage that takes each layer's experts from elsewhere:
// [layers][tokens·k] indices. A layer that has none (nil) chooses its own.
func Replay[F Float](own func(Layer[F], []F) []int32, routing [][]int32) func(Layer[F], []F) []int32 {
	return func(l Layer[F], logits []F) []int32 {
		if l.Index >= len(routing) || routing[l.Index] == nil {
			return own(l, logits)
		}
		return routing[l.Index]
	}
}

// Observe runs a model, whatever its stages, and returns every tap: reals in F's
// own storage type, integers as I32. A stage that gives a tap another width than
// the registry's (more experts per token, say) is returned as it is.
func Observe[F Float](ctx context.Context, m Model[F], tokens []int32) (map[string]tensor.Tensor, error) {
	results := map[string]tensor.Tensor{}
	shape := func(name string, elements int) []int {
		s, err := taps.Shape(m.Weights.Config, name, len(tokens))
		if err != nil || product(s) != elements {
			return []int{len(tokens), elements / len(tokens)}
		}
		return s
	}
	_, err := m.Forward(ctx, tokens, nil, Observer[F]{
		Reals:    func(name string, values []F) { results[name] = stored(shape(name, len(values)), values) },
		Integers: func(name string, values []int32) { results[name] = tensor.FromInt32s(shape(name, len(values)), values) },
	})
	return results, err
}

func product(shape []int) int {
	n := 1
	for _, d := range shape {
		n *= d
	}
	return n
}

func stored[F Float](shape []int, values []F) tensor.Tensor {
	if single, ok := any(values).([]float32); ok {
		return tensor.FromFloat32s(shape, single)
	}
	return tensor.FromFloat64s(shape, convert[float64](values))
}
