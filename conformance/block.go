package conformance

import (
	"context"
	"fmt"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// JudgeStages judges some taps of a subject by the derived bounds of their
// stages alone, from the subject's own taps: what [Judge] does first, without
// any whole run. A deep model at full width is judged block by block this way, in
// the memory of one block.
//
// Every tap is judged whose stage's inputs are there as well; the chosen experts
// are judged by the gate logits' margins. None at all is an error.
func JudgeStages(ctx context.Context, m *checkpoint.Model, tokens []int32, s Subject) ([]Finding, error) {
	subject, malformed, err := observe(m.Config, tokens, s)
	if err != nil || len(malformed) > 0 {
		return malformed, err
	}
	j := &judging{ctx: ctx, model: reference.New(m, reference.Exact()), tokens: tokens, subject: subject}
	j.own = known(newEvaluation(ctx, &j.model, tokens), subject)
	var findings []Finding
	for _, name := range subject.names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if !j.direct(name) {
			continue
		}
		if !taps.Integer(name) {
			findings = append(findings, j.isolated(&j.model, name))
			continue
		}
		if layer, _ := taps.Split(name); j.direct(taps.Block(layer, taps.GateLogits)) {
			findings = append(findings, j.choice(layer))
		}
	}
	if len(findings) == 0 {
		return nil, fmt.Errorf("no tap of %d comes with what its stage reads: nothing would be judged", len(subject.names))
	}
	return findings, nil
}

// choice judges a layer's experts by the margins of its own gate logits.
func (j *judging) choice(layer int) Finding {
	c := j.model.Weights.Config
	gate := taps.Block(layer, taps.GateLogits)
	want := j.own.compute(gate)
	_, finding := judgeRouting(layer, c.Experts, c.ExpertsPerToken,
		j.subject.integers[taps.Block(layer, taps.ExpertIndices)], want, j.bound(j.own, gate, want), want)
	return finding
}
