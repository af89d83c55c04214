package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// exportFlags are the flags of `gptoss export`.
type exportFlags struct {
	checkpoint, output, operators, experts string
	precision                              string
	sequenceLength, layers                 int
	hiddenStates, blockDebug               bool
	kvCache, lastLogitsOnly                bool
	functions, expandFunctions             bool
	skipValidation, force                  bool
	read                                   *checkpoint.Options
}

// exportCommand writes a model as ONNX and proves the graph right.
func exportCommand() *cobra.Command {
	var f exportFlags
	command := &cobra.Command{
		Use:   "export --checkpoint PATH --output M.onnx",
		Short: "Write a model as an ONNX graph and prove it right",
		Long: `Write a model as an ONNX graph, M.onnx, with its weights beside it in M.onnx.data.

The graph takes input_ids [sequence] and puts out logits [sequence, vocab], and
on request every intermediate result under the registry's names. It is loaded
again and judged against the reference before it gets its name; a graph that
fails is not left behind. Neither Ctrl-C nor a full disk leaves anything, or
damages an older graph.`,
		Example: `  gptoss export --checkpoint fixtures/toy --output toy.onnx
  gptoss export --checkpoint DIR --output m.onnx --sequence-length 256 --experts dense
  gptoss export --checkpoint DIR --output m.onnx --emit-hidden-states --emit-block-debug`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.export(cmd.Context(), cmd.Flags().Changed("sequence-length"), cmd.Flags().Changed("layers"), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f.read = checkpointFlags(command)
	flags := command.Flags()
	flags.StringVar(&f.checkpoint, "checkpoint", "", "checkpoint in any layout")
	flags.StringVar(&f.output, "output", "", "graph to write; the weights go to the same name with .data")
	flags.StringVar(&f.operators, "operators", string(exporter.OperatorsPortable), "portable, or onnxruntime: its own attention and experts, many times faster there")
	flags.StringVar(&f.experts, "experts", "", "packed (MXFP4 as it is) or dense; default: packed if the checkpoint is")
	flags.StringVar(&f.precision, "precision", string(exporter.PrecisionFloat32), "float32, or bfloat16 or float16: rounded where OpenAI's torch model rounds")
	flags.IntVar(&f.layers, "layers", 0, "only the first so many layers; default: all")
	flags.IntVar(&f.sequenceLength, "sequence-length", 0, "tokens of every run, or with --kv-cache the most that a sequence grows to; default: any number")
	flags.BoolVar(&f.hiddenStates, "emit-hidden-states", false, "put out the embedding, the residual stream and the final norm")
	flags.BoolVar(&f.blockDebug, "emit-block-debug", false, "put out every other intermediate result")
	flags.BoolVar(&f.kvCache, "kv-cache", false, "continue a sequence: keys and values of earlier tokens go in and come out")
	flags.BoolVar(&f.lastLogitsOnly, "last-logits-only", false, "put out the logits of the last token alone")
	flags.BoolVar(&f.functions, "functions", false, "write blocks and what they share as functions, each once")
	flags.BoolVar(&f.expandFunctions, "expand-functions", false, "write every node where it stands (the default)")
	flags.BoolVar(&f.skipValidation, "skip-validation", false, "don't run the graph against the reference")
	flags.BoolVar(&f.force, "force", false, "replace a file that no gptoss export wrote")
	for _, name := range []string{"checkpoint", "output"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was defined above
		}
	}
	command.MarkFlagsMutuallyExclusive("functions", "expand-functions")
	return command
}

func (f exportFlags) export(ctx context.Context, lengthGiven, layersGiven bool, stdout, stderr io.Writer) error {
	if lengthGiven && f.sequenceLength < 1 {
		return fmt.Errorf("--sequence-length: %d is no length: use at least 1, or leave it out for any length", f.sequenceLength)
	}
	if f.operators != string(exporter.OperatorsPortable) && f.operators != string(exporter.OperatorsONNXRuntime) {
		return fmt.Errorf("--operators: %q is none of portable, onnxruntime", f.operators)
	}
	if f.experts != "" && f.experts != string(exporter.ExpertsPacked) && f.experts != string(exporter.ExpertsDense) {
		return fmt.Errorf("--experts: %q is none of packed, dense", f.experts)
	}
	precision, err := exporter.ParsePrecision(f.precision)
	if err != nil {
		return fmt.Errorf("--precision: %w", err)
	}
	if err := writableDirectory(f.output); err != nil {
		return err
	}
	if !f.force && !replaceable(f.output) {
		return fmt.Errorf("--output: %s exists and is not one of gptoss's graphs: use --force to replace it", f.output)
	}
	model, err := openCheckpoint(stderr, f.checkpoint, f.read)
	if err != nil {
		return err
	}
	defer model.Close()
	if layersGiven {
		if model, err = model.Cut(f.layers); err != nil {
			return fmt.Errorf("--layers: %w", err)
		}
	}

	o := exporter.Options{
		Operators:      exporter.Operators(f.operators),
		Precision:      precision,
		LastLogitsOnly: f.lastLogitsOnly,
		SequenceLength: f.sequenceLength,
		Experts:        exporter.Experts(f.experts),
		HiddenStates:   f.hiddenStates,
		BlockDebug:     f.blockDebug,
		KVCache:        f.kvCache,
		Functions:      f.functions,
		Version:        buildVersion(),
	}
	verdict := "not validated"
	if !f.skipValidation {
		o.Validate = func(ctx context.Context, path string) error {
			verdict, err = validate(ctx, model, path, f, stderr)
			return err
		}
	}
	bar := newMeter(stderr, "weights")
	defer bar.finish()
	o.Progress = func(written, total int64) {
		if bar.set(written, total); written == total {
			bar.finish()
		}
	}
	if err := exporter.Export(ctx, model, f.output, o); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s: %s\n", f.output, verdict)
	return err
}

// replaceable reports whether a path is free, or holds a graph that we wrote.
func replaceable(path string) bool {
	info, err := os.Stat(path)
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	// A graph of ours keeps its weights elsewhere and is small.
	const largest = 64 << 20
	if info.Size() > largest {
		return false
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	var graph onnxpb.ModelProto
	return proto.Unmarshal(data, &graph) == nil && graph.GetProducerName() == exporter.Producer
}

// validate runs a graph on tokens that exercise it and judges the outcome. A
// verdict other than pass is an error with status 1.
func validate(ctx context.Context, m *checkpoint.Model, path string, f exportFlags, stderr io.Writer) (string, error) {
	// One run does not pay for widened weights; decoding runs once for each token.
	session, err := onnxruntime.OpenContext(ctx, path, onnxruntime.Options{KeepWeightsMapped: !f.kvCache})
	if err != nil {
		return "", fmt.Errorf("validation: %w (or use --skip-validation)", err)
	}
	defer release(ctx, session)
	tokens := exercise(m.Config, session.Length(), f.sequenceLength)
	precision := reference.Precision(f.precision)
	results, err := session.Run(ctx, tokens)
	if err != nil {
		return "", err
	}
	if precision == reference.Float16 {
		if err := overflows(ctx, m, tokens, results); err != nil {
			return "", err
		}
	}
	if f.lastLogitsOnly {
		logits, err := filledIn(ctx, stderr, m, tokens, precision, results[taps.Logits])
		if err != nil {
			return "", err
		}
		// Apart: the logits of the reference do not follow from the graph's taps.
		delete(results, taps.Logits)
		if len(results) == 0 {
			results[taps.Logits] = logits
		} else if _, err := judgeGraph(ctx, stderr, m, tokens, precision, map[string]tensor.Tensor{taps.Logits: logits}, nil); err != nil {
			return "", err
		}
	}
	outcome, err := judgeGraph(ctx, stderr, m, tokens, precision, results, nil)
	if err != nil || !session.HasCache() {
		return outcome, err
	}
	first := max(1, len(tokens)*2/3)
	if f.lastLogitsOnly {
		first = 1
	}
	logits, err := decode(ctx, session, tokens, first)
	if err != nil {
		return "", err
	}
	if _, err := judgeGraph(ctx, stderr, m, tokens, precision, map[string]tensor.Tensor{taps.Logits: logits}, []int{first, 1}); err != nil {
		return "", fmt.Errorf("decoding token by token: %w", err)
	}
	return outcome + ", decoding token by token too", nil
}

// overflows returns an error if the results of a float16 graph are not finite. It
// names the tensor in which that begins, which need not be among them: the reference,
// which rounds at the same points, has all tensors.
func overflows(ctx context.Context, m *checkpoint.Model, tokens []int32, results map[string]tensor.Tensor) error {
	name, err := firstInfinite(m.Config, results)
	if name == "" || err != nil {
		return err
	}
	ours, err := reference.Run(ctx, m, tokens, reference.Options{Precision: reference.Float16, Taps: taps.All(m.Config)})
	if err != nil {
		return err
	}
	if first, err := firstInfinite(m.Config, ours); err != nil {
		return err
	} else if first != "" {
		name = first
	}
	return verdictError("validation: %s overflows: float16 ends at %d; export in bfloat16 or float32", name, exporter.Float16Max)
}

// firstInfinite returns the first tap in execution order that is not finite.
func firstInfinite(c config.Config, results map[string]tensor.Tensor) (string, error) {
	for _, name := range taps.All(c) {
		t, ok := results[name]
		if !ok || taps.Integer(name) {
			continue
		}
		values, err := t.Float32s()
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		for _, v := range values {
			if v-v != 0 { // infinite, or NaN
				return name, nil
			}
		}
	}
	return "", nil
}

// filledIn puts the reference's logits before those of the last token, which are
// all that the graph puts out, so that these are judged like any others.
func filledIn(ctx context.Context, stderr io.Writer, m *checkpoint.Model, tokens []int32, precision reference.Precision, last tensor.Tensor) (tensor.Tensor, error) {
	progress := newLayers(stderr, "reference", m, 1)
	defer progress.finish()
	ours, err := reference.Run(ctx, m, tokens, reference.Options{Precision: precision, Progress: func(int) { progress.next() }})
	if err != nil {
		return tensor.Tensor{}, err
	}
	before, err := ours[taps.Logits].Float32s()
	if err != nil {
		return tensor.Tensor{}, err
	}
	values, err := last.Float32s()
	if err != nil {
		return tensor.Tensor{}, err
	}
	if len(values) != m.Config.VocabSize {
		return tensor.Tensor{}, verdictError("validation: logits have shape %v, expected [1, %d]", last.Shape, m.Config.VocabSize)
	}
	return tensor.FromFloat32s([]int{len(tokens), m.Config.VocabSize}, append(before[:len(before)-len(values)], values...)), nil
}

// judgeGraph judges what a graph put out. Of the judge's reasons to be wary, one
// is let through: random tokens need not hit every clamp. Chunks is how a cache was
// fed, nil without one.
func judgeGraph(ctx context.Context, stderr io.Writer, m *checkpoint.Model, tokens []int32, precision reference.Precision, results map[string]tensor.Tensor, chunks []int) (string, error) {
	o := conformance.JudgeOptions{Catalogue: []faults.Fault{}, Chunks: chunks}
	if m.Weights() >= large {
		o.Samples = 3 // each is a run of the reference
	}
	verdict, err := judged(ctx, stderr, "validating", m, tokens, conformance.Subject{Precision: precision, Taps: results}, o)
	if err != nil {
		return "", err
	}
	if verdict.Word != conformance.Pass && verdict.Word != conformance.Partial {
		return "", verdictError("validation: %s: %s", verdict.Word, verdict.Reason)
	}
	worst := slices.MaxFunc(verdict.Findings, func(a, b conformance.Finding) int { return cmp.Compare(a.Ratio, b.Ratio) })
	return fmt.Sprintf("agrees with the reference on %d tokens, worst error %.2g of its bound (%s)", len(tokens), worst.Ratio, worst.Tap), nil
}

// decode feeds the first tokens at once and the rest one at a time, and returns the
// logits of all.
func decode(ctx context.Context, session *onnxruntime.Session, tokens []int32, first int) (tensor.Tensor, error) {
	d, err := session.Decode()
	if err != nil {
		return tensor.Tensor{}, err
	}
	defer d.Close()
	var all tensor.Tensor
	for from, n := 0, first; from < len(tokens); from, n = from+n, 1 {
		part, err := d.Step(ctx, tokens[from:from+n])
		if err != nil {
			return tensor.Tensor{}, err
		}
		if from == 0 {
			all = part
			continue
		}
		all.Data = append(all.Data, part.Data...)
		all.Shape = []int{all.Shape[0] + part.Shape[0], part.Shape[1]}
	}
	return all, nil
}

// exercise returns tokens for a validation: as many as a graph of fixed length
// takes, else 32 more than the window, so that keys drop out of it, and no more
// than the longest sequence (0: any).
func exercise(c config.Config, fixed, longest int) []int32 {
	const most = 256 // what the reference can do in reasonable time
	n := fixed
	if n == 0 {
		n = c.SlidingWindow + 32
		if longest > 0 {
			n = min(n, longest)
		}
	}
	tokens := make([]int32, min(n, most))
	for i := range tokens {
		// Knuth's multiplicative hash: far apart, and the same every time.
		tokens[i] = int32(uint64(i+1) * 2654435761 % uint64(c.VocabSize))
	}
	return tokens
}
