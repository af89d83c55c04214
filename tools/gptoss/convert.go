package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// storageTypes are the values of --dtype.
var storageTypes = map[string]tensor.DType{"": "", "bfloat16": tensor.BF16, "float32": tensor.F32, "float16": tensor.F16}

// convertCommand writes a checkpoint in another layout.
func convertCommand() *cobra.Command {
	var from, to, output, dtype, shard string
	var layers int
	var write checkpoint.WriteOptions
	var read *checkpoint.Options
	command := &cobra.Command{
		Use:   "convert --from PATH --to openai|huggingface|flax|equinox --output PATH",
		Short: "Write a checkpoint in another layout, or cut to its first layers",
		Long: `Write a checkpoint in another layout, or cut to its first layers.

Values never change, unless --quantize is given: MXFP4 experts stay MXFP4 where
both layouts have it and are dequantized exactly where not, and dense experts
that are exactly MXFP4 are encoded again. What the target can't hold is an error.

--output is a directory for openai and huggingface, and a file .msgpack or .eqx
(or a directory for it) for flax and equinox; configurations are put beside it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var ok bool
			if write.DType, ok = storageTypes[dtype]; !ok {
				return fmt.Errorf("--dtype is bfloat16, float32 or float16, not %q", dtype)
			}
			var err error
			if write.ShardBytes, err = parseSize(shard); err != nil {
				return fmt.Errorf("--shard-size: %w", err)
			}
			if err := distinct(from, output); err != nil {
				return err
			}
			model, err := openCheckpoint(cmd.ErrOrStderr(), from, read)
			if err != nil {
				return err
			}
			defer model.Close()
			if cmd.Flags().Changed("layers") {
				if model, err = model.Cut(layers); err != nil {
					return err
				}
			}
			bar := newMeter(cmd.ErrOrStderr(), "converting")
			write.Progress = bar.set
			err = model.Write(cmd.Context(), to, output, write)
			bar.finish()
			return err
		},
	}
	flags := command.Flags()
	flags.StringVar(&from, "from", "", "checkpoint to read, in any layout")
	flags.StringVar(&to, "to", "", "layout to write: openai, huggingface, flax or equinox")
	flags.StringVar(&output, "output", "", "where to write it")
	flags.IntVar(&layers, "layers", 0, "write only the first so many layers")
	flags.StringVar(&write.Experts, "experts", "", "for huggingface: mxfp4 (the default) or dense")
	flags.StringVar(&dtype, "dtype", "", "type of all dense arrays: bfloat16, float32 or float16 (default: bfloat16 where it is exact, else float32; equinox: float32)")
	flags.BoolVar(&write.Quantize, "quantize", false, "round experts that are no MXFP4")
	flags.StringVar(&shard, "shard-size", "", "split openai's and huggingface's files at this size, for example 5GB")
	for _, name := range []string{"from", "to", "output"} {
		command.MarkFlagRequired(name)
	}
	read = checkpointFlags(command)
	return command
}

// distinct refuses to write a checkpoint over itself.
func distinct(from, output string) error {
	a, err := os.Stat(from)
	if err != nil {
		return err
	}
	if b, err := os.Stat(output); err == nil && os.SameFile(a, b) {
		return fmt.Errorf("%s: --output is what --from reads", filepath.Clean(output))
	}
	return nil
}

// parseSize reads a number of bytes: 5000000, 5MB, 4GiB. Empty is 0.
func parseSize(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	unit := strings.TrimLeft(text, "0123456789")
	factor, ok := map[string]int64{"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
	var n int64
	if _, err := fmt.Sscan(strings.TrimSuffix(text, unit), &n); err != nil || !ok || n < 1 || n > (1<<62)/factor {
		return 0, fmt.Errorf("%q is no size; write for example 5GB or 512MiB", text)
	}
	return n * factor, nil
}
