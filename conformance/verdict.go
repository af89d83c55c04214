// Package conformance judges implementations of gpt-oss: stage by stage, with
// bounds derived from rounding analysis, and says what is wrong with those that
// fail.
package conformance

import (
	"fmt"
	"strings"
)

// Word is a verdict. Only Pass is a pass.
type Word string

// The verdicts, from best to worst.
const (
	Pass        Word = "pass"
	Partial     Word = "partial"     // what ran passed, but the input did not exercise something
	Skipped     Word = "skipped"     // asked for by the user
	Unsupported Word = "unsupported" // the subject declares that it lacks the ability
	Fail        Word = "fail"        // the numbers are wrong
	Error       Word = "error"       // the engine broke, or the question makes no sense
)

// words in order of severity; the worse of two verdicts is the later one.
var words = []Word{Pass, Partial, Skipped, Unsupported, Fail, Error}

// Worse returns the more severe of two verdicts.
func Worse(a, b Word) Word {
	for i := len(words) - 1; i >= 0; i-- {
		if words[i] == a || words[i] == b {
			return words[i]
		}
	}
	return Error
}

// Method says how a tap was judged.
type Method string

// The methods. A stage judged from its own tapped inputs, or with an injected
// golden input, is isolated: what went wrong upstream does not disturb it.
const (
	Isolated    Method = "isolated"     // the float64 stage on the subject's own tapped inputs, derived bound
	Injected    Method = "injected"     // the subject's stage on a golden input, derived bound
	Span        Method = "span"         // several stages between two taps, bound from perturbed runs
	FreeRunning Method = "free-running" // the whole model from the tokens, budget
	Routing     Method = "routing"      // the choice of experts, by margin
	Form        Method = "form"         // shape, dtype, NaN
)

// Finding is the outcome of one comparison of one tap.
type Finding struct {
	Tap     string   `json:"tap"` // registry name: block_0.attn_core
	Stage   string   `json:"stage"`
	Method  Method   `json:"method"`
	From    []string `json:"from,omitempty"` // the taps (or tokens) that the expected values were computed from
	Verdict Word     `json:"verdict"`
	// Ratio is the largest error ÷ bound over all elements: at most 1 passes.
	Ratio  float64 `json:"ratio"`
	Worst  *Worst  `json:"worst,omitempty"`
	Over   int     `json:"over"` // elements over their bound
	Of     int     `json:"of"`   // elements compared
	Reason string  `json:"reason,omitempty"`
}

// Worst is the element with the largest error ÷ bound.
type Worst struct {
	Index []int   `json:"index"`
	Got   float64 `json:"got"`
	Want  float64 `json:"want"`
	Bound float64 `json:"bound"`
}

// String is the line that a failing test prints.
func (f Finding) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s (%s): %s", f.Verdict, f.Tap, f.Method, f.ratioText())
	if f.Worst != nil {
		fmt.Fprintf(&b, "; worst at %v: got %.9g, want %.9g, bound %.3g; %d of %d over",
			f.Worst.Index, f.Worst.Got, f.Worst.Want, f.Worst.Bound, f.Over, f.Of)
	}
	if f.Reason != "" {
		fmt.Fprintf(&b, "; %s", f.Reason)
	}
	return b.String()
}

func (f Finding) ratioText() string {
	if f.Method == Form {
		return "malformed"
	}
	return fmt.Sprintf("error is %.3g of its bound", f.Ratio)
}
