package conformance

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/gptoss-conformance/gptoss/reference"
)

// Case is what the suite found about one stage of one implementation on one
// prompt of one fixture.
type Case struct {
	Stage          string              `json:"stage"`
	Implementation string              `json:"implementation"`
	Precision      reference.Precision `json:"precision"`
	Fixture        string              `json:"fixture"`
	Prompt         string              `json:"prompt"`
	Verdict        Word                `json:"verdict"`
	Reason         string              `json:"reason,omitempty"`
	Findings       []Finding           `json:"findings,omitempty"` // every comparison
	Repeat         string              `json:"repeat,omitempty"`   // the command that runs only this
	Tensors        string              `json:"tensors,omitempty"`  // where a failing run's tensors are kept
}

// Worst returns the finding with the most severe verdict, and of those the one
// with the largest ratio. It is nil if nothing was compared.
func (c Case) Worst() *Finding {
	var worst *Finding
	for i := range c.Findings {
		f := &c.Findings[i]
		if worst == nil || severity(f.Verdict) > severity(worst.Verdict) ||
			f.Verdict == worst.Verdict && !(f.Ratio <= worst.Ratio) { // NaN is worse than any number
			worst = f
		}
	}
	return worst
}

func severity(w Word) int { return slices.Index(words, w) }

// RunRecord is what the suite found about a whole run: one implementation on one
// prompt of one fixture.
type RunRecord struct {
	Implementation  string   `json:"implementation"`
	Fixture         string   `json:"fixture"`
	Prompt          string   `json:"prompt"`
	Tokens          int      `json:"tokens"`
	Verdict         Word     `json:"verdict"`
	Reason          string   `json:"reason,omitempty"`
	FirstDivergence string   `json:"first_divergence,omitempty"`
	Unexercised     []string `json:"unexercised,omitempty"` // what this input cannot show
	// Errors are the largest absolute differences from the float64 goldens of
	// the whole run, by group of taps, for people who know figures of that kind.
	// They decide nothing.
	Errors map[string]Number `json:"errors,omitempty"`
}

// Groups of taps as jax2onnx's harness has them.
const (
	GroupLogits       = "logits"
	GroupHiddenStates = "hidden states"
	GroupBlockDebug   = "block debug"
)

// Recorder collects cases and runs. It is safe for concurrent use, and a nil
// Recorder records nothing.
type Recorder struct {
	mutex sync.Mutex
	start time.Time
	cases []Case
	runs  []RunRecord
}

// NewRecorder returns an empty recorder whose clock runs.
func NewRecorder() *Recorder { return &Recorder{start: time.Now()} }

// Case adds a case.
func (r *Recorder) Case(c Case) {
	if r == nil {
		return
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.cases = append(r.cases, c)
}

// Run adds a run.
func (r *Recorder) Run(run RunRecord) {
	if r == nil {
		return
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.runs = append(r.runs, run)
}

// Report returns everything recorded, in an order that does not depend on the
// order of execution.
func (r *Recorder) Report(about About) Report {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	about.Seconds = time.Since(r.start).Seconds()
	report := Report{About: about, Cases: slices.Clone(r.cases), Runs: slices.Clone(r.runs)}
	slices.SortStableFunc(report.Cases, func(a, b Case) int {
		return cmp.Or(
			cmp.Compare(stageOrder(a.Stage), stageOrder(b.Stage)), cmp.Compare(a.Stage, b.Stage),
			cmp.Compare(a.Implementation, b.Implementation), cmp.Compare(a.Fixture, b.Fixture), cmp.Compare(a.Prompt, b.Prompt))
	})
	slices.SortStableFunc(report.Runs, func(a, b RunRecord) int {
		return cmp.Or(cmp.Compare(a.Implementation, b.Implementation), cmp.Compare(a.Fixture, b.Fixture), cmp.Compare(a.Prompt, b.Prompt))
	})
	report.Verdict, report.Reasons = report.verdict()
	return report
}

// stageOrder sorts unknown stages last.
func stageOrder(stage string) int {
	if i := slices.Index(Stages, stage); i >= 0 {
		return i
	}
	return len(Stages)
}
