// Command write exports a small checkpoint in every combination of the pairwise
// table, for other programs to check: DIR/NAME.onnx, and DIR/prompt.json with the
// tokens to run them on.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/exporter/pairwise"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

func main() {
	path := flag.String("checkpoint", "fixtures/toy", "checkpoint to export")
	output := flag.String("output", "build/pairwise", "directory to write to")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := write(ctx, *path, *output); err != nil {
		fmt.Fprintf(os.Stderr, "pairwise: %v\n", err)
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
	tokens := make([]int, pairwise.Length)
	for i := range tokens {
		tokens[i] = (i*37 + 11) % m.Config.VocabSize
	}
	text, err := json.Marshal(tokens)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(output, "prompt.json"), text, 0o644)
}
