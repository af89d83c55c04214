package main

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// probeReport is what a probe found.
type probeReport struct {
	Command        string
	Implementation string
	Corrected      bool
	Precision      reference.Precision
	Packages       map[string]string
	Source         checkpoint.Source
	Digest         string
	Config         config.Config
	Tokens         []int32
	Injected       int // the block that was fed alone, or -1

	Verdict     *conformance.Verdict
	Differences []difference
	Flips       int      // token-layers whose set of experts differs
	Issues      []string // tensors that are missing or malformed
}

// difference is one tap's distance from the reference's float64.
type difference struct {
	tap       string
	max, mean float64
	bound     float64 // error ÷ bound from the subject's own taps; NaN where it was not judged
}

// probeStages groups the taps into the rows of the table, in execution order.
var probeStages = []struct {
	name string
	taps []string
}{
	{"embedding", []string{taps.Embedding}},
	{"norms", []string{taps.AttnNormed, taps.MLPNormed, taps.FinalNorm}},
	{"q", []string{taps.Q}},
	{"k", []string{taps.K}},
	{"v", []string{taps.V}},
	{"rotated", []string{taps.QRot, taps.KRot}},
	{"attention core", []string{taps.AttnCore}},
	{"residual stream", []string{taps.Input, taps.PostAttention, taps.Output}},
	{"gate logits", []string{taps.GateLogits}},
	{"gate weights", []string{taps.ExpertWeights, taps.DenseGateWeights}},
	{"experts, before the activation", []string{taps.Prelinear}},
	{"experts, activated", []string{taps.Activated}},
	{"experts, output", []string{taps.ExpertOutputs}},
	{"fused", []string{taps.Fused}},
	{"logits", []string{taps.Logits}},
}

// compare fills in the differences, the issues and the verdict. names are the
// taps that the implementation should have put out.
func (r *probeReport) compare(ctx context.Context, m *checkpoint.Model, names []string, got, want map[string]tensor.Tensor) error {
	verdict, err := conformance.Judge(ctx, m, r.Tokens, conformance.Subject{Precision: r.Precision, Taps: got}, conformance.JudgeOptions{})
	if err != nil {
		return err
	}
	r.Verdict = verdict
	ratios := map[string]float64{}
	for _, f := range verdict.Findings {
		if f.Method == conformance.Isolated {
			ratios[f.Tap] = f.Ratio
		}
	}
	for _, name := range names {
		subject, ok := got[name]
		switch {
		case !ok:
			r.Issues = append(r.Issues, name+": missing")
		case !slices.Equal(subject.Shape, want[name].Shape):
			r.Issues = append(r.Issues, fmt.Sprintf("%s: has the shape %v, not %v", name, subject.Shape, want[name].Shape))
		case !taps.Integer(name):
			d, err := r.difference(name, got, want)
			if err != nil {
				r.Issues = append(r.Issues, fmt.Sprintf("%s: %v", name, err))
				continue
			}
			d.bound = math.NaN()
			if ratio, ok := ratios[name]; ok {
				d.bound = ratio
			}
			r.Differences = append(r.Differences, d)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if !slices.Contains(names, name) {
			r.Issues = append(r.Issues, name+": is not the name of a tap")
		}
	}
	return nil
}

// difference compares one tap. What belongs to expert slots is aligned by
// expert; slots of experts that only one side chose are left out.
func (r *probeReport) difference(name string, got, want map[string]tensor.Tensor) (difference, error) {
	a, err := got[name].Float64s()
	if err != nil {
		return difference{}, err
	}
	b, err := want[name].Float64s()
	if err != nil {
		return difference{}, err
	}
	d := difference{tap: name}
	compared := 0
	add := func(a, b []float64) {
		for i := range a {
			delta := math.Abs(a[i] - b[i])
			if delta != delta { // the worst there is
				delta = math.Inf(1)
			}
			d.max = max(d.max, delta)
			d.mean += delta
			compared++
		}
	}
	layer, inner := taps.Split(name)
	switch inner {
	case taps.ExpertWeights, taps.Prelinear, taps.Activated, taps.ExpertOutputs:
		width := len(a) / (len(r.Tokens) * r.Config.ExpertsPerToken)
		pairs, flips, err := r.slots(layer, got, want)
		if err != nil {
			return d, err
		}
		if inner == taps.ExpertWeights {
			r.Flips += flips
		}
		for _, p := range pairs {
			add(a[p[0]*width:(p[0]+1)*width], b[p[1]*width:(p[1]+1)*width])
		}
	default:
		add(a, b)
	}
	d.mean /= float64(max(compared, 1))
	return d, nil
}

// slots pairs the flat slots of both sides that hold the same token's same
// expert, and counts the tokens whose sets differ.
func (r *probeReport) slots(layer int, got, want map[string]tensor.Tensor) (pairs [][2]int, flips int, err error) {
	name := taps.Block(layer, taps.ExpertIndices)
	indices, ok := got[name]
	if !ok || !slices.Equal(indices.Shape, want[name].Shape) {
		return nil, 0, fmt.Errorf("cannot be aligned without %s", name)
	}
	mine, err := indices.Int32s()
	if err != nil {
		return nil, 0, err
	}
	theirs, err := want[name].Int32s()
	if err != nil {
		return nil, 0, err
	}
	k := r.Config.ExpertsPerToken
	for token := range r.Tokens {
		matched := 0
		for i, expert := range mine[token*k : (token+1)*k] {
			if j := slices.Index(theirs[token*k:(token+1)*k], expert); j >= 0 {
				pairs = append(pairs, [2]int{token*k + i, token*k + j})
				matched++
			}
		}
		if matched < k {
			flips++
		}
	}
	return pairs, flips, nil
}

// markdown renders the report. The same probe gives the same text.
func (r *probeReport) markdown() string {
	var b strings.Builder
	name := r.Implementation
	if r.Corrected {
		name += ", corrected"
	}
	fmt.Fprintf(&b, "# Probe: %s in %s against the reference\n\n    %s\n\n", name, r.Precision, r.Command)
	fmt.Fprintf(&b, "- checkpoint: %s (%s), %s, %d of its blocks\n", r.Source.Path, r.Source.Layout, r.Digest, r.Config.Layers)
	var packages []string
	for _, p := range slices.Sorted(maps.Keys(r.Packages)) {
		packages = append(packages, p+" "+r.Packages[p])
	}
	fmt.Fprintf(&b, "- implementation: %s, %s\n- reference: this suite's, in float64\n", name, strings.Join(packages, ", "))
	fmt.Fprintf(&b, "- tokens: %d (window %d)\n", len(r.Tokens), r.Config.SlidingWindow)
	if r.Injected >= 0 {
		fmt.Fprintf(&b, "- block %d alone, fed with the reference's input in %s\n", r.Injected, r.Precision)
	}
	r.writeVerdict(&b)
	r.writeTable(&b)
	b.WriteString("\n[issues]\n")
	for _, issue := range r.Issues {
		fmt.Fprintf(&b, "%s\n", issue)
	}
	return b.String()
}

func (r *probeReport) writeVerdict(b *strings.Builder) {
	v := r.Verdict
	fmt.Fprintf(b, "- verdict: %s\n", v.Word)
	if v.Reason != "" {
		fmt.Fprintf(b, "- because: %s\n", v.Reason)
	}
	if d := v.Diagnosis; d != nil {
		fmt.Fprintf(b, "- diagnosis: %s\n", d.Name())
	}
	for _, d := range r.Differences {
		if d.tap == taps.Logits {
			fmt.Fprintf(b, "- logits: max |Δ| %.3g, mean |Δ| %.3g\n", d.max, d.mean)
		}
	}
	fmt.Fprintf(b, "- routing: %d tokens and layers with other experts\n", r.Flips)
}

// writeTable has one row per stage: the tap with the largest difference.
func (r *probeReport) writeTable(b *strings.Builder) {
	b.WriteString("\n| stage | largest difference at | max \\|Δ\\| | mean \\|Δ\\| | worst error ÷ bound |\n|---|---|---|---|---|\n")
	for _, stage := range probeStages {
		var worst *difference
		bound := math.NaN()
		for i, d := range r.Differences {
			_, inner := taps.Split(d.tap)
			if !slices.Contains(stage.taps, inner) {
				continue
			}
			if worst == nil || d.max > worst.max {
				worst = &r.Differences[i]
			}
			if d.bound == d.bound && (bound != bound || d.bound > bound) {
				bound = d.bound
			}
		}
		if worst == nil {
			continue
		}
		ratio := ""
		if bound == bound {
			ratio = fmt.Sprintf("%.3g", bound)
		}
		fmt.Fprintf(b, "| %s | %s | %.3g | %.3g | %s |\n", stage.name, worst.tap, worst.max, worst.mean, ratio)
	}
}
