package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// forwardOptions are the flags of `gptoss forward`.
type forwardOptions struct {
	checkpoint, tokens, precision, backend, onnx, taps, output string
}

// forwardCommand runs a model and stores its taps.
func forwardCommand() *cobra.Command {
	var o forwardOptions
	var read *checkpoint.Options
	command := &cobra.Command{
		Use:   "forward --checkpoint PATH --tokens IDS --output OUT.safetensors",
		Short: "Run a model on tokens and store its logits and other taps",
		Long: `Run a model on tokens and store its logits, and other taps on request, under
the registry's names.

With --backend onnxruntime the ONNX graph is run instead of the Go reference; the
checkpoint then says what shapes to expect.`,
		Example: `  gptoss forward --checkpoint fixtures/toy --tokens 1,2,3 --output out.safetensors
  gptoss forward --checkpoint DIR --tokens ids.json --precision float64 --taps all --output out.safetensors
  gptoss forward --checkpoint DIR --tokens ids.json --backend onnxruntime --onnx m.onnx --output out.safetensors`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			open := func() (*checkpoint.Model, error) { return openCheckpoint(cmd.ErrOrStderr(), o.checkpoint, read) }
			return forward(cmd.Context(), o, open, cmd.Flags().Changed("precision"), cmd.ErrOrStderr())
		},
	}
	flags := command.Flags()
	flags.StringVar(&o.checkpoint, "checkpoint", "", "checkpoint in any layout")
	flags.StringVar(&o.tokens, "tokens", "", "ids separated by commas, or a file with a JSON array of ids")
	flags.StringVar(&o.precision, "precision", string(reference.Float32), "arithmetic of the reference: float64, float32, bfloat16 or float16")
	flags.StringVar(&o.backend, "backend", backendReference, "reference or onnxruntime")
	flags.StringVar(&o.onnx, "onnx", "", "graph for --backend onnxruntime")
	flags.StringVar(&o.taps, "taps", tapsNone, "all, none (logits alone), or names separated by commas")
	flags.StringVar(&o.output, "output", "", "safetensors file to write")
	for _, name := range []string{"checkpoint", "tokens", "output"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was defined above
		}
	}
	read = checkpointFlags(command)
	return command
}

// Values of the flags.
const (
	backendReference   = "reference"
	backendONNXRuntime = "onnxruntime"
	tapsAll            = "all"
	tapsNone           = "none"
)

func forward(ctx context.Context, o forwardOptions, open func() (*checkpoint.Model, error), precisionGiven bool, stderr io.Writer) error {
	precision, err := o.arithmetic(precisionGiven)
	if err != nil {
		return err
	}
	tokens, err := parseTokens(o.tokens)
	if err != nil {
		return err
	}
	if err := writableDirectory(o.output); err != nil {
		return err
	}
	model, err := open()
	if err != nil {
		return err
	}
	defer model.Close()
	if err := reference.CheckTokens(model.Config, tokens); err != nil {
		return fmt.Errorf("--tokens: %w", err)
	}
	names, err := selectTaps(model.Config, o.taps)
	if err != nil {
		return err
	}

	var results map[string]tensor.Tensor
	if o.backend == backendONNXRuntime {
		results, err = runONNX(ctx, o.onnx, model, tokens, names)
	} else {
		progress := newLayers(stderr, "forward", model, 1)
		results, err = reference.Run(ctx, model, tokens, reference.Options{
			Precision: precision, Taps: names, Progress: func(int) { progress.next() },
		})
		progress.finish()
	}
	if err != nil {
		return err
	}
	return writeTaps(ctx, o, precision, tokens, names, results)
}

// arithmetic checks the flags that say what computes, and in what.
func (o forwardOptions) arithmetic(precisionGiven bool) (reference.Precision, error) {
	precision, err := reference.ParsePrecision(o.precision)
	if err != nil {
		return "", fmt.Errorf("--precision: %q is none of float64, float32, bfloat16, float16", o.precision)
	}
	switch o.backend {
	case backendReference:
		if o.onnx != "" {
			return "", errors.New("--onnx goes with --backend onnxruntime")
		}
	case backendONNXRuntime:
		if o.onnx == "" {
			return "", errors.New("--backend onnxruntime needs --onnx M.onnx")
		}
		if precisionGiven {
			return "", errors.New("--precision is the reference's; an ONNX graph has its own")
		}
	default:
		return "", fmt.Errorf("--backend: %q is none of reference, onnxruntime", o.backend)
	}
	return precision, nil
}

// selectTaps resolves --taps to names in execution order.
func selectTaps(c config.Config, value string) ([]string, error) {
	switch value {
	case tapsAll:
		return taps.All(c), nil
	case tapsNone:
		return []string{taps.Logits}, nil
	}
	wanted := map[string]bool{}
	for name := range strings.SplitSeq(value, ",") {
		name = strings.TrimSpace(name)
		if !taps.Known(c, name) {
			return nil, fmt.Errorf("--taps: no tap is called %q in a model of %d layers: it is all, none or names such as %s",
				name, c.Layers, taps.Block(0, taps.AttnCore))
		}
		wanted[name] = true
	}
	var names []string
	for _, name := range taps.All(c) {
		if wanted[name] {
			names = append(names, name)
		}
	}
	return names, nil
}

// writeTaps stores results in execution order.
func writeTaps(ctx context.Context, o forwardOptions, precision reference.Precision, tokens []int32, names []string, results map[string]tensor.Tensor) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	list := make([]tensor.Named, 0, len(names))
	for _, name := range names {
		list = append(list, tensor.Named{Name: name, Tensor: results[name]})
	}
	ids, err := json.Marshal(tokens)
	if err != nil {
		return err
	}
	metadata := map[string]string{"implementation": o.backend, "tokens": string(ids)}
	if o.backend == backendReference {
		metadata["precision"] = string(precision)
	}
	return tensor.WriteSafetensors(o.output, list, metadata)
}

// writableDirectory finds out before the work whether its result has a place.
func writableDirectory(output string) error {
	if info, err := os.Stat(output); err == nil && info.IsDir() {
		return fmt.Errorf("--output: %s is a directory", output)
	}
	dir := filepath.Dir(output)
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("--output: %s is not a directory", dir)
	}
	return nil
}
