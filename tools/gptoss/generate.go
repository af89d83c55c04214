package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// generateOptions are the flags of `gptoss generate`.
type generateOptions struct {
	checkpoint, backend, precision string
	onnx, operators                string
	expandFunctions                bool
	read                           *checkpoint.Options

	prompt, system, developer, effort string
	chat, raw                         bool

	maxTokens         int
	temperature, topP float64
	seed              uint64
	stop              []string
}

// generateCommand continues a text.
func generateCommand() *cobra.Command {
	var o generateOptions
	command := &cobra.Command{
		Use:   "generate (--checkpoint PATH | --onnx M.onnx --config PATH) --prompt TEXT",
		Short: "Continue a text, or answer in a chat",
		Long: `Continue a text, token by token, and stream what comes to stdout.

The Go reference runs a checkpoint in any layout, with a KV cache. An ONNX graph
needs nothing but itself and a config.json: one with a KV cache is fed one token
at a time, any other is run again over the whole text. With --checkpoint and
--backend onnxruntime a graph with a cache is exported on the spot.

Without --chat the prompt is continued as it stands, and <|start|> and the like in
it are special tokens. With --chat it is a user's message in a harmony
conversation; the answer goes to stdout, and what the model thinks before it to
stderr. An answer of the form {"text": "..."} is printed as its text (--raw: as
it is).

Generation stops at <|return|>, <|end|>, <|call|> and <|endoftext|>, at any --stop,
and after --max-tokens. In a chat, <|end|> after a thought is not the end.
The same seed gives the same text; temperature 0 takes the likeliest token.`,
		Example: `  gptoss generate --checkpoint fixtures/capitals --prompt "France capital? Answer:"
  gptoss generate --checkpoint DIR --chat --prompt "What is the capital of France?" --temperature 1 --seed 7
  gptoss generate --onnx capitals.onnx --config fixtures/capitals --prompt "France capital? Answer:"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return generate(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := command.Flags()
	flags.StringVar(&o.checkpoint, "checkpoint", "", "checkpoint to run")
	flags.StringVar(&o.backend, "backend", backendReference, "what runs the checkpoint: reference or onnxruntime")
	flags.StringVar(&o.precision, "precision", string(reference.Float32), "arithmetic: float64 (reference only), float32, bfloat16 or float16 (onnxruntime only)")
	flags.StringVar(&o.onnx, "onnx", "", "ONNX graph to run instead of a checkpoint")
	o.read = checkpointFlags(command)
	flags.Lookup("config").Usage = "config.json of the graph's model, or its directory; with --checkpoint instead of the configuration beside the weights"
	flags.StringVar(&o.operators, "operators", "", "of the graph that is exported (--backend onnxruntime): onnxruntime (the default) or portable")
	flags.BoolVar(&o.expandFunctions, "expand-functions", false, "export without model-local functions (--backend onnxruntime)")
	flags.StringVar(&o.prompt, "prompt", "", "text to continue, or to answer")
	flags.BoolVar(&o.chat, "chat", false, "the prompt is a user's message in a harmony conversation")
	flags.StringVar(&o.system, "system", "", "identity in the system message (--chat)")
	flags.StringVar(&o.developer, "developer", "", "instructions in a developer message (--chat)")
	flags.StringVar(&o.effort, "effort", "medium", "reasoning effort: low, medium or high (--chat)")
	flags.BoolVar(&o.raw, "raw", false, `print an answer of the form {"text": "..."} as it is`)
	flags.IntVar(&o.maxTokens, "max-tokens", 128, "stop after this many tokens")
	flags.Float64Var(&o.temperature, "temperature", 0, "0 takes the likeliest token; 1 samples from the model's own probabilities")
	flags.Float64Var(&o.topP, "top-p", 1, "sample from the likeliest tokens that together have this probability")
	flags.Uint64Var(&o.seed, "seed", 0, "seed of the sampling")
	flags.StringArrayVar(&o.stop, "stop", nil, "stop at this text or special token; may be given more than once")
	if err := command.MarkFlagRequired("prompt"); err != nil {
		panic(err) // the flag was defined above
	}
	return command
}

func generate(ctx context.Context, o generateOptions, stdout, stderr io.Writer) error {
	if err := o.check(); err != nil {
		return err
	}
	prompt, err := o.tokens()
	if err != nil {
		return err
	}
	stops, err := parseStops(o.stop)
	if err != nil {
		return err
	}
	d, err := openDecoder(ctx, o, stderr)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := checkVocabulary(d.vocabulary()); err != nil {
		return err
	}

	sampler := newSampler(o.temperature, o.topP, o.seed)
	out := newPrinter(o, stops, stdout, stderr)
	began := time.Now()
	logits, err := d.next(ctx, prompt)
	if err != nil {
		return err
	}
	prefill := time.Since(began)
	began = time.Now()
	count := 0
	for count < o.maxTokens {
		id, err := sampler.pick(logits)
		if err != nil {
			return fmt.Errorf("token %d of the answer: %w", count, err)
		}
		count++
		done, err := out.token(id)
		if err != nil {
			return err
		}
		if done || count == o.maxTokens {
			break
		}
		if logits, err = d.next(ctx, []int32{id}); errors.Is(err, errGraphFull) {
			fmt.Fprintf(stderr, "gptoss: stopped: %v\n", err)
			break
		} else if err != nil {
			return err
		}
	}
	if err := out.close(); err != nil {
		return err
	}
	decode := time.Since(began)
	fmt.Fprintf(stderr, "%d tokens in, %.3g s; %d out, %.3g s: %.1f tokens per second\n", len(prompt), prefill.Seconds(), count,
		decode.Seconds(), float64(count)/max(decode.Seconds(), 1e-9))
	return nil
}

// check reports flags that contradict each other or make no sense.
func (o generateOptions) check() error {
	switch {
	case o.checkpoint == "" && o.onnx == "":
		return errors.New("give --checkpoint PATH, or --onnx M.onnx with --config PATH")
	case o.checkpoint != "" && o.onnx != "":
		return errors.New("--checkpoint and --onnx exclude each other")
	case o.onnx != "" && o.read.Config == "":
		return errors.New("--onnx needs --config PATH: a graph does not say how its model is made")
	case o.onnx != "" && o.read.UndoGateBias:
		return errors.New("--undo-gate-bias goes with --checkpoint: a graph has its weights already")
	case o.backend != backendReference && o.backend != backendONNXRuntime:
		return fmt.Errorf("--backend: %q is none of reference, onnxruntime", o.backend)
	case o.operators != "" && o.operators != string(exporter.OperatorsPortable) && o.operators != string(exporter.OperatorsONNXRuntime):
		return fmt.Errorf("--operators: %q is none of onnxruntime, portable", o.operators)
	case o.operators != "" && (o.onnx != "" || o.backend != backendONNXRuntime):
		return errors.New("--operators goes with --checkpoint and --backend onnxruntime, where a graph is exported")
	case o.expandFunctions && (o.onnx != "" || o.backend != backendONNXRuntime):
		return errors.New("--expand-functions goes with --checkpoint and --backend onnxruntime, where a graph is exported")
	case o.prompt == "":
		return errors.New("--prompt is empty: there is nothing to continue")
	case !o.chat && (o.system != "" || o.developer != ""):
		return errors.New("--system and --developer go with --chat")
	case o.maxTokens < 1:
		return fmt.Errorf("--max-tokens: %d is less than 1", o.maxTokens)
	case math.IsNaN(o.temperature) || o.temperature < 0 || math.IsInf(o.temperature, 0):
		return fmt.Errorf("--temperature: %v is not 0 or more", o.temperature)
	case math.IsNaN(o.topP) || o.topP <= 0 || o.topP > 1:
		return fmt.Errorf("--top-p: %v is not above 0 and at most 1", o.topP)
	}
	return nil
}

// tokens renders the prompt.
func (o generateOptions) tokens() ([]int32, error) {
	if !o.chat {
		ids, err := tokenizer.EncodeSpecial(o.prompt)
		if err != nil {
			return nil, fmt.Errorf("--prompt: %w", err)
		}
		return ids, nil
	}
	system := tokenizer.DefaultSystem()
	system.Effort = o.effort
	if o.system != "" {
		system.Identity = o.system
	}
	return tokenizer.Render(tokenizer.Conversation{
		System:    &system,
		Developer: &tokenizer.Developer{Instructions: o.developer},
		Turns:     []tokenizer.Turn{{Role: tokenizer.RoleUser, Content: o.prompt}},
	})
}

// checkVocabulary reports a model whose ids are not the tokenizer's.
func checkVocabulary(size int) error {
	if size < tokenizer.VocabSize {
		return fmt.Errorf("the model has a vocabulary of %d, and the tokenizer o200k_harmony needs %d", size, tokenizer.VocabSize)
	}
	return nil
}

// stops is what ends an answer besides the model's own wish.
type stops struct {
	ids   []int32
	texts []string
}

var specialForm = regexp.MustCompile(`^<\|[^|]*\|>$`)

func parseStops(values []string) (stops, error) {
	s := stops{ids: []int32{tokenizer.Return, tokenizer.Call, tokenizer.End, tokenizer.EndOfText}}
	for _, value := range values {
		switch {
		case value == "":
			return s, errors.New("--stop is empty")
		case specialForm.MatchString(value):
			id, err := tokenizer.Special(value)
			if err != nil {
				return s, fmt.Errorf("--stop: %w", err)
			}
			s.ids = append(s.ids, id)
		default:
			s.texts = append(s.texts, value)
		}
	}
	return s, nil
}

// printer turns the model's tokens into text on stdout, as they come.
type printer struct {
	stops  stops
	stdout io.Writer
	stderr io.Writer
	raw    bool

	stream tokenizer.Stream  // without --chat
	parser *tokenizer.Parser // with --chat
	held   string            // may be the beginning of a stop text
	object *strings.Builder  // an answer that began with {: printed when complete
	begun  bool              // something of the current message was shown
	spoke  bool              // stdout has text and no newline yet
	inner  bool              // stderr has a thought and no newline yet
}

func newPrinter(o generateOptions, s stops, stdout, stderr io.Writer) *printer {
	p := &printer{stops: s, stdout: stdout, stderr: stderr, raw: o.raw}
	if o.chat {
		p.parser = tokenizer.NewParser()
	}
	return p
}

// token takes the next token and reports whether it was the last.
func (p *printer) token(id int32) (done bool, err error) {
	if p.parser == nil {
		if slices.Contains(p.stops.ids, id) {
			return true, nil
		}
		text, err := p.stream.Next(id)
		if err != nil {
			return false, err
		}
		return p.say(text)
	}
	before, inContent := p.parser.Current()
	text, err := p.parser.Next(id)
	if err != nil {
		return false, err
	}
	if inContent {
		if before.Channel == tokenizer.ChannelAnalysis {
			err = p.think(text)
		} else {
			done, err = p.say(text)
		}
		if id == tokenizer.Call && before.Recipient != "" {
			_, err = p.say(")")
		}
		if id == tokenizer.End {
			p.begun = false
			thought := before.Channel == tokenizer.ChannelAnalysis || before.Channel == tokenizer.ChannelCommentary
			return done || !thought, err
		}
	} else if after, now := p.parser.Current(); now && after.Recipient != "" {
		done, err = p.say(fmt.Sprintf("%s(", after.Recipient))
	}
	return done || slices.Contains(p.stops.ids, id) && id != tokenizer.End, err
}

// say prints a piece of the answer, up to a stop text if there is one.
func (p *printer) say(text string) (stopped bool, err error) {
	p.held += text
	cut := len(p.held)
	for _, stop := range p.stops.texts {
		if at := strings.Index(p.held, stop); at >= 0 && at < cut {
			cut, stopped = at, true
		}
	}
	if stopped {
		piece := p.held[:cut]
		p.held = ""
		return true, p.emit(piece)
	}
	keep := 0
	for _, stop := range p.stops.texts {
		keep = max(keep, overlap(p.held, stop))
	}
	piece := p.held[:len(p.held)-keep]
	p.held = p.held[len(p.held)-keep:]
	return false, p.emit(piece)
}

// overlap returns how many bytes at the end of text begin stop.
func overlap(text, stop string) int {
	for n := min(len(text), len(stop)-1); n > 0; n-- {
		if strings.HasSuffix(text, stop[:n]) {
			return n
		}
	}
	return 0
}

// emit prints text, or keeps it if it belongs to a JSON object.
func (p *printer) emit(text string) error {
	if text == "" {
		return nil
	}
	if !p.begun && !p.raw && strings.TrimSpace(text) != "" {
		if strings.HasPrefix(strings.TrimSpace(text), "{") {
			p.object = new(strings.Builder)
		}
	}
	if strings.TrimSpace(text) != "" {
		p.begun = true
	}
	if p.object != nil {
		p.object.WriteString(text)
		return nil
	}
	return p.write(text)
}

func (p *printer) write(text string) error {
	if p.inner {
		p.inner = false
		if _, err := io.WriteString(p.stderr, "\n"); err != nil {
			return err
		}
	}
	p.spoke = !strings.HasSuffix(text, "\n")
	_, err := io.WriteString(p.stdout, text)
	return err
}

func (p *printer) think(text string) error {
	if text == "" {
		return nil
	}
	p.inner = !strings.HasSuffix(text, "\n")
	_, err := io.WriteString(p.stderr, text)
	return err
}

// close prints what was held back, and a last newline.
func (p *printer) close() error {
	rest := p.held
	if p.parser == nil {
		rest += p.stream.Flush()
	} else if _, err := p.parser.Close(); err != nil {
		return err
	}
	if err := p.emit(rest); err != nil {
		return err
	}
	if p.object != nil {
		text := p.object.String()
		if inner, found := textMember(text); found {
			text = inner
		}
		if err := p.write(text); err != nil {
			return err
		}
	}
	if p.inner {
		fmt.Fprintln(p.stderr)
	}
	if p.spoke {
		_, err := fmt.Fprintln(p.stdout)
		return err
	}
	return nil
}

// textPattern finds the member "text" of a JSON object; the object may have
// been cut off by the limit of tokens.
var textPattern = regexp.MustCompile(`^\s*\{\s*"text"\s*:\s*("(?:[^"\\]|\\.)*"?)`)

// textMember returns the text of an answer of the form {"text": "..."}.
func textMember(answer string) (string, bool) {
	match := textPattern.FindStringSubmatch(answer)
	if match == nil {
		return "", false
	}
	quoted := match[1]
	if len(quoted) < 2 || !strings.HasSuffix(quoted, `"`) {
		quoted += `"`
	}
	text, err := strconv.Unquote(quoted)
	if err != nil {
		return "", false
	}
	return text, true
}
