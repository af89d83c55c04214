// Package server judges an endpoint with OpenAI's completions API that serves one
// of our checkpoints: vLLM, llama.cpp's llama-server and others. All that such an
// endpoint gives away are the tokens that it generates, their log-probabilities and
// those of a few others in their places, which is enough to tell right from wrong, and often which
// wrong ([conformance.JudgeGreedy]).
//
// It speaks plain net/http. OpenAI's client library for Go
// (github.com/openai/openai-go, v3.96 looked at) reads null log-probabilities as
// 0, which is certainty, where a server means NaN; it reads answers of any
// length; it asks again by itself; and what makes the answers useful here are the
// fields that OpenAI does not have. One request and one answer need no library.
//
// The dialects, as documented and as tried (testdata/README.md):
//
//   - vLLM takes prompts as token ids, and with return_tokens_as_token_ids and
//     return_token_ids it answers with ids.
//   - llama.cpp takes prompts as token ids, and puts log-probabilities in the form
//     of the chat API, with ids.
//   - transformers serve takes text only and rejects fields that it does not know.
//     It gives no log-probabilities and cannot be judged.
//   - Anybody else: prompts as token ids if the server takes them, else as text.
//     Tokens named by their text need gpt-oss's own vocabulary.
package server

import (
	"context"
	"errors"
	"fmt"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// New returns a server as an implementation. served is the checkpoint that the
// server has loaded, in any layout; any other is unsupported, since a server can't
// be told to load one.
//
// It has no taps, no stages and no logits, and says so: those cases are
// unsupported. What it can do is [Instance.Generate].
func New(name string, p reference.Precision, served string, o Options) conformance.Implementation {
	return implementation{name, p, served, o}
}

type implementation struct {
	name      string
	precision reference.Precision
	served    string
	options   Options
}

func (i implementation) Name() string { return i.name }

func (i implementation) Precision() reference.Precision { return i.precision }

// Open compares the digests of the checkpoint and of the one that the server has.
func (i implementation) Open(ctx context.Context, dir string) (conformance.Instance, error) {
	wanted, err := digest(ctx, dir)
	if err != nil {
		return nil, err
	}
	m, err := checkpoint.Open(i.served)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	served, err := m.Digest(ctx)
	if err != nil {
		return nil, err
	}
	if served != wanted {
		return nil, fmt.Errorf("the server has another checkpoint, %s: %w", i.served, errors.ErrUnsupported)
	}
	client, err := NewClient(i.options, m.Config.VocabSize)
	if err != nil {
		return nil, err
	}
	return &Instance{client: client, precision: i.precision}, nil
}

func digest(ctx context.Context, dir string) (string, error) {
	m, err := checkpoint.Open(dir)
	if err != nil {
		return "", err
	}
	defer m.Close()
	return m.Digest(ctx)
}

// Instance is a server with a checkpoint in it.
type Instance struct {
	client    *Client
	precision reference.Precision
}

// Forward is unsupported.
func (i *Instance) Forward(context.Context, []int32) (map[string]tensor.Tensor, error) {
	return nil, fmt.Errorf("a text endpoint gives tokens and their log-probabilities, no logits: %w", errors.ErrUnsupported)
}

// Generate asks for up to n tokens after a prompt, always the likeliest one.
func (i *Instance) Generate(ctx context.Context, prompt []int32, n int) (conformance.Greedy, error) {
	completion, err := i.client.Complete(ctx, prompt, n)
	return greedy(completion, i.precision), err
}

// Close does nothing: the server goes on.
func (i *Instance) Close() error { return nil }

func greedy(c Completion, p reference.Precision) conformance.Greedy {
	return conformance.Greedy{Precision: p, Tokens: c.Tokens, LogProbs: c.LogProbs, Top: c.Top}
}
