package conformance

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// JudgeOptions say how hard [Judge] tries. The zero value is the default.
type JudgeOptions struct {
	Samples int // perturbed runs where no bound is derived; 0 means 6
	// Catalogue lists the faults that are tried when a subject fails, and
	// against which logits are weighed; nil means all. Empty tries none.
	Catalogue []faults.Fault
	// Budget, if it is not nil, replaces the spread of perturbed runs for the
	// free-running taps that it has: what independent implementations need on this
	// very checkpoint and prompt (see [FixtureBudget]).
	Budget Budget
	// Chunks says that the subject ran with a KV cache, and how many tokens it was
	// given at a time; the last number repeats ({16, 1}: a prompt of 16, then token
	// by token). None means that it ran all tokens together, without a cache.
	Chunks []int
	// Memory, if it is not nil, is shared by the judgements of several subjects on
	// the same prompts.
	Memory *Memory
}

// Verdict is what [Judge] found.
type Verdict struct {
	Word   Word   `json:"verdict"`
	Reason string `json:"reason"` // one line
	// FirstDivergence names the first tap that is wrong, in execution order;
	// empty if none is.
	FirstDivergence string             `json:"first_divergence,omitempty"`
	Findings        []Finding          `json:"findings"`
	Routing         []RoutingLayer     `json:"routing,omitempty"`
	Statistics      *Statistics        `json:"statistics,omitempty"` // of the logits; they decide nothing
	Unexercised     []string           `json:"unexercised,omitempty"`
	Indistinguish   []string           `json:"indistinguishable,omitempty"` // faults that this output can't exclude
	Ignored         []string           `json:"ignored,omitempty"`           // tensors under names that are no taps
	Diagnosis       *Diagnosis         `json:"diagnosis,omitempty"`
	Stages          map[string]float64 `json:"stages"` // worst ratio per stage
}

// densifyBelow is the size up to which a judged model's weights are decoded once
// and for all: the judge runs small models hundreds of times.
const densifyBelow = 512 << 20

// Judge compares a subject's output for some tokens with the checkpoint's own
// float64 truth, computed on the spot, and says whether, where and (if the
// catalogue knows) why it is wrong.
//
// It returns an error only if the question makes no sense: tokens outside the
// vocabulary, no known tensor. A malformed or wrong subject is a verdict.
func Judge(ctx context.Context, m *checkpoint.Model, tokens []int32, s Subject, o JudgeOptions) (*Verdict, error) {
	if err := reference.CheckTokens(m.Config, tokens); err != nil {
		return nil, err
	}
	subject, malformed, err := observe(m.Config, tokens, s)
	if err != nil {
		return nil, err
	}
	if o.Samples == 0 {
		o.Samples = defaultSamples
	}
	if o.Catalogue == nil {
		o.Catalogue = faults.All()
	}
	j := newJudging(ctx, o.Memory.densified(m), tokens, subject, o)
	v := &Verdict{Word: Pass, Ignored: subject.ignored}
	if len(malformed) > 0 {
		v.Findings = malformed
		v.conclude()
		return v, nil
	}
	if err := j.stages(v); err != nil {
		return nil, err
	}
	if err := j.freeRunning(v); err != nil {
		return nil, err
	}
	v.Unexercised = j.unexercised()
	if logits, ok := subject.reals[taps.Logits]; ok {
		v.Statistics = statisticsOf(ctx, logits, j.truth.real(taps.Logits), m.Config.VocabSize)
	}
	v.conclude()
	if err := j.weighHypotheses(v); err != nil {
		return nil, err
	}
	if v.Word == Fail && len(o.Catalogue) > 0 {
		if v.Diagnosis, err = j.diagnose(v); err != nil {
			return nil, err
		}
	}
	return v, ctx.Err()
}

// judging is one subject on trial.
type judging struct {
	ctx     context.Context
	options JudgeOptions
	model   reference.Model[float64] // the right model
	tokens  []int32
	subject *observed
	own     *evaluation[float64] // starts from the subject's own taps
	truth   *evaluation[float64] // starts from the tokens, with the subject's routing where it is whole
	free    *evaluation[float64] // starts from the tokens, with its own routing
	ratios  map[string]float64   // of the taps that were judged by a derived bound
	// What freeRunning found out, for the hypotheses that come after it.
	sampleLogits [][]float64       // of the perturbed runs
	spreads      map[string]spread // of free-running taps
	loose        bool              // rows can't be compared one by one
	greedy       *outcome          // the log-probabilities of generated tokens, if they are all there is
}

func newJudging(ctx context.Context, m *checkpoint.Model, tokens []int32, subject *observed, o JudgeOptions) *judging {
	j := &judging{ctx: ctx, options: o, model: reference.New(m, reference.Exact()), tokens: tokens, subject: subject}
	j.own = known(newEvaluation(ctx, &j.model, tokens), subject)
	j.free = o.Memory.free(ctx, &j.model, tokens)
	j.truth = j.free
	if routing, complete := subject.routing(m.Config); complete {
		j.truth = newEvaluation(ctx, &j.model, tokens)
		for layer, indices := range routing {
			j.truth.integers[taps.Block(layer, taps.ExpertIndices)] = indices
		}
	}
	return j
}

// stages judges every tap from the subject's own taps before it.
func (j *judging) stages(v *Verdict) error {
	spans := map[string][]float64{}
	j.ratios = map[string]float64{}
	for _, name := range j.subject.names {
		if err := j.ctx.Err(); err != nil {
			return err
		}
		if taps.Integer(name) {
			continue
		}
		switch {
		case j.direct(name):
			f := j.isolated(&j.model, name)
			j.ratios[name] = f.Ratio
			v.Findings = append(v.Findings, f)
		case j.fromSubject(name):
			spans[name] = j.own.compute(name)
		}
	}
	if err := j.routing(v); err != nil {
		return err
	}
	return j.judgeSpans(v, spans)
}

// direct reports whether a derived bound applies: the subject tapped everything
// that the stage reads, as finely as it computed it.
func (j *judging) direct(name string) bool {
	for _, read := range readsOf(j.model.Weights.Config, name) {
		_, isReal := j.subject.reals[read]
		_, isInteger := j.subject.integers[read]
		if !isReal && !isInteger {
			return false
		}
		if _, isCoarse := j.subject.coarse[read]; isCoarse {
			return false
		}
	}
	return true
}

// bounded reports whether a tap and all that it is computed from, back to the
// tokens, are judged one by one: stages by their derived bounds, choices of experts
// by their margin. The embedding may be missing, since it is only looked up.
func (j *judging) bounded(name string) bool {
	seen := map[string]bool{}
	var walk func(name string) bool
	walk = func(name string) bool {
		if seen[name] || name == taps.Embedding {
			return true
		}
		seen[name] = true
		_, isReal := j.subject.reals[name]
		_, isInteger := j.subject.integers[name]
		if !isReal && !isInteger {
			return false
		}
		reads := readsOf(j.model.Weights.Config, name)
		onlyEmbedded := slices.Equal(reads, []string{taps.Embedding})
		return (onlyEmbedded || j.direct(name)) && !slices.ContainsFunc(reads, func(read string) bool { return !walk(read) })
	}
	return walk(name)
}

// fromSubject reports whether a tap is computed from any of the subject's taps,
// and not from the tokens alone.
func (j *judging) fromSubject(name string) bool {
	from, _ := j.reach(name)
	return len(from) > 0
}

// reach follows a tap back to what it is computed from: the subject's taps (all
// of them, or "tokens" if the walk ends there), and the layers whose choice of
// experts is made on the way.
func (j *judging) reach(name string) (from []string, unresolved []int) {
	seen := map[string]bool{}
	var walk func(name string)
	walk = func(name string) {
		for _, read := range readsOf(j.model.Weights.Config, name) {
			_, isReal := j.subject.reals[read]
			_, isInteger := j.subject.integers[read]
			switch {
			case seen[read]:
			case isReal || isInteger:
				from = append(from, read)
			default:
				if layer, tap := taps.Split(read); tap == taps.ExpertIndices {
					unresolved = append(unresolved, layer)
				}
				seen[read] = true
				walk(read)
				continue
			}
			seen[read] = true
		}
	}
	walk(name)
	slices.Sort(unresolved)
	return from, unresolved
}

// isolated judges one tap by its stage's derived bound, under a model that may
// be a hypothesis about what the subject did.
func (j *judging) isolated(m *reference.Model[float64], name string) Finding {
	own := j.own
	if m != &j.model {
		own = known(newEvaluation(j.ctx, m, j.tokens), j.subject)
	}
	want := own.compute(name)
	f := j.finding(name, Isolated)
	f.From = readsOf(m.Weights.Config, name)
	if len(f.From) == 0 {
		f.From = []string{"tokens"}
	}
	f.against(j.shape(name), j.subject.reals[name], want, j.bound(own, name, want))
	return f
}

// bound is a stage's derived bound for the subject's arithmetic and storage.
func (j *judging) bound(own *evaluation[float64], name string, want []float64) []float64 {
	layer, tap := taps.Split(name)
	b := bounding{roundoff: j.subject.roundoff, truth: own, layer: layer, name: tap}
	bound := checks[tap].bound(b, want)
	if format, ok := j.subject.coarse[name]; ok {
		for i, w := range want {
			bound[i] += storing(format, math.Abs(w)+bound[i])
		}
	}
	return bound
}

func (j *judging) finding(name string, method Method) Finding {
	return Finding{Tap: name, Stage: StageOf(name), Method: method, Verdict: Pass}
}

func (j *judging) shape(name string) []int {
	shape, _ := taps.Shape(j.model.Weights.Config, name, len(j.tokens)) // subject.names holds registered taps only
	return shape
}

// against fills a finding in with a comparison.
func (f *Finding) against(shape []int, got, want, bound []float64) {
	f.Ratio, f.Worst, f.Over = compare(shape, got, want, bound)
	f.Of = len(got)
	if f.Ratio > 1 || f.Ratio != f.Ratio {
		f.Verdict = Fail
	}
}

// routing judges every layer's tapped experts.
func (j *judging) routing(v *Verdict) error {
	c := j.model.Weights.Config
	for layer := range c.Layers {
		chosen, ok := j.subject.integers[taps.Block(layer, taps.ExpertIndices)]
		if !ok {
			continue
		}
		gate := taps.Block(layer, taps.GateLogits)
		allowed, err := j.gateErrors(gate)
		if err != nil {
			return err
		}
		report, finding := judgeRouting(layer, c.Experts, c.ExpertsPerToken, chosen,
			j.own.compute(gate), allowed, j.free.real(gate))
		report.WeightDelta = j.weightDelta(layer, chosen)
		v.Routing = append(v.Routing, report)
		v.Findings = append(v.Findings, finding)
	}
	return nil
}

// weightDelta is the largest difference of a gate weight from the truth's, over
// the tokens that went to the truth's experts; 0 if no weights are tapped.
func (j *judging) weightDelta(layer int, chosen []int32) float64 {
	c := j.model.Weights.Config
	dense, ok := j.subject.reals[taps.Block(layer, taps.DenseGateWeights)]
	if weights, has := j.subject.reals[taps.Block(layer, taps.ExpertWeights)]; !ok && has {
		dense, ok = reference.DenseGateWeights(j.model.Layer(j.ctx, layer), chosen, weights), true
	}
	if !ok {
		return 0
	}
	largest, k := 0.0, c.ExpertsPerToken
	right, truth := j.free.indices(layer), j.free.real(taps.Block(layer, taps.DenseGateWeights))
	for i, w := range truth {
		if t := i / c.Experts; sameSet(chosen[t*k:][:k], right[t*k:][:k]) {
			largest = max(largest, math.Abs(w-dense[i]))
		}
	}
	return largest
}

// gateErrors says how far a layer's gate logits may be off in the subject's
// arithmetic when they are computed from its own taps: by the derived bound if
// the router's input is tapped, else by the spread of perturbed runs.
func (j *judging) gateErrors(gate string) ([]float64, error) {
	want := j.own.compute(gate)
	if j.direct(gate) {
		return j.bound(j.own, gate, want), nil
	}
	return j.gateSpread(gate, want)
}

// gateSpread is the spread of gate logits that perturbed runs from the subject's
// own taps come to, times the factor that it allows.
func (j *judging) gateSpread(gate string, want []float64) ([]float64, error) {
	spreads, err := spreadsOf(j.ctx, j.model.Weights, j.tokens, j.subject, j.subject, j.options.Samples, map[string][]float64{gate: want}, nil)
	if err != nil {
		return nil, err
	}
	experts := j.model.Weights.Config.Experts
	rows := allowed(spreads[gate].max)
	each := make([]float64, len(want))
	for i := range want {
		each[i] = rows[i/experts]
	}
	return each, nil
}

// judgeSpans judges taps that are several stages away from the taps before them.
func (j *judging) judgeSpans(v *Verdict, want map[string][]float64) error {
	if len(want) == 0 {
		return nil
	}
	spreads, err := j.spreadsFromSubject(want)
	if err != nil {
		return err
	}
	for _, name := range orderedTaps(j.model.Weights, want) {
		f := j.finding(name, Span)
		var unresolved []int
		f.From, unresolved = j.reach(name)
		f.withinSpread(j.shape(name), j.subject.reals[name], want[name], spreads[name], len(unresolved) > 0)
		if layer, _ := taps.Split(name); f.Verdict == Fail && slices.Equal(unresolved, []int{layer}) {
			if err := j.explainFlips(&f, name, spreads[name]); err != nil {
				return err
			}
		}
		v.Findings = append(v.Findings, f)
	}
	return nil
}

// spreadsFromSubject measures perturbed runs from the subject's own taps.
func (j *judging) spreadsFromSubject(want map[string][]float64) (map[string]spread, error) {
	spreads, err := spreadsOf(j.ctx, j.model.Weights, j.tokens, j.subject, j.subject, j.options.Samples, want, nil)
	for name, s := range spreads {
		spreads[name] = j.asStored(name, s, want[name])
	}
	return spreads, err
}

// asStored widens a tap's spread by what its storage adds.
func (j *judging) asStored(name string, s spread, want []float64) spread {
	if format, ok := j.subject.coarse[name]; ok {
		return s.coarser(format, want, len(j.tokens))
	}
	return s
}

// freeRunning judges the whole model from the tokens. If the subject tapped all
// its experts, they are forced into the truth and the perturbed runs too, so
// that a choice that rounding decides does not cover everything after it.
func (j *judging) freeRunning(v *Verdict) error {
	c := j.model.Weights.Config
	replayed := &observed{integers: map[string][]int32{}}
	routing, complete := j.subject.routing(c)
	want := map[string][]float64{}
	for layer := range c.Layers {
		if complete {
			replayed.integers[taps.Block(layer, taps.ExpertIndices)] = routing[layer]
		} else {
			gate := taps.Block(layer, taps.GateLogits) // measured for nearTies
			want[gate] = j.free.real(gate)
		}
	}
	for name := range j.subject.reals {
		want[name] = j.truth.real(name)
		if err := j.ctx.Err(); err != nil {
			return err
		}
	}
	perturbed, err := j.freeSpreads(replayed, want)
	if err != nil {
		return err
	}
	spreads := perturbed.spreads
	j.sampleLogits = perturbed.logits
	j.loose = !complete && j.nearTies(spreads)
	j.spreads = spreads
	for _, name := range j.subject.names {
		got, ok := j.subject.reals[name]
		if !ok {
			continue
		}
		f := j.finding(name, FreeRunning)
		f.From = []string{"tokens"}
		if budget, ok := j.options.Budget[name]; ok {
			f.withinBudget(j.shape(name), got, j.free.real(name), budget)
		} else {
			spreads[name] = j.asStored(name, spreads[name], want[name])
			f.withinSpread(j.shape(name), got, want[name], spreads[name], j.loose)
		}
		v.Findings = append(v.Findings, f)
	}
	return nil
}

// conclude draws the findings together.
func (v *Verdict) conclude() {
	v.Stages = map[string]float64{}
	order := map[string]int{}
	for i, f := range v.Findings {
		v.Stages[f.Stage] = max(v.Stages[f.Stage], f.Ratio)
		order[f.Tap] = i
		v.Word = Worse(v.Word, f.Verdict)
	}
	if v.Word == Pass && len(v.Unexercised) > 0 {
		v.Word = Partial
		v.Reason = fmt.Sprintf("what ran passed, but the input did not exercise: %s", v.Unexercised[0])
	}
	if v.Word != Fail {
		return
	}
	first := v.firstFailure()
	v.FirstDivergence = first.Tap
	v.Reason = first.String()
}

// firstFailure finds the earliest tap that fails. Where a stage was judged alone
// and failed, that says more than a free run that drifted off before.
func (v *Verdict) firstFailure() Finding {
	best := -1
	rank := func(f Finding) (int, int) {
		sharp := 0
		if f.Method == FreeRunning {
			sharp = 1
		}
		return sharp, tapOrder(f.Tap)
	}
	for i, f := range v.Findings {
		if f.Verdict != Fail {
			continue
		}
		if best < 0 {
			best = i
			continue
		}
		sharp, order := rank(f)
		bestSharp, bestOrder := rank(v.Findings[best])
		if sharp < bestSharp || sharp == bestSharp && order < bestOrder {
			best = i
		}
	}
	return v.Findings[best]
}

// tapOrder is the place of a tap in the forward pass.
func tapOrder(full string) int {
	layer, name := taps.Split(full)
	switch name {
	case taps.Embedding:
		return -1
	case taps.FinalNorm:
		return math.MaxInt - 1
	case taps.Logits:
		return math.MaxInt
	}
	return layer*len(taps.InBlock) + slices.Index(taps.InBlock, name)
}
