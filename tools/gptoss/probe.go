package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// probeFlags are the flags of `gptoss probe`.
type probeFlags struct {
	against, checkpoint, tokens, prompt, dtype, transcript string

	length, layers, inject int
	seed                   uint64
	correct                bool
	options                *checkpoint.Options
}

// implementations that tools/oracles can run.
var implementations = []string{"torch", "transformers", "flax", "equinox"}

// probeCommand compares the reference with a real implementation.
func probeCommand() *cobra.Command {
	var f probeFlags
	command := &cobra.Command{
		Use:   "probe --against torch|transformers|flax|equinox --checkpoint PATH",
		Short: "Run a real implementation on the same weights and tokens, and compare stage by stage",
		Long: `Run a real implementation of gpt-oss on the same weights and tokens as the
reference, and print a report that a reviewer can keep: the logits' difference,
the largest difference of every stage, and a section [issues] that is empty when
every tensor was there and had its shape.

The implementation runs in the Python environment that "make oracles" sets up.
Flax and Equinox run as they ship, with a window that is one key too long, or
corrected with --correct-window. The exit status is the judge's: 1 for fail.`,
		Example: `  gptoss probe --against torch --checkpoint fixtures/toy --tokens 1,2,3
  gptoss probe --against flax --checkpoint DIR --sequence-length 160 --seed 7 --transcript probe.md
  gptoss probe --against transformers --checkpoint DIR --tokens ids.json --inject-layer 1 --dtype bfloat16`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.defaults(cmd.Flags())
			return f.run(cmd)
		},
	}
	flags := command.Flags()
	flags.StringVar(&f.against, "against", "", "the implementation: "+strings.Join(implementations, ", "))
	flags.StringVar(&f.checkpoint, "checkpoint", "", "the model, in any layout")
	flags.StringVar(&f.tokens, "tokens", "", "ids separated by commas, or a file with a JSON array of ids; drawn from --seed if absent")
	flags.StringVar(&f.prompt, "prompt", "", "text for the tokenizer o200k_harmony, instead of --tokens")
	flags.IntVar(&f.length, "sequence-length", 0, "use the first N tokens, or draw N (default: 8 more than the window)")
	flags.IntVar(&f.layers, "max-layers", 0, "cut the model after N blocks")
	flags.StringVar(&f.dtype, "dtype", string(reference.Float32), "the implementation's arithmetic: float32 or bfloat16")
	flags.Uint64Var(&f.seed, "seed", 0, "draws the tokens if none are given")
	flags.IntVar(&f.inject, "inject-layer", -1, "feed block N of both with the same input, the reference's, and compare that block alone")
	flags.BoolVar(&f.correct, "correct-window", false, "flax and equinox: mend their known faults first")
	f.options = checkpointFlags(command)
	flags.StringVar(&f.transcript, "transcript", "", "also write the report to this file")
	for _, name := range []string{"against", "checkpoint"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was defined above
		}
	}
	command.MarkFlagsMutuallyExclusive("tokens", "prompt")
	return command
}

// defaults tells "not given" from a value.
func (f *probeFlags) defaults(flags *pflag.FlagSet) {
	if !flags.Changed("inject-layer") {
		f.inject = -1
	} else if f.inject < 0 {
		f.inject = -2 // refused by check
	}
}

func (f probeFlags) check() error {
	precision, err := reference.ParsePrecision(f.dtype)
	switch {
	case !slices.Contains(implementations, f.against):
		return fmt.Errorf("--against: %q is none of %s", f.against, strings.Join(implementations, ", "))
	case err != nil || precision != reference.Float32 && precision != reference.BFloat16:
		return fmt.Errorf("--dtype: %q is none of float32, bfloat16", f.dtype)
	case f.against == "flax" && precision != reference.Float32:
		return errors.New("--dtype: Flax's model runs in float32 only; what it calls bfloat16 keeps the residual stream in float32")
	case f.length < 0:
		return errors.New("--sequence-length: want at least 1")
	case f.layers < 0:
		return errors.New("--max-layers: want at least 1")
	case f.inject < -1:
		return errors.New("--inject-layer: blocks count from 0")
	case f.correct && (f.against == "torch" || f.against == "transformers"):
		return fmt.Errorf("--correct-window: %s needs no correction", f.against)
	}
	return nil
}

func (f probeFlags) run(cmd *cobra.Command) error {
	ctx := cmd.Context()
	if err := f.check(); err != nil {
		return err
	}
	m, err := openCheckpoint(cmd.ErrOrStderr(), f.checkpoint, f.options)
	if err != nil {
		return err
	}
	defer m.Close()
	if f.layers > 0 {
		if m, err = m.Cut(f.layers); err != nil {
			return fmt.Errorf("--max-layers: %w", err)
		}
	}
	tokens, err := f.sequence(m.Config)
	if err != nil {
		return err
	}
	if f.inject >= m.Config.Layers {
		return fmt.Errorf("--inject-layer: there is no block %d, the model has %d", f.inject, m.Config.Layers)
	}
	if f.transcript != "" {
		if err := writableDirectory(f.transcript); err != nil {
			return err
		}
	}
	report, err := f.probe(ctx, m, tokens)
	if err != nil {
		return err
	}
	report.Command = commandLine(cmd)
	text := report.markdown()
	if f.transcript != "" {
		if err := atomicfile.Write(ctx, f.transcript, []byte(text)); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(cmd.OutOrStdout(), text); err != nil {
		return err
	}
	if report.Verdict.Word == conformance.Fail {
		return verdictError("%s fails: %s", f.against, report.Verdict.Reason)
	}
	return nil
}

// sequence reads the tokens, or draws them.
func (f probeFlags) sequence(c config.Config) ([]int32, error) {
	if f.tokens == "" && f.prompt == "" {
		n := f.length
		if n == 0 {
			n = c.SlidingWindow + 8
		}
		return drawTokens(c, f.seed, n), nil
	}
	tokens, err := f.given(c)
	if err != nil {
		return nil, err
	}
	if f.length > len(tokens) {
		return nil, fmt.Errorf("--sequence-length: there are %d tokens, %d were asked for; padding would be compared with padding", len(tokens), f.length)
	}
	if f.length > 0 {
		tokens = tokens[:f.length]
	}
	if err := reference.CheckTokens(c, tokens); err != nil {
		return nil, fmt.Errorf("--tokens: %w", err)
	}
	return tokens, nil
}

// given reads --tokens or encodes --prompt.
func (f probeFlags) given(c config.Config) ([]int32, error) {
	if f.prompt == "" {
		return parseTokens(f.tokens)
	}
	if err := checkVocabulary(c.VocabSize); err != nil {
		return nil, fmt.Errorf("--prompt: %w", err)
	}
	tokens, err := tokenizer.EncodeSpecial(f.prompt)
	if err != nil {
		return nil, fmt.Errorf("--prompt: %w", err)
	}
	return tokens, nil
}

// drawTokens draws a reproducible sequence from the whole vocabulary.
func drawTokens(c config.Config, seed uint64, n int) []int32 {
	g := fixtures.NewCounter(seed, "probe.tokens")
	tokens := make([]int32, n)
	for i := range tokens {
		tokens[i] = int32(g.Word(uint64(i)) >> 32 % uint64(c.VocabSize))
	}
	return tokens
}

// probe runs both sides and compares.
func (f probeFlags) probe(ctx context.Context, m *checkpoint.Model, tokens []int32) (*probeReport, error) {
	digest, err := m.Digest(ctx)
	if err != nil {
		return nil, err
	}
	names := taps.All(m.Config)
	want, err := reference.Run(ctx, m, tokens, reference.Options{Precision: reference.Float64, Taps: names})
	if err != nil {
		return nil, err
	}
	directory, cleanup, err := oracleDirectory(ctx, m, *f.options)
	if err != nil {
		return nil, err
	}
	defer cleanup()
	oracle := oracleRun{
		Implementation: f.against, Precision: reference.Precision(f.dtype), Checkpoint: directory,
		Tokens: tokens, Layers: m.Config.Layers, Correct: f.correct,
	}
	if f.inject >= 0 {
		input, err := injection(want[taps.Block(f.inject, taps.Input)], oracle.Precision)
		if err != nil {
			return nil, err
		}
		oracle.InjectLayer, oracle.Inject = f.inject, &input
		names = blockNames(f.inject)
	}
	got, err := runOracle(ctx, oracle)
	if err != nil {
		return nil, err
	}
	report := &probeReport{
		Implementation: f.against, Corrected: f.correct, Precision: oracle.Precision, Packages: got.Packages,
		Source: m.Source, Digest: digest, Config: m.Config, Tokens: tokens, Injected: f.inject,
	}
	return report, report.compare(ctx, m, names, got.Taps, want)
}

// blockNames lists the taps of one block.
func blockNames(layer int) []string {
	names := make([]string, len(taps.InBlock))
	for i, name := range taps.InBlock {
		names[i] = taps.Block(layer, name)
	}
	return names
}

// injection rounds a block's input to the implementation's arithmetic, so that
// both sides start from the same numbers.
func injection(input tensor.Tensor, precision reference.Precision) (tensor.Tensor, error) {
	values, err := input.Float32s()
	if err != nil {
		return tensor.Tensor{}, err
	}
	if precision == reference.BFloat16 {
		return tensor.FromBFloat16s(input.Shape, values), nil
	}
	return tensor.FromFloat32s(input.Shape, values), nil
}

// commandLine rebuilds the command from its flags, in a fixed order, so that the
// same probe has the same transcript however it was typed.
func commandLine(cmd *cobra.Command) string {
	line := []string{cmd.CommandPath()}
	cmd.Flags().VisitAll(func(flag *pflag.Flag) {
		if !flag.Changed || flag.Name == "transcript" {
			return
		}
		line = append(line, "--"+flag.Name)
		if flag.Value.Type() != "bool" {
			line = append(line, quoteArgument(flag.Value.String()))
		}
	})
	return strings.Join(line, " ")
}

func quoteArgument(value string) string {
	if value == "" || strings.ContainsAny(value, " \t\"'$\\") {
		return strconv.Quote(value)
	}
	return value
}
