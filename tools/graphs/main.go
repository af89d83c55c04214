// Command graphs exports a small checkpoint in every combination of the pairwise
// table, for other programs to check: DIR/NAME.onnx; and what they must compute:
// DIR/truth.safetensors, with every tap in float64 and the tokens as input_ids.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/exporter/pairwise"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

func main() {
	path := flag.String("checkpoint", "fixtures/toy", "checkpoint to export")
	output := flag.String("output", "build/pairwise", "directory to write to")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := write(ctx, *path, *output); err != nil {
		fmt.Fprintf(os.Stderr, "graphs: %v\n", err)
		os.Exit(2)
	}
}

func write(ctx context.Context, path, output string) error {
	m, err := checkpoint.Open(path)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := os.MkdirAll(output, 0o755); err != nil {
		return err
	}
	for _, c := range pairwise.Table() {
		if err := exporter.Export(ctx, m, filepath.Join(output, c.Name+".onnx"), c.Options); err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
	}
	tokens := make([]int32, pairwise.Length)
	for i := range tokens {
		tokens[i] = int32((i*37 + 11) % m.Config.VocabSize)
	}
	names := taps.All(m.Config)
	truth, err := reference.Run(ctx, m, tokens, reference.Options{Precision: reference.Float64, Taps: names})
	if err != nil {
		return err
	}
	list := []tensor.Named{{Name: "input_ids", Tensor: tensor.FromInt32s([]int{len(tokens)}, tokens)}}
	for _, name := range names {
		list = append(list, tensor.Named{Name: name, Tensor: truth[name]})
	}
	return tensor.WriteSafetensors(filepath.Join(output, "truth.safetensors"), list, nil)
}
