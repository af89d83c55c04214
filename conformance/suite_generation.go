package conformance

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// generationCase decodes a prompt with the implementation's KV cache: its first
// half at once, the rest token by token, so that both ways into the cache and,
// in prompts longer than the window, keys that fall out of it are exercised. A
// prompt of one token is a single step. The logits must be those of the whole
// model.
func (s *Suite) generationCase(implementation Implementation, in input, stage string) Case {
	c := Case{
		Stage: stage, Implementation: implementation.Name(), Precision: implementation.Precision(),
		Fixture: in.fixture, Prompt: in.prompt.Name, Verdict: Pass,
	}
	if slices.Contains(s.options.Skip, stage) {
		c.Verdict, c.Reason = Skipped, "as the options ask"
		return c
	}
	if err := s.generate(&c, implementation, in); err != nil {
		c.Verdict, c.Reason = wordFor(err), err.Error()
	}
	return c
}

func (s *Suite) generate(c *Case, implementation Implementation, in input) error {
	o := s.open(implementation, in.fixture)
	if o.err != nil {
		return o.err
	}
	truth, err := s.goldens.truthOf(o.model.Config, in.fixture, in.prompt)
	if err != nil {
		return err
	}
	logits, err := s.decode(o, in.prompt.Tokens, max(1, len(in.prompt.Tokens)/2))
	if err != nil {
		return err
	}
	results := map[string]tensor.Tensor{taps.Logits: logits}
	exact, err := truth.findings(implementation.Precision(), results)
	if err != nil {
		return err
	}
	c.Findings = exact
	return s.judgeDecoded(c, o, implementation, in, results)
}

// judgeDecoded adds the judge's findings on decoded logits to a case. In float64
// the golden is sharper than the judge's budget, which is then left out.
func (s *Suite) judgeDecoded(c *Case, o *opened, implementation Implementation, in input, results map[string]tensor.Tensor) error {
	v := new(Verdict)
	if p := implementation.Precision(); p != reference.Float64 {
		var err error
		if v, err = s.verdict(o.model, in, Subject{Precision: p, Taps: results}); err != nil {
			return err
		}
	}
	c.Findings = append(c.Findings, v.Findings...)
	for i := range c.Findings {
		c.Findings[i].Stage = StageGeneration
		c.Verdict = Worse(c.Verdict, c.Findings[i].Verdict)
	}
	if c.Verdict != Fail {
		return nil
	}
	var err error
	c.Reason = v.why()
	c.Tensors, err = s.keep(o.model, in, implementation.Name()+".decoded", results)
	return err
}

// Generated judges greedy decoding: every implementation with a KV cache is fed
// what OpenAI's torch model generated in float64, one token at a time, and must
// give its logits and choose its tokens. Sub-tests are generated/case/
// implementation.
func (s *Suite) Generated(t *testing.T) {
	t.Helper()
	cases, err := golden.Stage(StageGeneration)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("generated", func(t *testing.T) {
		for _, g := range cases {
			t.Run(g.Name, func(t *testing.T) {
				for _, implementation := range s.implementations {
					o := s.open(implementation, "toy")
					if _, ok := o.instance.(Decoder); !ok {
						continue // said once, by the prompts' cases
					}
					if !decidedByGolden(implementation.Precision()) && !judgedToo(g) {
						continue
					}
					t.Run(implementation.Name(), func(t *testing.T) {
						t.Parallel()
						c := Case{
							Stage: StageGeneration, Implementation: implementation.Name(), Precision: implementation.Precision(),
							Fixture: "generated", Prompt: g.Name, Verdict: Pass,
						}
						if err := s.generatedCase(&c, implementation, g); err != nil {
							c.Verdict, c.Reason = wordFor(err), err.Error()
						}
						s.conclude(t, c)
					})
				}
			})
		}
	})
}

func (s *Suite) generatedCase(c *Case, implementation Implementation, g golden.Case) error {
	var fixture string
	var prompt, generated []int32
	if err := errors.Join(g.Parameter("fixture", &fixture), g.Parameter("prompt", &prompt), g.Parameter("generated", &generated)); err != nil {
		return err
	}
	stored, err := g.Truth()
	if err != nil {
		return err
	}
	want, err := stored[taps.Logits].Float64s()
	if err != nil {
		return err
	}
	o := s.open(implementation, fixture)
	if o.err != nil {
		return o.err
	}
	// The last token's successors are not stored.
	tokens := slices.Concat(prompt, generated[:len(generated)-1])
	logits, err := s.decode(o, tokens, len(prompt))
	if err != nil {
		return err
	}
	got, err := logits.Float64s()
	if err != nil {
		return err
	}
	vocab := o.model.Config.VocabSize
	got = got[(len(prompt)-1)*vocab:]
	if len(got) != len(want) {
		return fmt.Errorf("golden/%s: case %s has %d logits, want %d", g.Stage, g.Name, len(want), len(got))
	}
	if implementation.Precision() == reference.Float64 {
		f := Finding{Tap: taps.Logits, Method: Golden, From: []string{g.File}, Verdict: Pass}
		f.against([]int{len(generated), vocab}, got, want, goldenBounds(taps.Logits, want))
		f.Stage = StageGeneration
		c.Findings = append(c.Findings, f)
	}
	if decidedByGolden(implementation.Precision()) {
		// The golden's margins (at least 1e-3) are far beyond rounding there.
		c.Findings = append(c.Findings, greedy(got, generated, vocab))
	}
	for _, f := range c.Findings {
		c.Verdict = Worse(c.Verdict, f.Verdict)
	}
	if !judgedToo(g) {
		return nil
	}
	in := input{fixture, fixtures.Prompt{Name: g.Name, Tokens: tokens}}
	return s.judgeDecoded(c, o, implementation, in, map[string]tensor.Tensor{taps.Logits: logits})
}

// judgedToo reports whether a case's logits go to the judge as well, whose budget
// takes many runs. That is left to the smallest fixture; prompts of the others
// are decoded and judged by [Suite.Stage].
func judgedToo(g golden.Case) bool { return strings.HasPrefix(g.Name, "toy_") }

// decidedByGolden reports whether a precision must choose the golden's tokens.
func decidedByGolden(p reference.Precision) bool {
	return p == reference.Float64 || p == reference.Float32
}

// greedy compares the most likely tokens with those that were generated.
func greedy(logits []float64, generated []int32, vocab int) Finding {
	f := Finding{Tap: taps.Logits, Stage: StageGeneration, Method: Golden, Verdict: Pass, Of: len(generated), Reason: "greedy tokens"}
	for step, want := range generated {
		if best := reference.TopK(logits[step*vocab:][:vocab], 1)[0]; best != want {
			f.Over++
			f.Verdict, f.Ratio = Fail, math.Inf(1)
			if f.Worst == nil {
				f.Worst = &Worst{Index: []int{step}, Got: float64(best), Want: float64(want)}
			}
		}
	}
	return f
}

// decode returns the logits of a sequence that went through the KV cache: the
// first tokens at once, the others one by one.
func (s *Suite) decode(o *opened, tokens []int32, first int) (tensor.Tensor, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	decoder, ok := o.instance.(Decoder)
	if !ok {
		return tensor.Tensor{}, fmt.Errorf("the implementation has no KV cache: %w", errors.ErrUnsupported)
	}
	decoding, err := decoder.Decode(s.ctx)
	if err != nil {
		return tensor.Tensor{}, err
	}
	defer decoding.Close()
	shape, err := taps.Shape(o.model.Config, taps.Logits, len(tokens))
	if err != nil {
		return tensor.Tensor{}, err
	}
	all := tensor.Tensor{Shape: shape}
	for from, n := 0, first; from < len(tokens); from, n = from+n, 1 {
		part, err := decoding.Step(s.ctx, tokens[from:from+n])
		if err != nil {
			return tensor.Tensor{}, fmt.Errorf("step at position %d: %w", from, err)
		}
		if want := []int{n, shape[1]}; !slices.Equal(part.Shape, want) || part.Check() != nil {
			return tensor.Tensor{}, fmt.Errorf("step at position %d gave logits of shape %v, want %v", from, part.Shape, want)
		}
		all.DType = part.DType
		all.Data = append(all.Data, part.Data...)
	}
	return all, nil
}
