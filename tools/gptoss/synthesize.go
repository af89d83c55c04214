package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
)

// synthesizeFlags are the flags of `gptoss synthesize`.
type synthesizeFlags struct {
	layers         int
	config, output string
	seed           uint64
	noDigest       bool
	force          bool
	ifMissing      bool
}

// synthesizeCommand makes a checkpoint of random weights at any width.
func synthesizeCommand() *cobra.Command {
	var f synthesizeFlags
	command := &cobra.Command{
		Use:   "synthesize [--layers N] [--output DIR] [--config 20b|120b|FILE]",
		Short: "Make a checkpoint of random weights, at full width",
		Long: `Make a checkpoint of random weights in OpenAI's layout, at full width.

The bytes depend on the configuration and the seed alone: everybody gets the
same model, and the first layers of a deep one are those of a shallow one. The
weights' statistics are a real model's, so that activations stay sane through all
layers and the router uses all experts. The path and the digest are printed.

Without --output the checkpoint goes to the cache directory (GPTOSS_CACHE, else
the user's), where the tests with full width look for it.`,
		Example: `  gptoss synthesize --layers 2
  gptoss synthesize --config 120b --layers 4 --output build/four-layers`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.synthesize(cmd.Context(), cmd.Flags().Changed("layers"), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := command.Flags()
	flags.IntVar(&f.layers, "layers", 0, "layers; default: all of the configuration's")
	flags.StringVar(&f.config, "config", "20b", "20b, 120b, or a config.json")
	flags.StringVar(&f.output, "output", "", "directory to write; default: in the cache directory")
	flags.Uint64Var(&f.seed, "seed", 1, "seed of the generator")
	flags.BoolVar(&f.noDigest, "no-digest", false, "don't read the weights again for the digest")
	flags.BoolVar(&f.force, "force", false, "replace a checkpoint that is there")
	flags.BoolVar(&f.ifMissing, "if-missing", false, "print the path of a checkpoint that is there, instead of an error")
	command.MarkFlagsMutuallyExclusive("force", "if-missing")
	return command
}

func (f synthesizeFlags) synthesize(ctx context.Context, layersGiven bool, stdout, stderr io.Writer) error {
	if layersGiven && f.layers < 1 {
		return fmt.Errorf("--layers: %d is no number of layers: use at least 1", f.layers)
	}
	c, err := f.configuration()
	if err != nil {
		return err
	}
	output, err := f.directory(c)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(output, fixtures.WeightsFile)); err == nil && !f.force {
		if f.ifMissing {
			_, err = fmt.Fprintln(stdout, output)
			return err
		}
		return fmt.Errorf("--output: %s already holds a checkpoint: use --force to replace it", output)
	}

	bar := newMeter(stderr, "weights")
	err = fixtures.Synthesize(ctx, c, f.seed, fixtures.Deep, output, fixtures.WithProgress(bar.set))
	bar.finish()
	if err != nil {
		return err
	}
	digest := ""
	if !f.noDigest {
		if digest, err = digestOf(ctx, output); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintln(stdout, output, digest)
	return err
}

// configuration resolves --config and --layers.
func (f synthesizeFlags) configuration() (config.Config, error) {
	layers := f.layers
	switch f.config {
	case "20b":
		if layers == 0 {
			layers = 24
		}
		return fixtures.GPTOSS20B(layers), nil
	case "120b":
		if layers == 0 {
			layers = 36
		}
		return fixtures.GPTOSS120B(layers), nil
	}
	c, err := config.Read(f.config)
	if errors.Is(err, os.ErrNotExist) {
		return c, fmt.Errorf("--config: %q is none of 20b, 120b, and no file", f.config)
	}
	if err == nil && layers > 0 {
		c.Layers, c.Sliding = layers, config.Alternating(layers)
	}
	return c, err
}

// directory is where the checkpoint goes.
func (f synthesizeFlags) directory(c config.Config) (string, error) {
	if f.output != "" {
		return f.output, nil
	}
	if f.config != "20b" && f.config != "120b" {
		return "", errors.New("--output is needed with a --config of your own")
	}
	cache, err := library.CacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "checkpoints", fixtures.CacheName(f.config, c.Layers, f.seed)), nil
}

func digestOf(ctx context.Context, path string) (string, error) {
	model, err := checkpoint.Open(path)
	if err != nil {
		return "", err
	}
	defer model.Close()
	return model.Digest(ctx)
}
