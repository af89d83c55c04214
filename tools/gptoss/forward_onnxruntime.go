package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// runONNX runs a graph and returns the taps wanted, in the shapes that the
// checkpoint calls for. A graph that lacks one of them is an error.
func runONNX(ctx context.Context, path string, model *checkpoint.Model, tokens []int32, names []string) (map[string]tensor.Tensor, error) {
	session, err := onnxruntime.OpenContext(ctx, path, onnxruntime.Options{})
	if err != nil {
		return nil, err
	}
	defer release(ctx, session)
	for _, name := range names {
		if !slices.Contains(session.Outputs(), name) {
			return nil, fmt.Errorf("%s: the graph does not put out %s: export it with --emit-hidden-states and --emit-block-debug", path, name)
		}
	}
	results, err := session.RunTaps(ctx, tokens, names)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		want, err := taps.Shape(model.Config, name, len(tokens))
		if err != nil {
			return nil, err
		}
		if got := results[name].Shape; !slices.Equal(got, want) {
			return nil, fmt.Errorf("%s: %s has shape %v, and the checkpoint calls for %v: is it the graph of another model?", path, name, got, want)
		}
	}
	return results, nil
}
