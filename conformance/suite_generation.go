package conformance

import (
	"errors"
	"fmt"
	"slices"

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
	logits, err := s.decode(o, in.prompt.Tokens)
	if err != nil {
		return err
	}
	results := map[string]tensor.Tensor{taps.Logits: logits}
	v, err := s.verdict(o.model, in.prompt.Tokens, Subject{Precision: implementation.Precision(), Taps: results})
	if err != nil {
		return err
	}
	exact, err := truth.findings(implementation.Precision(), results)
	if err != nil {
		return err
	}
	for _, f := range append(v.Findings, exact...) {
		f.Stage = StageGeneration
		c.Findings = append(c.Findings, f)
		c.Verdict = Worse(c.Verdict, f.Verdict)
	}
	if c.Verdict == Fail {
		c.Reason = v.why()
		c.Tensors, err = s.keep(o.model, in, implementation.Name()+".decoded", results)
	}
	return err
}

// decode returns the logits of a sequence that went through the KV cache.
func (s *Suite) decode(o *opened, tokens []int32) (tensor.Tensor, error) {
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
	for from, n := 0, max(1, len(tokens)/2); from < len(tokens); from, n = from+n, 1 {
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
