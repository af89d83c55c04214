package conformance

import (
	"fmt"
	"math"
	"slices"
	"sync"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Golden compares with a stored tensor that OpenAI's torch model made in
// float64. It decides for float64 implementations.
const Golden Method = "golden"

// goldenTolerance is how far two float64 evaluations of the model may be apart,
// as a share of the tap's largest value (or of 1, if that is larger). A
// thousand roundings of 2⁻⁵³ in a row come to 1e-13; a wrong constant or a
// float32 somewhere, to 1e-8 and more.
const goldenTolerance = 1e-12

// truth is what OpenAI's torch model makes of a prompt in float64. Of long runs
// only some tokens' rows are stored.
type truth struct {
	config config.Config
	tokens int
	run    golden.Run
	taps   map[string]tensor.Tensor
}

// goldenRuns reads golden files once, however many prompts they serve.
type goldenRuns struct {
	mutex  sync.Mutex
	loaded map[string]map[string]tensor.Tensor // by fixture and file
}

// truthOf finds the golden of a prompt: its own, or, since the model is causal,
// that of a longer prompt which begins with it. A golden that is not there is an
// error.
func (g *goldenRuns) truthOf(c config.Config, fixture string, prompt fixtures.Prompt) (*truth, error) {
	runs, err := golden.Runs(fixture)
	if err != nil {
		return nil, err
	}
	n := len(prompt.Tokens)
	best := -1
	for i, r := range runs {
		covers := len(r.Tokens) >= n && slices.Equal(r.Tokens[:n], prompt.Tokens)
		if r.Name() != "torch" || r.Precision != string(reference.Float64) || !covers {
			continue
		}
		if best < 0 || r.Prompt == prompt.Name {
			best = i
		}
	}
	if best < 0 {
		return nil, fmt.Errorf("golden/model/%s has no run of torch in float64 that begins with the prompt %q: run `make golden`", fixture, prompt.Name)
	}
	tensors, err := g.load(fixture, runs[best])
	if err != nil {
		return nil, err
	}
	return &truth{c, n, runs[best], tensors}, nil
}

func (g *goldenRuns) load(fixture string, r golden.Run) (map[string]tensor.Tensor, error) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	key := fixture + "/" + r.File
	if tensors, ok := g.loaded[key]; ok {
		return tensors, nil
	}
	tensors, err := r.Load()
	if err != nil {
		return nil, err
	}
	if g.loaded == nil {
		g.loaded = map[string]map[string]tensor.Tensor{}
	}
	g.loaded[key] = tensors
	return tensors, nil
}

// rows lists the tokens of this prompt whose rows a golden tap holds; row i of
// the tap belongs to token rows[i].
func (t *truth) rows(stored tensor.Tensor) []int {
	rows := t.run.Rows(stored)
	n, _ := slices.BinarySearch(rows, t.tokens)
	return rows[:n]
}

// pair is a subject's tap beside its golden, on the rows that both have.
type pair struct {
	name      string
	shape     []int // of both, rows included
	tokens    []int // the token that each row belongs to
	got, want []float64
}

// pairs lists the taps that the golden and the subject have, in order of
// execution. A malformed tap is left out: the judge has said what is wrong.
func (t *truth) pairs(results map[string]tensor.Tensor) ([]pair, error) {
	var pairs []pair
	for _, name := range taps.All(t.config) {
		stored, ok := t.taps[name]
		if !ok {
			continue
		}
		result, ok := results[name]
		if !ok {
			continue
		}
		shape, err := taps.Shape(t.config, name, t.tokens)
		if err != nil || !slices.Equal(shape, result.Shape) {
			continue
		}
		want, err := numbers(stored)
		if err != nil {
			return nil, fmt.Errorf("golden %s: %w", name, err)
		}
		got, err := numbers(result)
		if err != nil {
			continue
		}
		p := pair{name: name, tokens: t.rows(stored)}
		width := result.Elements() / t.tokens
		for i, token := range p.tokens {
			p.got = append(p.got, got[token*width:][:width]...)
			p.want = append(p.want, want[i*width:][:width]...)
		}
		p.shape = append([]int{len(p.tokens)}, shape[1:]...)
		if len(p.got) > 0 {
			pairs = append(pairs, p)
		}
	}
	return pairs, nil
}

// numbers widens reals and integers alike.
func numbers(t tensor.Tensor) ([]float64, error) {
	if t.DType.Float() {
		return t.Float64s()
	}
	integers, err := t.Int32s()
	if err != nil {
		return nil, err
	}
	wide := make([]float64, len(integers))
	for i, v := range integers {
		wide[i] = float64(v)
	}
	return wide, nil
}

// findings compares a float64 subject with the golden: max |Δ| ≤ 1e-12·max(1,
// max |tap|) on every tap; experts must be the same. Other precisions are
// judged by the judge's own bounds, and not here.
func (t *truth) findings(p reference.Precision, results map[string]tensor.Tensor) ([]Finding, error) {
	if p != reference.Float64 {
		return nil, nil
	}
	pairs, err := t.pairs(results)
	if err != nil {
		return nil, err
	}
	findings := make([]Finding, 0, len(pairs))
	for _, pair := range pairs {
		f := Finding{Tap: pair.name, Stage: StageOf(pair.name), Method: Golden, From: []string{t.run.File}, Verdict: Pass}
		f.against(pair.shape, pair.got, pair.want, goldenBounds(pair.name, pair.want))
		if f.Worst != nil {
			f.Worst.Index[0] = pair.tokens[f.Worst.Index[0]]
		}
		findings = append(findings, f)
	}
	return findings, nil
}

func goldenBounds(name string, want []float64) []float64 {
	bound := goldenTolerance
	if taps.Integer(name) {
		bound = 0
	} else {
		largest := 1.0
		for _, w := range want {
			largest = max(largest, math.Abs(w))
		}
		bound *= largest
	}
	return slices.Repeat([]float64{bound}, len(want))
}

// errors are a subject's largest absolute differences from the golden, for the
// groups of taps that both have. Where a token's experts differ, so do the slots
// of its per-expert taps: those are left out.
func (t *truth) errors(results map[string]tensor.Tensor) (map[string]Number, error) {
	pairs, err := t.pairs(results)
	if err != nil {
		return nil, err
	}
	largest := map[string]Number{}
	rerouted := map[[2]int]bool{} // layer, token
	for _, p := range pairs {
		layer, name := taps.Split(p.name)
		width := len(p.got) / len(p.tokens)
		worst := 0.0
		for i, token := range p.tokens {
			got, want := p.got[i*width:][:width], p.want[i*width:][:width]
			if name == taps.ExpertIndices {
				rerouted[[2]int{layer, token}] = !slices.Equal(got, want)
				continue
			}
			if perSlot(name) && rerouted[[2]int{layer, token}] {
				continue
			}
			for j, g := range got {
				worst = math.Max(worst, math.Abs(g-want[j]))
			}
		}
		group := GroupBlockDebug
		switch {
		case name == taps.Logits:
			group = GroupLogits
		case layer < 0 || slices.Contains(taps.HiddenStates, name):
			group = GroupHiddenStates
		}
		largest[group] = Number(math.Max(float64(largest[group]), worst))
	}
	return largest, nil
}

// perSlot reports whether a tap's second axis is the chosen experts.
func perSlot(name string) bool {
	switch name {
	case taps.ExpertWeights, taps.Prelinear, taps.Activated, taps.ExpertOutputs:
		return true
	}
	return false
}
