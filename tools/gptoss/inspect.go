package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
)

// inspection is what inspect prints; --json prints it as it is.
type inspection struct {
	Path    string                  `json:"path"`
	Layout  string                  `json:"layout"`
	Config  config.Config           `json:"config"`
	Tensors []checkpoint.TensorInfo `json:"tensors"`
	Files   int                     `json:"files"`
	Bytes   int64                   `json:"bytes"`
	Weights int64                   `json:"weights"` // numbers, MXFP4 unpacked
	Digest  string                  `json:"digest,omitempty"`
}

// inspectCommand shows what a checkpoint is.
func inspectCommand() *cobra.Command {
	var asJSON, noDigest bool
	var options *checkpoint.Options
	command := &cobra.Command{
		Use:   "inspect PATH",
		Short: "Show a checkpoint's layout, configuration, tensors and digest",
		Long: `Show a checkpoint's layout, configuration, tensors and digest.

PATH is a directory, a .safetensors, .msgpack (Flax) or .eqx (Equinox) file, or a
model's directory in the Hugging Face hub's cache. The digest identifies the model: it is computed from the
values of all weights, which are read completely and checked to be finite, and
it is the same for every layout of the same model.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, arguments []string) error {
			model, err := openCheckpoint(cmd.ErrOrStderr(), arguments[0], options)
			if err != nil {
				return err
			}
			defer model.Close()
			i := inspection{
				Path: arguments[0], Layout: model.Source.Layout, Config: model.Config,
				Tensors: model.Tensors(), Weights: model.Weights(),
			}
			files := map[string]bool{}
			for _, t := range i.Tensors {
				files[t.File] = true
				i.Bytes += t.Bytes
			}
			i.Files = len(files)
			if !noDigest {
				bar := newMeter(cmd.ErrOrStderr(), "digest")
				i.Digest, err = model.DigestProgress(cmd.Context(), bar.set)
				bar.finish()
				if err != nil {
					return err
				}
			}
			if asJSON {
				encoder := json.NewEncoder(cmd.OutOrStdout())
				encoder.SetIndent("", "  ")
				return encoder.Encode(i)
			}
			return i.print(cmd.OutOrStdout())
		},
	}
	options = checkpointFlags(command)
	command.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	command.Flags().BoolVar(&noDigest, "no-digest", false, "don't read the weights: no digest, no check for NaN")
	return command
}

func (i inspection) print(w io.Writer) error {
	c := i.Config
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name string, values ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, strings.TrimSuffix(fmt.Sprintln(values...), "\n"))
	}
	row("path", i.Path)
	row("layout", i.Layout)
	if i.Digest != "" {
		row("digest", i.Digest)
	}
	row("weights", grouped(i.Weights))
	row("size", fmt.Sprintf("%s bytes in %d tensors in %d files", grouped(i.Bytes), len(i.Tensors), i.Files))
	fmt.Fprintln(t)
	row("layers", c.Layers)
	row("hidden size", c.HiddenSize)
	row("intermediate size", c.IntermediateSize)
	row("heads", fmt.Sprintf("%d query, %d key/value, head_dim %d", c.Heads, c.KVHeads, c.HeadDim))
	row("experts", fmt.Sprintf("%d, %d per token", c.Experts, c.ExpertsPerToken))
	row("vocabulary", c.VocabSize)
	row("sliding window", fmt.Sprintf("%d keys in layers %s", c.SlidingWindow, slidingLayers(c)))
	row("rope", fmt.Sprintf("theta %g, YaRN factor %g over %d positions, ntk alpha %g, beta %g, truncate %t",
		c.RopeTheta, c.RopeScalingFactor, c.InitialContextLength, c.RopeNTKAlpha, c.RopeNTKBeta, c.RopeTruncate))
	row("swiglu", fmt.Sprintf("limit %g, alpha %g", c.SwiGLULimit, c.SwiGLUAlpha))
	row("norm epsilon", c.NormEpsilon)
	fmt.Fprintln(t)
	if err := t.Flush(); err != nil {
		return err
	}

	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "tensor\tdtype\tshape\tbytes\tfile")
	for _, tensor := range i.Tensors {
		fmt.Fprintf(t, "%s\t%s\t%v\t%s\t%s\n", tensor.Name, tensor.DType, tensor.Shape, grouped(tensor.Bytes), filepath.Base(tensor.File))
	}
	return t.Flush()
}

// slidingLayers lists the layers with a window, shortly where they alternate.
func slidingLayers(c config.Config) string {
	var layers []string
	alternating := true
	for n := range c.Layers {
		slides := c.Window(n) > 0
		alternating = alternating && slides == (n%2 == 0)
		if slides {
			layers = append(layers, strconv.Itoa(n))
		}
	}
	switch {
	case len(layers) == 0:
		return "(none)"
	case alternating && c.Layers > 3:
		return "0, 2, 4, ..."
	}
	return strings.Join(layers, ", ")
}

// grouped writes a number with commas between thousands.
func grouped(n int64) string {
	text := strconv.FormatInt(n, 10)
	for at := len(text) - 3; at > 0; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}
