// Package command judges any program in any language. For every prompt the
// program is started with one argument, a directory:
//
//	request.json         what is wanted; see [Request]
//	prompts.safetensors  each prompt's ids as I32 [tokens], by the prompt's name
//	checkpoint/          the model, in the layout that was asked for
//	output/              empty
//
// It writes output/NAME.safetensors or output/NAME.npz for every prompt NAME, with
// at least the tensor "logits" [tokens, vocab]; every other tap of the registry
// (reference/taps) that it writes is judged too. Any float type will do; .npz
// holds bfloat16 as float32 or as |V2. It exits with status 0. What it prints is
// shown when it fails.
//
// testdata/gptoss.py is such a program: gpt-oss in Python's standard library.
package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// ProtocolVersion is raised when a program that works today would no longer.
const ProtocolVersion = 1

// Names in the directory that a program is given.
const (
	requestFile   = "request.json"
	promptsFile   = "prompts.safetensors"
	checkpointDir = "checkpoint"
	outputDir     = "output"
)

// Request is the content of request.json.
type Request struct {
	Protocol  int                 `json:"protocol"`
	Precision reference.Precision `json:"precision"` // the arithmetic that the program is judged by
	Layout    string              `json:"layout"`    // of checkpoint/: openai or huggingface
	Taps      []string            `json:"taps"`      // what is wanted, in order of execution; logits are a must
	Prompts   []Prompt            `json:"prompts"`
}

// Prompt is a named sequence of ids.
type Prompt struct {
	Name   string  `json:"name"`
	Tokens []int32 `json:"tokens"`
}

// Options say how a program is run.
type Options struct {
	Name      string              // in reports: letters, digits, dots and dashes
	Precision reference.Precision // what it computes in
	Program   []string            // the program and its arguments; the directory is appended
	// Layout of the checkpoint that the program reads: "openai" (the default) or
	// "huggingface".
	Layout string
	// Twin returns the same checkpoint in the layout wanted, for a program that
	// does not read the layout that the suite has. Nil: only the suite's own.
	Twin func(checkpointDir, layout string) (string, error)
	// Timeout for one prompt; 10 minutes if it is 0.
	Timeout time.Duration
}

// New returns a program as an implementation.
func New(o Options) conformance.Implementation {
	if o.Layout == "" {
		o.Layout = "openai"
	}
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Minute
	}
	return implementation{o}
}

type implementation struct{ options Options }

func (i implementation) Name() string { return i.options.Name }

func (i implementation) Precision() reference.Precision { return i.options.Precision }

// Open finds the checkpoint in the layout that the program reads.
func (i implementation) Open(_ context.Context, dir string) (conformance.Instance, error) {
	if len(i.options.Program) == 0 {
		return nil, errors.New("no program is named")
	}
	m, err := checkpoint.Open(dir)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	if m.Source.Layout != i.options.Layout {
		if i.options.Twin == nil {
			return nil, fmt.Errorf("%s is in the layout %s and the program reads %s: %w", dir, m.Source.Layout, i.options.Layout, errors.ErrUnsupported)
		}
		if dir, err = i.options.Twin(dir, i.options.Layout); err != nil {
			return nil, err
		}
	}
	absolute, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return &instance{i.options, absolute, taps.All(m.Config)}, nil
}

type instance struct {
	options    Options
	checkpoint string
	taps       []string
}

func (i *instance) Close() error { return nil }

func (i *instance) Forward(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error) {
	return i.ForwardTaps(ctx, tokens, []string{taps.Logits})
}

func (i *instance) ForwardTaps(ctx context.Context, tokens []int32, names []string) (map[string]tensor.Tensor, error) {
	dir, err := os.MkdirTemp("", "gptoss-command-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	prompt := Prompt{Name: "prompt", Tokens: tokens}
	if err := i.prepare(dir, prompt, names); err != nil {
		return nil, err
	}
	if err := i.run(ctx, dir); err != nil {
		return nil, err
	}
	return i.collect(dir, prompt.Name)
}

// prepare fills the directory that the program is given.
func (i *instance) prepare(dir string, prompt Prompt, names []string) error {
	if err := os.Mkdir(filepath.Join(dir, outputDir), 0o755); err != nil {
		return err
	}
	if err := os.Symlink(i.checkpoint, filepath.Join(dir, checkpointDir)); err != nil {
		return err
	}
	request, err := json.MarshalIndent(Request{
		Protocol: ProtocolVersion, Precision: i.options.Precision, Layout: i.options.Layout,
		Taps: names, Prompts: []Prompt{prompt},
	}, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, requestFile), request, 0o644); err != nil {
		return err
	}
	ids := tensor.Named{Name: prompt.Name, Tensor: tensor.FromInt32s([]int{len(prompt.Tokens)}, prompt.Tokens)}
	return tensor.WriteSafetensors(filepath.Join(dir, promptsFile), []tensor.Named{ids}, nil)
}

// run starts the program and waits for it. When the context ends or the time is
// up, the program and what it started are killed.
func (i *instance) run(ctx context.Context, dir string) error {
	limited, cancel := context.WithTimeout(ctx, i.options.Timeout)
	defer cancel()
	var printed tail
	program := i.options.Program
	command := exec.CommandContext(limited, program[0], append(slices.Clone(program[1:]), dir)...)
	command.Stdout, command.Stderr = &printed, &printed
	command.WaitDelay = 2 * time.Second // for grandchildren that keep the pipe open
	killGroup(command)

	err := command.Run()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case limited.Err() != nil:
		return fmt.Errorf("%s did not finish within %v%s", program[0], i.options.Timeout, printed.quoted())
	default:
		return fmt.Errorf("%s: %w%s", strings.Join(program, " "), err, printed.quoted())
	}
}

// collect reads what the program wrote for a prompt.
func (i *instance) collect(dir, prompt string) (map[string]tensor.Tensor, error) {
	base := filepath.Join(dir, outputDir, prompt)
	results, err := readTensors(base)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.options.Program[0], err)
	}
	if _, ok := results[taps.Logits]; !ok {
		return nil, fmt.Errorf("%s wrote no tensor called %s", i.options.Program[0], taps.Logits)
	}
	for name := range results {
		if !slices.Contains(i.taps, name) {
			return nil, fmt.Errorf("%s wrote the tensor %.80q, which is no tap of this model; reference/taps lists them", i.options.Program[0], name)
		}
	}
	return results, nil
}

// readTensors reads base.safetensors or base.npz into memory: the file goes away
// with its directory.
func readTensors(base string) (map[string]tensor.Tensor, error) {
	file, err := tensor.OpenSafetensors(base + ".safetensors")
	if errors.Is(err, fs.ErrNotExist) {
		results, err := tensor.ReadNPZ(base + ".npz")
		if errors.Is(err, fs.ErrNotExist) {
			name := filepath.Join(outputDir, filepath.Base(base))
			return nil, fmt.Errorf("wrote neither %s.safetensors nor %s.npz", name, name)
		}
		return results, err
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	results := map[string]tensor.Tensor{}
	for _, name := range file.Names() {
		t, _ := file.Tensor(name)
		t.Data = slices.Clone(t.Data)
		results[name] = t
	}
	return results, nil
}

// tail keeps the last bytes that were written to it: the end of a traceback says
// what went wrong.
type tail struct{ kept []byte }

const tailBytes = 2000

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	if extra := len(t.kept) - tailBytes; extra > 0 {
		t.kept = append(t.kept[:0], t.kept[extra:]...)
	}
	return len(p), nil
}

// quoted is the end of an error message.
func (t *tail) quoted() string {
	text := strings.TrimSpace(strings.ToValidUTF8(string(t.kept), "?"))
	if text == "" {
		return " and printed nothing"
	}
	return "; it printed last: " + text
}
