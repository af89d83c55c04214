package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// StageGeneration is decoding with a KV cache, token by token. It is the one
// stage that an implementation may lack and still pass.
const StageGeneration = "generation"

// Stages lists the stages in the order of reports.
var Stages = []string{
	StageEmbedding, StageRMSNorm, StageRope, StageAttention,
	StageGating, StageExperts, StageLogits, StageGeneration,
}

// Report is everything that one run of the suite found. It is stored as it was
// measured: nothing in it is rounded or left out.
type Report struct {
	About   About       `json:"about"`
	Verdict Word        `json:"verdict"`
	Reasons []string    `json:"reasons,omitempty"` // why the verdict is not pass
	Cases   []Case      `json:"cases"`
	Runs    []RunRecord `json:"runs"`
}

// About identifies a run, so that a stranger can repeat it.
type About struct {
	Suite       string    `json:"suite"` // git describe
	Command     string    `json:"command"`
	Selection   string    `json:"selection,omitempty"` // -run, if only some tests were asked for
	Date        time.Time `json:"date"`
	Seconds     float64   `json:"seconds"`
	Go          string    `json:"go"`
	Platform    string    `json:"platform"`
	CPU         string    `json:"cpu,omitempty"`
	Cores       int       `json:"cores"`
	ONNXRuntime string    `json:"onnxruntime,omitempty"`
}

// Cell sums up one stage of one implementation.
type Cell struct {
	Verdict     Word
	Ratio       float64 // largest error ÷ bound
	Cases       int     // that ran: neither skipped nor unsupported
	Comparisons int
	Failed      int // cases that fail, or that are an error
}

// add takes one more case in. A stage is skipped or unsupported only if no case
// of it ran.
func (cell Cell) add(c Case) Cell {
	ran := c.Verdict != Skipped && c.Verdict != Unsupported
	switch {
	case !ran && cell.Cases > 0:
		return cell
	case !ran:
		cell.Verdict = c.Verdict
		return cell
	case cell.Cases == 0:
		cell.Verdict = c.Verdict
	}
	cell.Verdict = Worse(cell.Verdict, c.Verdict)
	cell.Cases++
	cell.Comparisons += len(c.Findings)
	if c.Verdict == Fail || c.Verdict == Error {
		cell.Failed++
	}
	for _, f := range c.Findings {
		if !(f.Ratio <= cell.Ratio) { // NaN is worse than any number
			cell.Ratio = f.Ratio
		}
	}
	return cell
}

// Row sums up one implementation.
type Row struct {
	Implementation string
	Cells          map[string]Cell // by stage
	Verdict        Word
	Reasons        []string
}

// Rows returns the table: one row for each implementation, in order of name.
func (r Report) Rows() []Row {
	rows := map[string]*Row{}
	for _, c := range r.Cases {
		row := rows[c.Implementation]
		if row == nil {
			row = &Row{Implementation: c.Implementation, Cells: map[string]Cell{}, Verdict: Pass}
			rows[c.Implementation] = row
		}
		cell := row.Cells[c.Stage].add(c)
		row.Cells[c.Stage] = cell
	}
	for _, run := range r.Runs {
		if row := rows[run.Implementation]; row != nil && (run.Verdict == Fail || run.Verdict == Error) {
			row.Verdict = Worse(row.Verdict, run.Verdict)
			row.Reasons = append(row.Reasons, fmt.Sprintf("%s of prompt %s in fixture %s: %s", run.Verdict, run.Prompt, run.Fixture, run.Reason))
		}
	}
	names := make([]string, 0, len(rows))
	for name := range rows {
		names = append(names, name)
	}
	slices.Sort(names)
	result := make([]Row, 0, len(names))
	for _, name := range names {
		row := rows[name]
		row.conclude(r.neverExercised(name))
		result = append(result, *row)
	}
	return result
}

// conclude derives a row's verdict from its cells. An ability that is missing
// makes it partial, except for generation, which is an extra.
func (row *Row) conclude(unexercised []string) {
	for _, stage := range Stages {
		cell, seen := row.Cells[stage]
		word, why := cell.Verdict, ""
		switch {
		case !seen && stage == StageGeneration:
			continue
		case !seen:
			word, why = Partial, "no case ran"
		case word == Unsupported && stage == StageGeneration:
			continue
		case word == Unsupported || word == Skipped:
			word, why = Partial, string(cell.Verdict)
		case word == Partial:
			why = "partial"
		case word == Fail || word == Error:
			why = fmt.Sprintf("%d of %d cases: %s", cell.Failed, cell.Cases, word)
		}
		row.Verdict = Worse(row.Verdict, word)
		if why != "" {
			row.Reasons = append(row.Reasons, stage+": "+why)
		}
	}
	if len(unexercised) > 0 {
		row.Verdict = Worse(row.Verdict, Partial)
		row.Reasons = append(row.Reasons, "not exercised by any input: "+strings.Join(unexercised, ", "))
	}
}

// neverExercised lists what no run of an implementation could show: the short
// prompts leave things out on purpose, and others make up for them.
func (r Report) neverExercised(implementation string) []string {
	var missing []string
	first := true
	for _, run := range r.Runs {
		if run.Implementation != implementation {
			continue
		}
		var here []string
		for _, what := range run.Unexercised {
			what, _, _ = strings.Cut(what, " (") // the numbers differ from run to run
			here = append(here, what)
		}
		if first {
			missing, first = here, false
			continue
		}
		missing = slices.DeleteFunc(missing, func(s string) bool { return !slices.Contains(here, s) })
	}
	return missing
}

// verdict is the worst of all rows. A report without a case is an error: an
// empty corpus proves nothing.
func (r Report) verdict() (Word, []string) {
	rows := r.Rows()
	if len(rows) == 0 {
		return Error, []string{"no case ran"}
	}
	word := Pass
	var reasons []string
	for _, row := range rows {
		word = Worse(word, row.Verdict)
		for _, why := range row.Reasons {
			reasons = append(reasons, row.Implementation+": "+why)
		}
	}
	if r.About.Selection != "" {
		word = Worse(word, Partial)
		reasons = append(reasons, "only the tests matching "+r.About.Selection+" ran")
	}
	return word, reasons
}

// Failures lists the cases that fail or are an error.
func (r Report) Failures() []Case {
	var failures []Case
	for _, c := range r.Cases {
		if c.Verdict == Fail || c.Verdict == Error {
			failures = append(failures, c)
		}
	}
	return failures
}

// Comparisons returns how many taps were compared, and how many elements.
func (r Report) Comparisons() (taps, elements int) {
	for _, c := range r.Cases {
		taps += len(c.Findings)
		for _, f := range c.Findings {
			elements += f.Of
		}
	}
	return taps, elements
}

// Names of the files of a report.
const (
	ReportJSON     = "report.json"
	ReportMarkdown = "report.md"
	ReportHTML     = "report.html"
)

// Write stores the report in a directory, as JSON, markdown and a page for the
// browser that needs nothing else. Each file appears complete or not at all.
func (r Report) Write(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	page, err := r.HTML()
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		ReportJSON: append(text, '\n'), ReportMarkdown: []byte(r.Markdown()), ReportHTML: page,
	} {
		if err := atomicfile.Write(ctx, filepath.Join(dir, name), content); err != nil {
			return err
		}
	}
	return nil
}

// ReadReport reads a report.json.
func ReadReport(path string) (Report, error) {
	var r Report
	text, err := os.ReadFile(path)
	if err != nil {
		return r, fmt.Errorf("%w: `make conformance` writes it", err)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("%s: is not a report of the suite: %v", path, err)
	}
	if severity(r.Verdict) < 0 {
		return r, fmt.Errorf("%s: is not a report of the suite: it has no verdict", path)
	}
	return r, nil
}

// Number is a float64 that may be NaN or infinite, which JSON cannot say: those
// are strings there.
type Number float64

// MarshalJSON writes NaN, +Inf and -Inf as strings.
func (n Number) MarshalJSON() ([]byte, error) {
	v := float64(n)
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return json.Marshal(strconv.FormatFloat(v, 'g', -1, 64))
	}
	return json.Marshal(v)
}

// UnmarshalJSON reads what MarshalJSON writes.
func (n *Number) UnmarshalJSON(text []byte) error {
	v, err := strconv.ParseFloat(strings.Trim(string(text), `"`), 64)
	*n = Number(v)
	return err
}

// The JSON of a finding and of its worst element has numbers that may be NaN or
// infinite. Embedding under another type keeps the
// other fields as they are; the outer field of the same name wins.
type plainFinding Finding

type findingJSON struct {
	plainFinding
	Ratio Number `json:"ratio"`
}

// MarshalJSON stores a ratio that is not finite as a string.
func (f Finding) MarshalJSON() ([]byte, error) {
	return json.Marshal(findingJSON{plainFinding(f), Number(f.Ratio)})
}

// UnmarshalJSON reads what MarshalJSON writes.
func (f *Finding) UnmarshalJSON(text []byte) error {
	var j findingJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*f = Finding(j.plainFinding)
	f.Ratio = float64(j.Ratio)
	return nil
}

type worstJSON struct {
	Index []int  `json:"index"`
	Got   Number `json:"got"`
	Want  Number `json:"want"`
	Bound Number `json:"bound"`
}

// MarshalJSON stores numbers that are not finite as strings.
func (w Worst) MarshalJSON() ([]byte, error) {
	return json.Marshal(worstJSON{w.Index, Number(w.Got), Number(w.Want), Number(w.Bound)})
}

// UnmarshalJSON reads what MarshalJSON writes.
func (w *Worst) UnmarshalJSON(text []byte) error {
	var j worstJSON
	err := json.Unmarshal(text, &j)
	*w = Worst{j.Index, float64(j.Got), float64(j.Want), float64(j.Bound)}
	return err
}
