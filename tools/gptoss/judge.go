package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// subjectFlags say what is judged: a file of tensors, or a graph to run first.
type subjectFlags struct {
	checkpoint, tokens, tensors, onnx, precision string
	read                                         *checkpoint.Options
}

// register defines the flags. instead names others, already there, that may stand
// for a file of tensors and make tokens optional.
func (f *subjectFlags) register(command *cobra.Command, instead ...string) {
	f.read = checkpointFlags(command)
	flags := command.Flags()
	flags.StringVar(&f.checkpoint, "checkpoint", "", "the model that the subject claims to run")
	flags.StringVar(&f.tokens, "tokens", "", "ids separated by commas, or a file with a JSON array of ids")
	flags.StringVar(&f.tensors, "tensors", "", "what the subject put out: .safetensors or .npz, named as the registry names taps")
	flags.StringVar(&f.onnx, "onnx", "", "a graph to run instead of --tensors")
	flags.StringVar(&f.precision, "precision", string(reference.Float32), "the arithmetic that made the tensors: float32, bfloat16 or float16")
	required := []string{"checkpoint", "tokens"}
	if len(instead) > 0 {
		required = required[:1]
	}
	for _, name := range required {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was defined above
		}
	}
	subjects := append([]string{"tensors", "onnx"}, instead...)
	command.MarkFlagsMutuallyExclusive(subjects...)
	command.MarkFlagsOneRequired(subjects...)
}

// judge loads everything and judges it.
func (f subjectFlags) judge(command *cobra.Command, o conformance.JudgeOptions) (*conformance.Verdict, *checkpoint.Model, error) {
	ctx := command.Context()
	precision, err := reference.ParsePrecision(f.precision)
	if err != nil {
		return nil, nil, err
	}
	tokens, err := parseTokens(f.tokens)
	if err != nil {
		return nil, nil, err
	}
	m, err := openCheckpoint(command.ErrOrStderr(), f.checkpoint, f.read)
	if err != nil {
		return nil, nil, err
	}
	if err := reference.CheckTokens(m.Config, tokens); err != nil {
		return nil, m, fmt.Errorf("--tokens: %w", err)
	}
	results, err := f.results(ctx, m, tokens)
	if err != nil {
		return nil, m, err
	}
	v, err := f.verdict(ctx, command.ErrOrStderr(), m, tokens, precision, results, o)
	if err != nil {
		return nil, m, fmt.Errorf("%s: %w", f.name(), err)
	}
	return v, m, nil
}

// name is the file that is judged.
func (f subjectFlags) name() string { return f.tensors + f.onnx }

// verdict judges taps, or generated tokens with their log-probabilities if that
// is all that the file holds.
func (f subjectFlags) verdict(ctx context.Context, stderr io.Writer, m *checkpoint.Model, tokens []int32, precision reference.Precision, results map[string]tensor.Tensor, o conformance.JudgeOptions) (*conformance.Verdict, error) {
	generated, hasTokens := results[conformance.GeneratedTokens]
	logProbs, hasLogProbs := results[conformance.GeneratedLogProbs]
	if !hasTokens || !hasLogProbs {
		return judged(ctx, stderr, "judging", m, tokens, conformance.Subject{Precision: precision, Taps: results}, o)
	}
	ids, err := generated.Int32s()
	if err != nil {
		return nil, fmt.Errorf("tensor %s: %w", conformance.GeneratedTokens, err)
	}
	values, err := logProbs.Float64s()
	if err != nil {
		return nil, fmt.Errorf("tensor %s: %w", conformance.GeneratedLogProbs, err)
	}
	return conformance.JudgeGreedy(ctx, m, tokens, conformance.Greedy{Precision: precision, Tokens: ids, LogProbs: values}, o)
}

func (f subjectFlags) results(ctx context.Context, m *checkpoint.Model, tokens []int32) (map[string]tensor.Tensor, error) {
	if f.onnx == "" {
		return readTensors(f.tensors)
	}
	session, err := onnxruntime.OpenContext(ctx, f.onnx, onnxruntime.Options{})
	if err != nil {
		return nil, err
	}
	defer release(ctx, session)
	return session.Run(ctx, tokens)
}

// readTensors reads .npz by its name, anything else as safetensors. The result
// does not depend on the file any more.
func readTensors(path string) (map[string]tensor.Tensor, error) {
	if strings.EqualFold(filepath.Ext(path), ".npz") {
		return tensor.ReadNPZ(path)
	}
	file, err := tensor.OpenSafetensors(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	results := map[string]tensor.Tensor{}
	for _, name := range file.Names() {
		t, _ := file.Tensor(name)
		t.Data = append([]byte(nil), t.Data...)
		results[name] = t
	}
	return results, nil
}

// judgeCommand judges the output of any implementation.
func judgeCommand() *cobra.Command {
	var subject subjectFlags
	var server serverFlags
	var output string
	var options conformance.JudgeOptions
	command := &cobra.Command{
		Use:   "judge --checkpoint PATH --tokens IDS (--tensors FILE | --onnx M.onnx | --server URL) --precision P",
		Short: "Judge what an implementation put out, and name its mistake",
		Long: `Judge what an implementation of gpt-oss put out for some tokens: any of the
registry's taps, logits alone at the least; or, where a text endpoint gives no
more than that, generated_tokens [n] with generated_logprobs [n] that follow the
prompt in --tokens. The truth is computed on the spot, in float64, from the
checkpoint. If the subject fails, the mistake that explains it is named.

--server asks a text endpoint that serves the checkpoint: --tokens or --prompt, or
else a set of prompts that suits it.

The line "diagnosis: ID" stands alone, for scripts; instead of ID it has "ID in
layer 3" where the others are right, ID+ID for two mistakes together, or none. The
exit status is 0 for pass and partial, 1 for fail, 2 for an error.`,
		Example: `  gptoss judge --checkpoint fixtures/toy --tokens 1,2,3 --tensors mine.safetensors --precision float32
  gptoss judge --checkpoint DIR --tokens ids.json --onnx mine.onnx --precision float32 --json verdict.json
  gptoss judge --checkpoint fixtures/canary --server http://localhost:8080 --precision bfloat16`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			judge, name := subject.judge, subject.name()
			if server.url != "" {
				judge, name = server.judge(subject), server.url
			} else if err := server.unused(cmd, subject); err != nil {
				return err
			}
			v, m, err := judge(cmd, options)
			if m != nil {
				defer m.Close()
			}
			if err != nil {
				return err
			}
			if output != "" {
				if err := writeJSON(cmd.Context(), output, v); err != nil {
					return err
				}
			}
			printVerdict(cmd.OutOrStdout(), v)
			if v.Word == conformance.Fail {
				return verdictError("%s fails: %s", name, v.Reason)
			}
			return nil
		},
	}
	server.register(command)
	subject.register(command, "server")
	command.Flags().IntSliceVar(&options.Chunks, "chunks", nil, "the subject ran with a KV cache, so many tokens at a time; the last number repeats: 16,1")
	command.Flags().StringVar(&output, "json", "", "also write the whole verdict to this file")
	command.MarkFlagsMutuallyExclusive("tokens", "prompt")
	command.MarkFlagsMutuallyExclusive("server", "chunks") // a server's are known: the prompt, then token by token
	return command
}

func writeJSON(ctx context.Context, path string, value any) error {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(ctx, path, append(text, '\n'))
}

// printVerdict writes a verdict for people, with the diagnosis on a line of its
// own for scripts.
func printVerdict(w io.Writer, v *conformance.Verdict) {
	fmt.Fprintf(w, "verdict: %s\n", v.Word)
	if v.Reason != "" {
		fmt.Fprintf(w, "because: %s\n", v.Reason)
	}
	if v.FirstDivergence != "" {
		fmt.Fprintf(w, "first divergence: %s\n", v.FirstDivergence)
	}
	fmt.Fprintln(w)
	printStages(w, v)
	for _, missing := range v.Unexercised {
		fmt.Fprintf(w, "not exercised by this input: %s\n", missing)
	}
	if len(v.Indistinguish) > 0 {
		fmt.Fprintf(w, "indistinguishable from logits alone: %s\n", strings.Join(v.Indistinguish, ", "))
	}
	if len(v.Ignored) > 0 {
		fmt.Fprintf(w, "ignored, not names of taps: %s\n", strings.Join(v.Ignored, ", "))
	}
	printDiagnosis(w, v)
}

// printStages writes a row for each stage: the worst error of the stage judged
// alone (or over the gap between two taps), and that of the free run, which also
// has in it what went wrong upstream.
func printStages(w io.Writer, v *conformance.Verdict) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "error ÷ bound\tby itself\tat\tfree-running\tat")
	for _, stage := range conformance.Stages {
		alone, free := worstOf(v, stage, false), worstOf(v, stage, true)
		if alone != nil || free != nil {
			fmt.Fprintf(table, "%s\t%s\t%s\n", stage, cells(alone), cells(free))
		}
	}
	table.Flush()
	if s := v.Statistics; s != nil {
		fmt.Fprintf(w, "\nlogits: max |Δ| %.3g, KL mean %.3g, KL p95 %.3g, cosine %.6f, top-1 %.3f, top-5 %.3f (these decide nothing)\n",
			s.MaxDiff, s.KLMean, s.KL95, s.Cosine, s.Top1, s.Top5)
	}
}

// worstOf finds a stage's worst finding of the free run, or of the other methods.
func worstOf(v *conformance.Verdict, stage string, free bool) *conformance.Finding {
	var worst *conformance.Finding
	for i, f := range v.Findings {
		if f.Stage == stage && (f.Method == conformance.FreeRunning) == free && (worst == nil || f.Ratio > worst.Ratio) {
			worst = &v.Findings[i]
		}
	}
	return worst
}

func cells(f *conformance.Finding) string {
	if f == nil {
		return "–\t"
	}
	return fmt.Sprintf("%.3g %s\t%s", f.Ratio, f.Verdict, f.Tap)
}

func printDiagnosis(w io.Writer, v *conformance.Verdict) {
	if v.Word != conformance.Fail {
		return
	}
	d := v.Diagnosis
	fmt.Fprintf(w, "diagnosis: %s\n", d.Name())
	if d.ID() == "none" {
		fmt.Fprintf(w, "no known fault explains this; the first stage that differs is %s\n", v.FirstDivergence)
		return
	}
	fmt.Fprintf(w, "remaining error: %.3g (%.3g of its bound), from %s\n", d.RemainingMax, d.Remaining, d.From)
	if len(d.Equals) > 0 {
		fmt.Fprintf(w, "cannot be told apart on this input: %s\n", strings.Join(d.Equals, ", "))
	}
}
