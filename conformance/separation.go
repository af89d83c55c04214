package conformance

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Separation is how far apart right and wrong implementations are at one stage:
// the number that says whether a bound is any good.
type Separation struct {
	Stage     string
	Precision reference.Precision
	Right     float64 // largest error ÷ bound of any right implementation
	RightName string
	Fault     float64 // smallest error ÷ bound of any fault, at its own tap
	FaultID   string
	Faults    int // how many faults hit the stage
}

// Factor is what the verdict can be off by before it is wrong.
func (s Separation) Factor() float64 { return s.Fault / s.Right }

// Ground is one input that faults are tried on.
type Ground struct {
	Weights *checkpoint.Model
	Tokens  []int32
}

// sharp reports whether a finding is of one stage alone.
func (f Finding) sharp() bool {
	return f.Method == Isolated || f.Method == Injected || f.Method == Routing
}

// Separate measures the separation per stage: right implementations as a report
// of the suite has them, and every fault of the catalogue (as the reference with
// that fault) on the ground given, each where it shows most.
func Separate(ctx context.Context, report Report, ground []Ground, p reference.Precision) ([]Separation, error) {
	var list []Separation
	for _, stage := range Stages {
		if stage == StageGeneration {
			continue // judged by whole runs, which have budgets and no stage of their own
		}
		list = append(list, rightSide(report, stage, p))
	}
	memory := new(Memory)
	for _, f := range faults.All() {
		for _, form := range append([]faults.Fault{f}, f.Variants...) {
			if form.Cached {
				continue
			}
			ratio, err := shows(ctx, form, ground, p, memory)
			if err != nil {
				return nil, fmt.Errorf("fault %s: %w", form.ID, err)
			}
			at := slices.IndexFunc(list, func(s Separation) bool { return s.Stage == checks[form.Tap].stage })
			list[at].Faults++
			if ratio < list[at].Fault {
				list[at].Fault, list[at].FaultID = ratio, form.ID
			}
		}
	}
	return list, nil
}

// rightSide finds the largest ratio of any implementation in the report.
func rightSide(report Report, stage string, p reference.Precision) Separation {
	s := Separation{Stage: stage, Precision: p, Fault: math.Inf(1)}
	for _, c := range report.Cases {
		if c.Stage != stage || c.Precision != p {
			continue
		}
		for _, f := range c.Findings {
			if f.sharp() && f.Ratio > s.Right {
				s.Right, s.RightName = f.Ratio, c.Implementation
			}
		}
	}
	return s
}

// shows is the largest ratio that a fault reaches at its own tap on any ground.
func shows(ctx context.Context, f faults.Fault, ground []Ground, p reference.Precision, memory *Memory) (float64, error) {
	largest := 0.0
	for _, g := range ground {
		results, err := faulty(ctx, f, g, p)
		if err != nil {
			return 0, err
		}
		v, err := Judge(ctx, g.Weights, g.Tokens, Subject{Precision: p, Taps: results}, JudgeOptions{Catalogue: []faults.Fault{}, Memory: memory})
		if err != nil {
			return 0, err
		}
		for _, finding := range v.Findings {
			if _, tap := taps.Split(finding.Tap); tap == f.Tap && (finding.sharp() || finding.Method == Form) {
				largest = max(largest, finding.Ratio)
			}
		}
	}
	return largest, nil
}

func faulty(ctx context.Context, f faults.Fault, g Ground, p reference.Precision) (map[string]tensor.Tensor, error) {
	if p == reference.Float32 {
		return reference.Observe(ctx, faults.Apply(f, reference.New(g.Weights, reference.Single())), g.Tokens)
	}
	return reference.Observe(ctx, faults.Apply(f, reference.New(g.Weights, reference.Short(p.Format()))), g.Tokens)
}

// SeparationTable is the table as markdown, the number that matters on top.
func SeparationTable(list []Separation) string {
	var b strings.Builder
	worst := slices.MinFunc(list, func(x, y Separation) int {
		switch {
		case x.Factor() < y.Factor():
			return -1
		case x.Factor() > y.Factor():
			return 1
		}
		return 0
	})
	fmt.Fprintf(&b, "**%.3g** is the smallest separation: in %s in %s, the mildest fault (`%s`) is that many times further from its bound than the worst right implementation (%s).\n\n",
		worst.Factor(), worst.Stage, worst.Precision, worst.FaultID, worst.RightName)
	b.WriteString("| stage | arithmetic | worst right: error ÷ bound | of | mildest fault: error ÷ bound | of | faults | separation |\n")
	b.WriteString("|---|---|---:|---|---:|---|---:|---:|\n")
	for _, s := range list {
		factor := "∞"
		if s.Right > 0 {
			factor = fmt.Sprintf("%.3g", s.Factor())
		}
		fmt.Fprintf(&b, "| %s | %s | %.3g | %s | %.3g | `%s` | %d | **%s** |\n",
			s.Stage, s.Precision, s.Right, orNone(s.RightName), s.Fault, s.FaultID, s.Faults, factor)
	}
	return b.String()
}

func orNone(name string) string {
	if name == "" {
		return "every one exact"
	}
	return name
}
