package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// compareFlags are the flags of `gptoss compare`.
type compareFlags struct {
	checkpoint, onnx, prompt, tokens string
	sequenceLength                   int
	hiddenStates, blockDebug         bool
	optimization, precision          string
	names                            []string
	transcript                       string
	read                             *checkpoint.Options
}

// compareCommand sets a graph beside its checkpoint, tensor by tensor.
func compareCommand() *cobra.Command {
	var f compareFlags
	command := &cobra.Command{
		Use:   "compare --checkpoint PATH --onnx M.onnx (--prompt TEXT | --tokens IDS)",
		Short: "Compare an ONNX graph with its checkpoint, tensor by tensor",
		Long: `Compare an ONNX graph with its checkpoint: largest and mean difference from the
float64 reference for every tensor, over all positions of the prompt and never
over padding, and the judge's verdict on each.

The exit status is 1 if a tensor is wrong. The [issues] section at the end is
empty if every tensor matched.`,
		Example: `  gptoss compare --checkpoint DIR --onnx m.onnx --prompt "France capital? Answer:"
  gptoss compare --checkpoint fixtures/toy --onnx toy.onnx --tokens 1,2,3 --compare-hidden-states --compare-block-debug
  gptoss compare --checkpoint DIR --onnx theirs.onnx --tokens ids.json --name output_0=logits --transcript theirs.md`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.compare(cmd.Context(), commandLine(cmd), cmd.Flags().Changed("sequence-length"), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f.read = checkpointFlags(command)
	flags := command.Flags()
	flags.StringVar(&f.checkpoint, "checkpoint", "", "checkpoint in any layout")
	flags.StringVar(&f.onnx, "onnx", "", "graph to compare")
	flags.StringVar(&f.prompt, "prompt", "", "text, for models with gpt-oss's vocabulary")
	flags.StringVar(&f.tokens, "tokens", "", "ids separated by commas, or a file with a JSON array of ids")
	flags.IntVar(&f.sequenceLength, "sequence-length", 0, "run this many tokens, padded at the end; the padding is not compared")
	flags.BoolVar(&f.hiddenStates, "compare-hidden-states", false, "compare the embedding, the residual stream and the final norm too")
	flags.BoolVar(&f.blockDebug, "compare-block-debug", false, "compare every other intermediate result too")
	flags.StringVar(&f.optimization, "graph-optimization", onnxruntime.OptimizeAll, "ONNX Runtime's optimization of the graph: "+strings.Join(onnxruntime.Levels, ", "))
	flags.StringVar(&f.precision, "precision", "", "arithmetic of the graph: float32, bfloat16 or float16; default: what the graph says, or float32")
	flags.StringArrayVar(&f.names, "name", nil, "THEIRS=OURS: what an input or output of the graph is called here; may be repeated")
	flags.StringVar(&f.transcript, "transcript", "", "markdown file to write the comparison to")
	for _, name := range []string{"checkpoint", "onnx"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was defined above
		}
	}
	command.MarkFlagsMutuallyExclusive("prompt", "tokens")
	command.MarkFlagsOneRequired("prompt", "tokens")
	return command
}

func (f compareFlags) compare(ctx context.Context, command string, lengthGiven bool, stdout, stderr io.Writer) error {
	if lengthGiven && f.sequenceLength < 1 {
		return fmt.Errorf("--sequence-length: %d is no length", f.sequenceLength)
	}
	if f.transcript != "" {
		if err := writableDirectory(f.transcript); err != nil {
			return errors.New(strings.Replace(err.Error(), "--output", "--transcript", 1))
		}
	}
	names, err := f.nameMap()
	if err != nil {
		return err
	}
	m, err := openCheckpoint(stderr, f.checkpoint, f.read)
	if err != nil {
		return err
	}
	defer m.Close()
	tokens, err := f.ids(m)
	if err != nil {
		return err
	}
	session, err := onnxruntime.OpenContext(ctx, f.onnx, onnxruntime.Options{GraphOptimization: f.optimization, Names: names})
	if err != nil {
		return err
	}
	defer release(ctx, session)
	c, err := f.run(ctx, stderr, m, session, tokens)
	if err != nil {
		return err
	}
	c.command = command
	if c.facts, err = f.facts(ctx, m, session, tokens, c.precision); err != nil {
		return err
	}
	text := c.markdown(f.onnx)
	if f.transcript != "" {
		if err := atomicfile.Write(ctx, f.transcript, []byte(text)); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(stdout, text); err != nil {
		return err
	}
	if c.failed() {
		return verdictError("%s: %d of %d tensors differ from the checkpoint's", f.onnx, len(c.issues), len(c.rows))
	}
	return nil
}

// nameMap reads --name THEIRS=OURS.
func (f compareFlags) nameMap() (map[string]string, error) {
	names := map[string]string{}
	for _, pair := range f.names {
		theirs, ours, ok := strings.Cut(pair, "=")
		if !ok || theirs == "" || ours == "" {
			return nil, fmt.Errorf("--name: %q is not THEIRS=OURS", pair)
		}
		names[theirs] = ours
	}
	return names, nil
}

// ids returns the tokens of the prompt.
func (f compareFlags) ids(m *checkpoint.Model) ([]int32, error) {
	tokens, err := parseTokens(f.tokens)
	if f.prompt != "" {
		if m.Config.VocabSize < tokenizer.VocabSize {
			return nil, fmt.Errorf("--prompt: the model has a vocabulary of %d, and the tokenizer needs %d: use --tokens",
				m.Config.VocabSize, tokenizer.VocabSize)
		}
		tokens, err = tokenizer.EncodeSpecial(f.prompt)
	}
	if err != nil {
		return nil, err
	}
	if err := reference.CheckTokens(m.Config, tokens); err != nil {
		return nil, err
	}
	if f.sequenceLength > 0 && len(tokens) > f.sequenceLength {
		return nil, fmt.Errorf("--sequence-length: the prompt has %d tokens, more than %d", len(tokens), f.sequenceLength)
	}
	return tokens, nil
}

// wanted lists what is compared, in execution order.
func (f compareFlags) wanted(m *checkpoint.Model) []string {
	return slices.DeleteFunc(taps.All(m.Config), func(full string) bool {
		_, name := taps.Split(full)
		switch {
		case name == taps.Logits:
			return false
		case name == taps.Embedding, name == taps.FinalNorm, slices.Contains(taps.HiddenStates, name):
			return !f.hiddenStates
		}
		return !f.blockDebug
	})
}

// comparison is what compare found.
type comparison struct {
	command   string
	facts     [][2]string
	precision reference.Precision
	rows      []comparedTensor
	missing   []string // wanted, and not among the graph's outputs
	issues    []string
	findings  []conformance.Finding
}

type comparedTensor struct {
	name               string
	largest, mean, top float64 // differences, and the largest value of the truth
	differing          int     // of integers
	ratio              float64
	verdict            conformance.Word
}

func (c *comparison) failed() bool { return len(c.issues) > 0 }

// run runs the graph and the reference, and judges.
func (f compareFlags) run(ctx context.Context, stderr io.Writer, m *checkpoint.Model, session *onnxruntime.Session, tokens []int32) (*comparison, error) {
	precision, err := f.arithmetic(session)
	if err != nil {
		return nil, err
	}
	c := &comparison{precision: precision}
	var names []string
	for _, name := range f.wanted(m) {
		if slices.Contains(session.Outputs(), name) {
			names = append(names, name)
		} else {
			c.missing = append(c.missing, name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s: the graph puts out none of what is to be compared; it has %s", f.onnx, strings.Join(session.Outputs(), ", "))
	}
	padded := append(slices.Clone(tokens), make([]int32, max(0, f.sequenceLength-len(tokens)))...)
	results, err := session.RunTaps(ctx, padded, names)
	if err != nil {
		return nil, err
	}
	lastOnly := len(padded) > 1 && slices.Equal(results[taps.Logits].Shape, []int{1, m.Config.VocabSize})
	if lastOnly && len(padded) > len(tokens) {
		return nil, fmt.Errorf("%s: the graph puts out the last token's logits alone, which here is padding: leave --sequence-length out", f.onnx)
	}
	for name, t := range results {
		if lastOnly && name == taps.Logits {
			continue
		}
		if want, err := taps.Shape(m.Config, name, len(padded)); err != nil || !slices.Equal(t.Shape, want) {
			return nil, fmt.Errorf("%s: %s has shape %v, and the checkpoint calls for %v", f.onnx, name, t.Shape, want)
		}
		t.Data = t.Data[:len(t.Data)/len(padded)*len(tokens)]
		t.Shape = append([]int{len(tokens)}, t.Shape[1:]...)
		results[name] = t
	}
	progress := newLayers(stderr, "reference", m, 1)
	truth, err := reference.Run(ctx, m, tokens, reference.Options{
		Precision: reference.Float64, Taps: names, Progress: func(int) { progress.next() },
	})
	progress.finish()
	if err != nil {
		return nil, err
	}
	if lastOnly {
		t := truth[taps.Logits]
		t.Data, t.Shape = t.Data[len(t.Data)-len(t.Data)/len(tokens):], []int{1, m.Config.VocabSize}
		truth[taps.Logits] = t
	}
	if err := c.judge(ctx, stderr, m, tokens, results, lastOnly); err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		row, err := compareTensor(name, results[name], truth[name])
		if err != nil {
			return nil, err
		}
		c.judged(&row)
		c.rows = append(c.rows, row)
	}
	return c, nil
}

// judge has the results judged. The last token's logits alone are judged among
// the reference's, and apart from the taps, from which those do not follow.
func (c *comparison) judge(ctx context.Context, stderr io.Writer, m *checkpoint.Model, tokens []int32, results map[string]tensor.Tensor, lastOnly bool) error {
	parts := []map[string]tensor.Tensor{results}
	if lastOnly {
		logits, err := filledIn(ctx, stderr, m, tokens, c.precision, results[taps.Logits])
		if err != nil {
			return err
		}
		others := maps.Clone(results)
		delete(others, taps.Logits)
		parts = []map[string]tensor.Tensor{{taps.Logits: logits}, others}
	}
	for _, part := range parts {
		if len(part) == 0 {
			continue
		}
		verdict, err := judged(ctx, stderr, "judging", m, tokens, conformance.Subject{Precision: c.precision, Taps: part},
			conformance.JudgeOptions{Catalogue: []faults.Fault{}})
		if err != nil {
			return err
		}
		c.findings = append(c.findings, verdict.Findings...)
	}
	return nil
}

// arithmetic is what the user says, or the graph.
func (f compareFlags) arithmetic(session *onnxruntime.Session) (reference.Precision, error) {
	name := f.precision
	if name == "" {
		properties, err := session.Metadata()
		if err != nil {
			return "", err
		}
		if name = properties["gptoss.precision"]; name == "" {
			name = string(reference.Float32)
		}
	}
	precision, err := reference.ParsePrecision(name)
	if err != nil || precision == reference.Float64 {
		return "", fmt.Errorf("--precision: %q is none of float32, bfloat16, float16", name)
	}
	return precision, nil
}

// judged enters the judge's findings on a tensor.
func (c *comparison) judged(row *comparedTensor) {
	row.verdict = conformance.Pass
	for _, finding := range c.findings {
		if finding.Tap != row.name {
			continue
		}
		row.ratio = max(row.ratio, finding.Ratio)
		row.verdict = conformance.Worse(row.verdict, finding.Verdict)
		if finding.Verdict == conformance.Fail {
			c.issues = append(c.issues, finding.String())
		}
	}
}

func compareTensor(name string, got, want tensor.Tensor) (comparedTensor, error) {
	row := comparedTensor{name: name}
	if taps.Integer(name) {
		a, err := got.Int32s()
		if err != nil {
			return row, fmt.Errorf("%s: %w", name, err)
		}
		b, err := want.Int32s()
		if err != nil {
			return row, fmt.Errorf("%s: %w", name, err)
		}
		for i := range b {
			if a[i] != b[i] {
				row.differing++
			}
		}
		return row, nil
	}
	a, err := got.Float64s()
	if err != nil {
		return row, fmt.Errorf("%s: %w", name, err)
	}
	b, err := want.Float64s()
	if err != nil {
		return row, fmt.Errorf("%s: %w", name, err)
	}
	var sum float64
	for i := range b {
		d := math.Abs(a[i] - b[i])
		if math.IsNaN(d) {
			d = math.Inf(1)
		}
		sum += d
		row.largest, row.top = max(row.largest, d), max(row.top, math.Abs(b[i]))
	}
	row.mean = sum / float64(len(b))
	return row, nil
}

// facts identify what was compared, and with what.
func (f compareFlags) facts(ctx context.Context, m *checkpoint.Model, session *onnxruntime.Session, tokens []int32, precision reference.Precision) ([][2]string, error) {
	version, err := onnxruntime.Version()
	if err != nil {
		return nil, err
	}
	digest, err := m.Digest(ctx)
	if err != nil {
		return nil, err
	}
	graph, err := fileDigest(ctx, f.onnx)
	if err != nil {
		return nil, err
	}
	level := f.optimization
	facts := [][2]string{
		{"gptoss", buildVersion()},
		{"Go", runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH},
		{"ONNX Runtime", version + ", graph optimization " + level},
		{"checkpoint", digest},
		{factGraph, graph},
	}
	if data, err := fileDigest(ctx, f.onnx+".data"); err == nil {
		facts = append(facts, [2]string{factWeights, data})
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	properties, err := session.Metadata()
	if err != nil {
		return nil, err
	}
	if made := properties["gptoss.checkpoint"]; made != "" && made != digest {
		facts = append(facts, [2]string{"made from", made + ", another checkpoint"})
	}
	padding := "no padding"
	if n := max(session.Length(), f.sequenceLength) - len(tokens); n > 0 {
		padding = fmt.Sprintf("%d of padding not compared", n)
	}
	return append(facts, [2]string{"tokens", fmt.Sprintf("%d, %s", len(tokens), padding)}, [2]string{"precision", string(precision)}), nil
}

// Facts that promote reads.
const (
	factGraph   = "graph"
	factWeights = "weights"
	verdictLine = "verdict: "
	issuesLine  = "[issues]"
)

// fileDigest returns a file's sha256.
func fileDigest(ctx context.Context, path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	buffer := make([]byte, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := file.Read(buffer)
		hash.Write(buffer[:n])
		if err == io.EOF {
			return "sha256:" + hex.EncodeToString(hash.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// buildVersion is the module's version, or the commit that the program was built from.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && (version == "" || version == "(devel)") {
			version = s.Value
		}
	}
	return version
}

func (c *comparison) markdown(path string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s beside its checkpoint\n\n    %s\n\n", filepath.Base(path), c.command)
	b.WriteString("| what | which |\n|---|---|\n")
	for _, fact := range c.facts {
		fmt.Fprintf(&b, "| %s | %s |\n", fact[0], fact[1])
	}
	b.WriteString("\nDifferences are from the float64 reference; the ratio is the error as a fraction of its bound.\n\n")
	b.WriteString("| tensor | max difference | mean difference | largest value | ratio | verdict |\n|---|---:|---:|---:|---:|---|\n")
	number := func(x float64) string { return strconv.FormatFloat(x, 'e', 2, 64) }
	for _, row := range c.rows {
		largest, mean, top := number(row.largest), number(row.mean), number(row.top)
		if taps.Integer(row.name) {
			largest, mean, top = fmt.Sprintf("%d differ", row.differing), "", ""
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %.3g | %s |\n", row.name, largest, mean, top, row.ratio, row.verdict)
	}
	if len(c.missing) > 0 {
		fmt.Fprintf(&b, "\nNot among the graph's outputs: %s.\n", strings.Join(c.missing, ", "))
	}
	word := conformance.Pass
	if c.failed() {
		word = conformance.Fail
	}
	fmt.Fprintf(&b, "\n%s%s\n\n%s\n", verdictLine, word, issuesLine)
	for _, issue := range c.issues {
		b.WriteString("- " + issue + "\n")
	}
	return b.String()
}
