// Package reference puts the Go reference before the judge, through the same
// door as everybody else. It has every ability that an implementation can have.
package reference

import (
	"context"

	"github.com/gptoss-conformance/gptoss/conformance"
	model "github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// New returns the reference in one precision.
func New(p model.Precision) conformance.Implementation { return implementation{p} }

type implementation struct{ precision model.Precision }

func (i implementation) Name() string { return "reference-" + string(i.precision) }

func (i implementation) Precision() model.Precision { return i.precision }

func (i implementation) Open(_ context.Context, dir string) (conformance.Instance, error) {
	weights, err := checkpoint.Open(dir)
	if err != nil {
		return nil, err
	}
	return &instance{weights, i.precision}, nil
}

type instance struct {
	weights   *checkpoint.Model
	precision model.Precision
}

func (i *instance) Close() error { return i.weights.Close() }

func (i *instance) Forward(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error) {
	return i.ForwardTaps(ctx, tokens, nil)
}

func (i *instance) ForwardTaps(ctx context.Context, tokens []int32, names []string) (map[string]tensor.Tensor, error) {
	return i.ForwardRouted(ctx, tokens, nil, names)
}

func (i *instance) ForwardRouted(ctx context.Context, tokens []int32, routing [][]int32, names []string) (map[string]tensor.Tensor, error) {
	return model.Run(ctx, i.weights, tokens, model.Options{Precision: i.precision, Taps: names, Routing: routing})
}

func (i *instance) Decode(context.Context) (conformance.Decoding, error) {
	switch i.precision {
	case model.Float64:
		return newDecoding(i.weights, i.precision, model.Exact()), nil
	case model.Float32:
		return newDecoding(i.weights, i.precision, model.Single()), nil
	default:
		return newDecoding(i.weights, i.precision, model.Short(i.precision.Format())), nil
	}
}

// decoding is a sequence with its cache.
type decoding[F model.Float] struct {
	model     model.Model[F]
	precision model.Precision
	cache     model.Cache[F]
}

func newDecoding[F model.Float](weights *checkpoint.Model, p model.Precision, a model.Arithmetic[F]) *decoding[F] {
	return &decoding[F]{model: model.New(weights, a), precision: p}
}

func (d *decoding[F]) Close() error { return nil }

func (d *decoding[F]) Step(ctx context.Context, tokens []int32) (tensor.Tensor, error) {
	logits, err := d.model.Forward(ctx, tokens, &d.cache, model.Observer[F]{})
	if err != nil {
		return tensor.Tensor{}, err
	}
	shape, err := taps.Shape(d.model.Weights.Config, taps.Logits, len(tokens))
	if err != nil {
		return tensor.Tensor{}, err
	}
	return store(d.precision, shape, logits), nil
}

// store keeps values in the precision's own type.
func store[F model.Float](p model.Precision, shape []int, values []F) tensor.Tensor {
	if p == model.Float64 {
		wide := make([]float64, len(values))
		for i, v := range values {
			wide[i] = float64(v)
		}
		return tensor.FromFloat64s(shape, wide)
	}
	single := make([]float32, len(values))
	for i, v := range values {
		single[i] = float32(v)
	}
	switch p {
	case model.BFloat16:
		return tensor.FromBFloat16s(shape, single)
	case model.Float16:
		return tensor.FromFloat16s(shape, single)
	}
	return tensor.FromFloat32s(shape, single)
}
