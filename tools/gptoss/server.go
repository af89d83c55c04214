package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/conformance/backends/server"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// envKey is the environment variable that holds the key for a server, as OpenAI's
// own programs have it.
const envKey = "OPENAI_API_KEY"

// serverFlags say which server is judged, and by what.
type serverFlags struct {
	url, model, prompt string
	maxTokens          int
	timeout            time.Duration
}

func (f *serverFlags) register(command *cobra.Command) {
	flags := command.Flags()
	flags.StringVar(&f.url, "server", "", "a server with OpenAI's completions API to ask, like http://localhost:8080; a key is read from "+envKey)
	flags.StringVar(&f.model, "model", "", "what the server calls the checkpoint (--server; the default is the only one that it lists)")
	flags.StringVar(&f.prompt, "prompt", "", "text to continue, in place of --tokens (--server; the default is a set of prompts that suits the checkpoint)")
	flags.IntVar(&f.maxTokens, "max-tokens", 16, "tokens to generate after each prompt (--server)")
	flags.DurationVar(&f.timeout, "timeout", 5*time.Minute, "for each request (--server)")
}

// serverOnly are the flags that mean nothing without --server.
var serverOnly = []string{"model", "prompt", "max-tokens", "timeout"}

// unused refuses flags that would be ignored without --server, and asks for the
// tokens that are needed then.
func (f serverFlags) unused(command *cobra.Command, subject subjectFlags) error {
	for _, name := range serverOnly {
		if command.Flags().Changed(name) {
			return fmt.Errorf("--%s is for --server", name)
		}
	}
	if subject.tokens == "" {
		return errors.New(`required flag(s) "tokens" not set`)
	}
	return nil
}

// judge asks a server, and judges what it says.
func (f serverFlags) judge(subject subjectFlags) func(*cobra.Command, conformance.JudgeOptions) (*conformance.Verdict, *checkpoint.Model, error) {
	return func(command *cobra.Command, o conformance.JudgeOptions) (*conformance.Verdict, *checkpoint.Model, error) {
		return f.ask(command, subject, o)
	}
}

func (f serverFlags) ask(command *cobra.Command, subject subjectFlags, o conformance.JudgeOptions) (*conformance.Verdict, *checkpoint.Model, error) {
	ctx := command.Context()
	precision, err := reference.ParsePrecision(subject.precision)
	if err != nil {
		return nil, nil, err
	}
	if f.maxTokens < 1 {
		return nil, nil, fmt.Errorf("--max-tokens: %d: want at least 1", f.maxTokens)
	}
	if f.timeout <= 0 {
		return nil, nil, fmt.Errorf("--timeout: %v: want some time", f.timeout)
	}
	path, err := expanded(ctx, subject.checkpoint)
	if err != nil {
		return nil, nil, err
	}
	m, err := openCheckpoint(command.ErrOrStderr(), path, subject.read)
	if err != nil {
		return nil, nil, err
	}
	prompts, err := f.prompts(m, subject.tokens)
	if err != nil {
		return nil, m, err
	}
	client, err := server.NewClient(server.Options{
		URL: f.url, Model: f.model, APIKey: strings.TrimSpace(os.Getenv(envKey)), Timeout: f.timeout,
	}, m.Config.VocabSize)
	if err != nil {
		return nil, m, fmt.Errorf("--server: %w", err)
	}
	replies, err := server.Ask(ctx, client, prompts, f.maxTokens)
	if err != nil {
		return nil, m, err
	}
	progress := newLayers(command.ErrOrStderr(), "judging", m, 0)
	defer progress.finish()
	v, err := server.Judge(conformance.WithProgress(ctx, progress.next), m, precision, replies, o)
	if err != nil {
		return nil, m, err
	}
	printReplies(command.OutOrStdout(), client, replies)
	return v, m, nil
}

// expanded makes the whole of a trained fixture's checkpoint, if path is one.
func expanded(ctx context.Context, path string) (string, error) {
	if !fixtures.Compact(path) {
		return path, nil
	}
	cache, err := library.CacheDir()
	if err != nil {
		return "", err
	}
	return fixtures.Expanded(ctx, path, cache)
}

// prompts are what the user asks, or what suits the checkpoint.
func (f serverFlags) prompts(m *checkpoint.Model, ids string) ([]fixtures.Prompt, error) {
	var tokens []int32
	var err error
	switch {
	case f.prompt != "":
		if m.Config.VocabSize != tokenizer.VocabSize {
			return nil, fmt.Errorf("--prompt: a vocabulary of %d has no text: give --tokens", m.Config.VocabSize)
		}
		tokens, err = tokenizer.EncodeSpecial(f.prompt)
	case ids != "":
		tokens, err = parseTokens(ids)
	default:
		return server.Prompts(m)
	}
	if err != nil {
		return nil, err
	}
	if err := reference.CheckTokens(m.Config, tokens); err != nil {
		return nil, fmt.Errorf("--tokens: %w", err)
	}
	return []fixtures.Prompt{{Name: "as given", Tokens: tokens}}, nil
}

// printReplies says who was asked, and what came back.
func printReplies(w io.Writer, c *server.Client, replies []server.Reply) {
	fmt.Fprintf(w, "server: %s\n", c)
	for _, r := range replies {
		fmt.Fprintf(w, "prompt %q: %d tokens, %d generated", r.Prompt.Name, len(r.Prompt.Tokens), len(r.Completion.Tokens))
		if r.Completion.Text != "" {
			fmt.Fprintf(w, ", %q", clipped(r.Completion.Text))
		}
		fmt.Fprintf(w, ": %s\n", r.Verdict.Word)
	}
}

// clipped keeps a line short.
func clipped(text string) string {
	const longest = 60
	if runes := []rune(text); len(runes) > longest {
		return string(runes[:longest]) + "…"
	}
	return text
}
