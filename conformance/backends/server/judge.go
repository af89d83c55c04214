package server

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// Reply is what a server said to a prompt, and the verdict on it.
type Reply struct {
	Prompt     fixtures.Prompt
	Completion Completion
	Verdict    *conformance.Verdict
}

// Ask puts all prompts to a server, for up to n tokens each. Nothing is judged
// before the last answer is there, so that a server that breaks is found out soon.
func Ask(ctx context.Context, c *Client, prompts []fixtures.Prompt, n int) ([]Reply, error) {
	replies := make([]Reply, 0, len(prompts))
	for _, p := range prompts {
		completion, err := c.Complete(ctx, p.Tokens, n)
		if err != nil {
			return nil, fmt.Errorf("prompt %q: %w", p.Name, err)
		}
		replies = append(replies, Reply{Prompt: p, Completion: completion})
	}
	return replies, nil
}

// Judge judges the replies, fills in their verdicts, and returns one over all of
// them. It fails if any of them fails. Something is unexercised if no prompt
// exercised it. The diagnosis is what explains every prompt that was diagnosed.
func Judge(ctx context.Context, m *checkpoint.Model, p reference.Precision, replies []Reply, o conformance.JudgeOptions) (*conformance.Verdict, error) {
	if o.Memory == nil {
		o.Memory = new(conformance.Memory)
	}
	for i := range replies {
		quick := o
		quick.Catalogue = []faults.Fault{} // a diagnosis takes a hundred times as long
		if err := replies[i].judge(ctx, m, p, quick); err != nil {
			return nil, err
		}
	}
	v := merged(replies)
	if v.Word != conformance.Fail || o.Catalogue != nil && len(o.Catalogue) == 0 {
		return v, nil
	}
	var err error
	v.Diagnosis, err = diagnose(ctx, m, p, replies, o)
	return v, err
}

func (r *Reply) judge(ctx context.Context, m *checkpoint.Model, p reference.Precision, o conformance.JudgeOptions) error {
	// A server decodes with a KV cache: the prompt at once, then token by token.
	o.Chunks = []int{len(r.Prompt.Tokens), 1}
	v, err := conformance.JudgeGreedy(ctx, m, r.Prompt.Tokens, greedy(r.Completion, p), o)
	if err != nil {
		return fmt.Errorf("prompt %q: %w", r.Prompt.Name, err)
	}
	r.Verdict = v
	return nil
}

// merged is one verdict over all replies. Its findings say which prompt they are
// from.
func merged(replies []Reply) *conformance.Verdict {
	v := &conformance.Verdict{Word: conformance.Pass, Stages: map[string]float64{}}
	for i, r := range replies {
		for _, f := range r.Verdict.Findings {
			f.Reason = join(fmt.Sprintf("prompt %q", r.Prompt.Name), f.Reason)
			v.Findings = append(v.Findings, f)
			v.Stages[f.Stage] = max(v.Stages[f.Stage], f.Ratio)
			if f.Verdict == conformance.Fail && v.Word != conformance.Fail {
				v.Word, v.FirstDivergence, v.Reason = conformance.Fail, f.Tap, f.String()
			}
		}
		if i == 0 {
			v.Unexercised = slices.Clone(r.Verdict.Unexercised)
			continue
		}
		v.Unexercised = slices.DeleteFunc(v.Unexercised, func(what string) bool {
			return !slices.ContainsFunc(r.Verdict.Unexercised, func(other string) bool { return sameKind(what, other) })
		})
	}
	if v.Word == conformance.Pass && len(v.Unexercised) > 0 {
		v.Word = conformance.Partial
		v.Reason = "what ran passed, but no prompt exercised: " + v.Unexercised[0]
	}
	return v
}

// sameKind compares what two prompts left out: "the sliding window (7 tokens, window
// 16)" is the same gap as with 9 tokens.
func sameKind(a, b string) bool {
	before, _, _ := strings.Cut(a, " (")
	other, _, _ := strings.Cut(b, " (")
	return before == other
}

func join(a, b string) string {
	if b == "" {
		return a
	}
	return a + ": " + b
}

// diagnosed is how many failing prompts are compared with every fault, at the most:
// what they agree on after that will not change.
const diagnosed = 3

// diagnose names what explains the failing prompts: those that fail by most come
// first, since they tell the faults apart best.
func diagnose(ctx context.Context, m *checkpoint.Model, p reference.Precision, replies []Reply, o conformance.JudgeOptions) (*conformance.Diagnosis, error) {
	var failing []*Reply
	for i := range replies {
		if replies[i].Verdict.Word == conformance.Fail {
			failing = append(failing, &replies[i])
		}
	}
	slices.SortStableFunc(failing, func(a, b *Reply) int { return len(b.Completion.Tokens) - len(a.Completion.Tokens) })
	var agreed *conformance.Diagnosis
	for _, r := range failing[:min(len(failing), diagnosed)] {
		if err := r.judge(ctx, m, p, o); err != nil {
			return nil, err
		}
		if agreed = agree(agreed, r.Verdict.Diagnosis); agreed.ID() == "none" {
			break
		}
	}
	return agreed, nil
}

// agree keeps what both diagnoses can mean, layers included.
func agree(a, b *conformance.Diagnosis) *conformance.Diagnosis { return conformance.Agreed(a, b) }
