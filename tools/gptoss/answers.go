package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/fixtures/vocabulary"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// answersCommand asks a trained fixture its questions, under the right
// arithmetic and under every fault of the catalogue.
func answersCommand() *cobra.Command {
	var o answersOptions
	command := &cobra.Command{
		Use:   "answers --fixture NAME",
		Short: "Ask a trained fixture its questions, right and under every fault",
		Long: `Ask a trained fixture its questions, under the right arithmetic and under every
fault of the catalogue, and write a table: what a
single question is answered (canary), or how many of several are answered right
(capitals). The answers are greedy, decoded with a KV cache.`,
		Example: `  gptoss answers --fixture canary --output canary.md
  gptoss answers --fixture canary --insert fixtures/README.md
  gptoss answers --fixture capitals --precision float32 --every 8`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return answers(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	flags := command.Flags()
	flags.StringVar(&o.fixture, "fixture", "", "capitals or canary")
	flags.StringVar(&o.output, "output", "", "markdown file to write; default: stdout")
	flags.StringVar(&o.insert, "insert", "", "markdown file whose table to replace, between <!-- answers: NAME --> and <!-- end -->")
	flags.IntVar(&o.every, "every", 1, "ask every n-th question only")
	flags.StringSliceVar(&o.precisions, "precision", []string{"float32", "bfloat16"}, "arithmetic: float32, bfloat16 or both")
	if err := command.MarkFlagRequired("fixture"); err != nil {
		panic(err) // the flag was defined above
	}
	return command
}

type answersOptions struct {
	fixture, output, insert string
	every                   int
	precisions              []string
}

// asked is a question as row numbers; see package vocabulary.
type asked struct{ prompt, answer []int32 }

// outcome is what a model says to all questions.
type outcome struct {
	right  int     // questions answered as they should be
	said   string  // the answer to the first
	margin float64 // least distance of a chosen token's logit to the runner-up's
	err    error   // the model broke: NaN
}

func answers(ctx context.Context, o answersOptions, stdout io.Writer) error {
	if o.every < 1 {
		return fmt.Errorf("--every: %d is less than 1", o.every)
	}
	precisions, err := answersPrecisions(o.precisions)
	if err != nil {
		return err
	}
	if o.output != "" && o.insert != "" {
		return errors.New("--output and --insert exclude each other")
	}
	var around [2]string
	if o.insert != "" {
		text, err := os.ReadFile(o.insert)
		if err != nil {
			return fmt.Errorf("--insert: %w", err)
		}
		if around, err = splitAround(string(text), o.fixture); err != nil {
			return fmt.Errorf("--insert: %s: %w", o.insert, err)
		}
	}
	list, err := fixtures.Questions(o.fixture)
	if err != nil {
		return err
	}
	var questions []asked
	for i := 0; i < len(list); i += o.every {
		prompt, answer, err := list[i].Tokens()
		if err != nil {
			return err
		}
		questions = append(questions, asked{prompt, answer})
	}
	trained, err := trainedFaults(o.fixture)
	if err != nil {
		return err
	}
	cache, err := library.CacheDir()
	if err != nil {
		return err
	}
	dir, err := fixtures.Expanded(ctx, fixtures.Dir(o.fixture), cache)
	if err != nil {
		return err
	}
	weights, err := checkpoint.Open(dir)
	if err != nil {
		return err
	}
	defer weights.Close()
	rows, err := vocabulary.Used(o.fixture, weights.Config.VocabSize)
	if err != nil {
		return err
	}
	small, err := rows.Model(weights)
	if err != nil {
		return err
	}
	for i, q := range questions {
		questions[i] = asked{rows.Of(q.prompt), rows.Of(q.answer)}
	}

	catalogue := append([]faults.Fault{{ID: "none", Explanation: "the right arithmetic"}}, faults.All()...)
	results := make([][]outcome, len(catalogue))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, fault := range catalogue {
		group.Go(func() error {
			for _, precision := range precisions {
				results[i] = append(results[i], askIn(groupCtx, precision, fault, small, rows, questions))
			}
			return groupCtx.Err()
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	text := answersTable(catalogue, precisions, results, trained, len(questions))
	switch {
	case o.insert != "":
		return atomicfile.Write(ctx, o.insert, []byte(around[0]+"\n"+text+around[1]))
	case o.output != "":
		return atomicfile.Write(ctx, o.output, []byte(text))
	}
	_, err = io.WriteString(stdout, text)
	return err
}

// answersPrecisions reads --precision.
func answersPrecisions(names []string) ([]reference.Precision, error) {
	var list []reference.Precision
	for _, name := range names {
		precision, err := reference.ParsePrecision(name)
		if err != nil {
			return nil, fmt.Errorf("--precision: %w", err)
		}
		if precision != reference.Float32 && precision != reference.BFloat16 || slices.Contains(list, precision) {
			return nil, fmt.Errorf("--precision: %q: give float32, bfloat16 or both", name)
		}
		list = append(list, precision)
	}
	if len(list) == 0 {
		return nil, errors.New("--precision is empty: give float32, bfloat16 or both")
	}
	return list, nil
}

// splitAround returns what stands before and after a fixture's table, with the
// marks that enclose it.
func splitAround(text, fixture string) (around [2]string, err error) {
	mark, end := fmt.Sprintf("<!-- answers: %s -->\n", fixture), "<!-- end -->"
	before, rest, found := strings.Cut(text, mark)
	_, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		return around, fmt.Errorf("no %q with a %q behind it", strings.TrimSpace(mark), end)
	}
	return [2]string{before + mark, "\n" + end + after}, nil
}

// trainedFaults returns the faults that the fixture was trained on, which its
// file says.
func trainedFaults(fixture string) ([]string, error) {
	path := filepath.Join(fixtures.Dir(fixture), fixtures.WeightsFile)
	f, err := tensor.OpenSafetensors(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var ids []string
	if text := f.Metadata()["trained"]; text != "" {
		if err := json.Unmarshal([]byte(text), &ids); err != nil {
			return nil, fmt.Errorf("%s: metadata \"trained\": %w", path, err)
		}
	}
	return ids, nil
}

// askIn asks a model with a fault, in float32 or else with the rounding of another
// precision.
func askIn(ctx context.Context, p reference.Precision, fault faults.Fault, m *checkpoint.Model, rows vocabulary.Rows, questions []asked) outcome {
	if p == reference.Float32 {
		return ask(ctx, faults.Apply(fault, reference.New(m, reference.Single())), rows, questions)
	}
	return ask(ctx, faults.Apply(fault, reference.New(m, reference.Short(p.Format()))), rows, questions)
}

// ask puts every question to a model. Only the first is answered to the end:
// of the others it counts whether they are right.
func ask[F kernel.Float](ctx context.Context, model reference.Model[F], rows vocabulary.Rows, questions []asked) outcome {
	result := outcome{margin: math.Inf(1)}
	for i, q := range questions {
		var expected []int32
		if i > 0 {
			expected = q.answer
		}
		said, margin, err := greedy(ctx, model, q.prompt, expected, rows.Of([]int32{tokenizer.Return})[0])
		if err != nil {
			result.err = err
			continue
		}
		result.margin = min(result.margin, margin)
		if slices.Equal(said, q.answer) {
			result.right++
		}
		if i == 0 {
			result.said = rows.Text(said)
		}
	}
	return result
}

// answerLimit is more than any answer of ours has.
const answerLimit = 24

// greedy decodes until the model returns, or has said more than it ever should,
// or something else than expected (nil: anything may be).
func greedy[F kernel.Float](ctx context.Context, model reference.Model[F], prompt, expected []int32, end int32) (said []int32, margin float64, err error) {
	d := newReferenceDecoderOf(model)
	margin = math.Inf(1)
	next := prompt
	for len(said) < answerLimit {
		logits, err := d.next(ctx, next)
		if err != nil {
			return said, margin, err
		}
		id, err := newSampler(0, 1, 0).pick(logits)
		if err != nil {
			return said, margin, err
		}
		margin = min(margin, lead(logits, id))
		said = append(said, id)
		if id == end || expected != nil && !slices.Equal(said, expected[:min(len(said), len(expected))]) {
			break
		}
		next = []int32{id}
	}
	return said, margin, nil
}

// lead returns how far the logit of id is above every other.
func lead(logits []float32, id int32) float64 {
	second := math.Inf(-1)
	for i, v := range logits {
		if i != int(id) {
			second = max(second, float64(v))
		}
	}
	return float64(logits[id]) - second
}

// answersTable writes what came out as markdown.
func answersTable(catalogue []faults.Fault, precisions []reference.Precision, results [][]outcome, trained []string, questions int) string {
	var b bytes.Buffer
	if questions == 1 {
		canaryTable(&b, catalogue, precisions, results, trained)
	} else {
		accuracyTable(&b, catalogue, precisions, results, trained, questions)
	}
	return b.String()
}

// verdicts on one answer of the canary.
const (
	verdictPass   = "pass"   // it said so
	verdictNamed  = "named"  // it said fail, and which fault
	verdictFail   = "fail"   // it said fail, and another fault or none
	verdictBroken = "broken" // neither: nobody would take it for a pass
)

func (r outcome) verdict(id string) string {
	said := strings.TrimSuffix(r.said, "<|return|>")
	switch {
	case r.err != nil:
		return verdictBroken
	case said == " pass":
		return verdictPass
	case strings.HasSuffix(said, " fail: "+id):
		return verdictNamed
	case strings.Contains(said, " fail"):
		return verdictFail
	}
	return verdictBroken
}

func canaryTable(b *bytes.Buffer, catalogue []faults.Fault, precisions []reference.Precision, results [][]outcome, trained []string) {
	counts := map[string]map[string]int{}
	var rows bytes.Buffer
	for i, fault := range catalogue {
		kind := "no"
		switch {
		case i == 0:
			kind = "right"
		case slices.Contains(trained, fault.ID):
			kind = "yes"
		}
		fmt.Fprintf(&rows, "| `%s` | %s |", fault.ID, kind)
		for precision, r := range results[i] {
			verdict := r.verdict(fault.ID)
			group := fmt.Sprintf("%s %d", kind, precision)
			if counts[group] == nil {
				counts[group] = map[string]int{}
			}
			counts[group][verdict]++
			counts[group]["all"]++
			said := strings.TrimSpace(strings.ReplaceAll(strings.TrimSuffix(r.said, "<|return|>"), "|", "\\|"))
			if r.err != nil {
				said = "not a number"
			}
			if verdict == verdictNamed {
				said = "names it"
			} else if len(said) > 40 {
				said = "nonsense"
				if verdict == verdictFail {
					said = "fail, in many words"
				}
			}
			fmt.Fprintf(&rows, " %s | %s | %.2f |", verdict, oneLine(said), r.margin)
		}
		rows.WriteByte('\n')
	}
	fmt.Fprintln(b, "| faults | precision | caught | of them named | all |\n|---|---|---|---|---|")
	for _, kind := range []struct{ key, name string }{{"yes", "trained on"}, {"no", "never seen"}} {
		for precision, name := range precisions {
			c := counts[fmt.Sprintf("%s %d", kind.key, precision)]
			fmt.Fprintf(b, "| %s | %s | %d | %d | %d |\n", kind.name, name, c["all"]-c[verdictPass], c[verdictNamed], c["all"])
		}
	}
	fmt.Fprintf(b, "\n| fault | trained on |")
	for _, name := range precisions {
		fmt.Fprintf(b, " %s | says | margin |", name)
	}
	fmt.Fprintf(b, "\n|---|---|%s\n", strings.Repeat("---|---|---|", len(precisions)))
	b.Write(rows.Bytes())
}

func accuracyTable(b *bytes.Buffer, catalogue []faults.Fault, precisions []reference.Precision, results [][]outcome, trained []string, questions int) {
	fmt.Fprintf(b, "%d questions.\n\n| fault | trained on |", questions)
	for _, name := range precisions {
		fmt.Fprintf(b, " %s: right answers |", name)
	}
	fmt.Fprintf(b, "\n|---|---|%s\n", strings.Repeat("---|", len(precisions)))
	for i, fault := range catalogue {
		kind := "no"
		switch {
		case i == 0:
			kind = "right"
		case slices.Contains(trained, fault.ID):
			kind = "yes"
		}
		fmt.Fprintf(b, "| `%s` | %s |", fault.ID, kind)
		for _, r := range results[i] {
			fmt.Fprintf(b, " %d |", r.right)
		}
		fmt.Fprintln(b)
	}
}
