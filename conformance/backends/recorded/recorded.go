// Package recorded replays what an implementation put out at another time, or on
// another machine, so that it goes through the same door as everybody else.
package recorded

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Source finds the recording of a prompt on a checkpoint. Where there is none,
// its error wraps [errors.ErrUnsupported].
type Source func(ctx context.Context, checkpointDir string, tokens []int32) (map[string]tensor.Tensor, error)

// New returns an implementation that replays recordings.
func New(name string, p reference.Precision, find Source) conformance.Implementation {
	return implementation{name, p, find}
}

// Golden replays golden/model: what a real implementation (torch, transformers,
// flax.corrected, …) put out on the fixtures. The model is causal, so that a
// recording serves every prompt that it begins with.
func Golden(name string, p reference.Precision) conformance.Implementation {
	return New(strings.ReplaceAll(name, ".", "-")+"-"+string(p), p, func(_ context.Context, dir string, tokens []int32) (map[string]tensor.Tensor, error) {
		fixture := filepath.Base(dir)
		runs, err := golden.Runs(fixture)
		if err != nil {
			return nil, err
		}
		var best *golden.Run
		for i, r := range runs {
			covers := len(r.Tokens) >= len(tokens) && slices.Equal(r.Tokens[:len(tokens)], tokens)
			if r.Name() == name && r.Precision == string(p) && covers && (best == nil || len(r.Tokens) < len(best.Tokens)) {
				best = &runs[i]
			}
		}
		if best == nil {
			return nil, fmt.Errorf("golden/model/%s has no recording of this prompt: %w", fixture, errors.ErrUnsupported)
		}
		results, err := best.Load()
		if err != nil {
			return nil, err
		}
		return beginning(*best, results, len(tokens))
	})
}

// beginning cuts every tap to its first tokens. A tap of which only some rows
// are stored is left out.
func beginning(r golden.Run, results map[string]tensor.Tensor, tokens int) (map[string]tensor.Tensor, error) {
	cut := make(map[string]tensor.Tensor, len(results))
	for name, t := range results {
		if err := t.Check(); err != nil {
			return nil, fmt.Errorf("%s: %s %w", r.File, name, err)
		}
		if len(t.Shape) == 0 || t.Shape[0] != len(r.Tokens) {
			continue
		}
		row := len(t.Data) / t.Shape[0]
		cut[name] = tensor.Tensor{
			DType: t.DType,
			Shape: append([]int{tokens}, t.Shape[1:]...),
			Data:  t.Data[:tokens*row],
		}
	}
	return cut, nil
}

type implementation struct {
	name      string
	precision reference.Precision
	find      Source
}

func (i implementation) Name() string { return i.name }

func (i implementation) Precision() reference.Precision { return i.precision }

func (i implementation) Open(_ context.Context, dir string) (conformance.Instance, error) {
	return instance{i.find, dir}, nil
}

type instance struct {
	find Source
	dir  string
}

func (i instance) Forward(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error) {
	return i.find(ctx, i.dir, tokens)
}

func (i instance) Close() error { return nil }
