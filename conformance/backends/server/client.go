package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
)

// Options say where a server is and how it is asked.
type Options struct {
	// URL of the server: http://localhost:8080, with or without /v1 or
	// /v1/completions behind it.
	URL string
	// Model is the name that the server knows the checkpoint by. Empty: the only
	// one that it lists, or none at all if it lists none.
	Model string
	// APIKey is sent as a bearer token if it is not empty.
	APIKey string
	// Timeout for one request, the reading of its answer included; 5 minutes if it
	// is 0, since some servers load the model on the first request.
	Timeout time.Duration
	// Transport replaces the usual one; nil in earnest.
	Transport http.RoundTripper
}

// Limits on what is read. An answer of a thousand tokens with five alternatives
// each takes a third of a megabyte.
const (
	answerLimit = 16 << 20
	quotedLimit = 200 // bytes of a server's own words in an error
)

const (
	defaultTimeout = 5 * time.Minute
	dialTimeout    = 10 * time.Second
	topLogProbs    = 5 // OpenAI's limit, and below everybody else's
)

// form is a way to put the question. Servers reject what they do not know, or
// ignore it, so the most telling form is tried first.
type form struct {
	ids      bool // the prompt as token ids, not as text
	dialects bool // with the fields of vLLM and llama.cpp that OpenAI does not have
}

var forms = []form{{ids: true, dialects: true}, {ids: true}, {dialects: true}, {}}

func (f form) String() string {
	if f.ids {
		return "prompts as token ids"
	}
	return "prompts as text"
}

// Client asks one server about one checkpoint. It is not safe for concurrent use.
type Client struct {
	options  Options
	endpoint string // …/v1/completions
	http     *http.Client
	vocab    int
	forms    []form // those that the server has not rejected yet
	named    bool   // the model's name is settled
}

// NewClient checks the options. vocab is the checkpoint's vocabulary: ids outside
// it are errors, and tokens are understood as text only if it is gpt-oss's own.
func NewClient(o Options, vocab int) (*Client, error) {
	base, err := url.Parse(o.URL)
	if err != nil {
		return nil, fmt.Errorf("%q is no URL: want something like http://localhost:8080", o.URL)
	}
	if base.Scheme != "http" && base.Scheme != "https" || base.Host == "" {
		return nil, fmt.Errorf("%q is no URL of a server: want something like http://localhost:8080", base.Redacted())
	}
	if base.RawQuery != "" || base.Fragment != "" {
		return nil, fmt.Errorf("%s: leave out what follows the path", base.Redacted())
	}
	path := strings.TrimSuffix(base.Path, "/")
	path = strings.TrimSuffix(path, "/completions")
	if !strings.HasSuffix(path, "/v1") {
		path += "/v1"
	}
	base.Path = path + "/completions"
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.Transport == nil {
		transport := http.DefaultTransport.(*http.Transport).Clone()
		transport.DialContext = (&net.Dialer{Timeout: dialTimeout}).DialContext
		o.Transport = transport
	}
	return &Client{
		options: o, endpoint: base.String(), vocab: vocab, forms: forms, named: o.Model != "",
		http: &http.Client{
			Transport: o.Transport,
			// A redirected POST becomes a GET, and the key must not go elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// String says what was asked, and how.
func (c *Client) String() string {
	text := c.display()
	if c.options.Model != "" {
		text += ", model " + c.options.Model
	}
	return text + ", " + c.forms[0].String()
}

func (c *Client) display() string {
	u, err := url.Parse(c.endpoint)
	if err != nil {
		return c.endpoint // it was parsed before
	}
	return u.Redacted()
}

// Complete asks for up to n tokens after a prompt, at temperature 0, with their
// log-probabilities. Every error names the server and is one line.
func (c *Client) Complete(ctx context.Context, prompt []int32, n int) (Completion, error) {
	completion, err := c.complete(ctx, prompt, n)
	if err != nil && ctx.Err() == nil {
		return Completion{}, fmt.Errorf("%s: %w", c.display(), err)
	}
	return completion, err
}

func (c *Client) complete(ctx context.Context, prompt []int32, n int) (Completion, error) {
	if len(prompt) == 0 || n < 1 {
		return Completion{}, fmt.Errorf("a prompt of %d tokens and %d tokens after it: there must be one of each at least", len(prompt), n)
	}
	if err := c.settleModel(ctx); err != nil {
		return Completion{}, err
	}
	var before error // why the form before this one was rejected
	for {
		completion, err := c.ask(ctx, c.forms[0], prompt, n, before)
		var rejected *statusError
		if errors.As(err, &rejected) && rejected.isRejection() && len(c.forms) > 1 {
			c.forms, before = c.forms[1:], err
			continue
		}
		return completion, err
	}
}

// request is the body of a question. max_tokens, temperature and logprobs are
// OpenAI's; the others are left out where they are empty.
type request struct {
	Model       string  `json:"model,omitempty"`
	Prompt      any     `json:"prompt"` // []int32 or string
	MaxTokens   int     `json:"max_tokens"`
	Temperature float64 `json:"temperature"`
	LogProbs    int     `json:"logprobs"`
	Stream      bool    `json:"stream"`

	// vLLM: name tokens by "token_id:7", and list the ids of the prompt and of the
	// answer; add no token to a prompt that is text.
	TokensAsIDs      bool  `json:"return_tokens_as_token_ids,omitempty"`
	TokenIDs         bool  `json:"return_token_ids,omitempty"`
	AddSpecialTokens *bool `json:"add_special_tokens,omitempty"`
	// llama.cpp: do not answer from the cache of a prompt before this one.
	CachePrompt *bool `json:"cache_prompt,omitempty"`
}

func (c *Client) ask(ctx context.Context, f form, prompt []int32, n int, before error) (Completion, error) {
	r := request{Model: c.options.Model, Prompt: prompt, MaxTokens: n, LogProbs: topLogProbs}
	if !f.ids {
		text, err := c.text(prompt)
		if err != nil && before != nil {
			return Completion{}, fmt.Errorf("%w; the prompt can't be put as text instead: %w", before, err)
		}
		if err != nil {
			return Completion{}, fmt.Errorf("the server takes no token ids: %w", err)
		}
		r.Prompt = text
	}
	if f.dialects {
		no := false
		r.TokensAsIDs, r.TokenIDs, r.AddSpecialTokens, r.CachePrompt = true, true, &no, &no
	}
	body, err := json.Marshal(r)
	if err != nil {
		return Completion{}, err
	}
	text, err := c.do(ctx, http.MethodPost, c.endpoint, body)
	if err != nil {
		return Completion{}, err
	}
	return c.read(text, prompt, n)
}

// text is a prompt for a server that has a tokenizer of its own. It must come back
// as the same tokens.
func (c *Client) text(prompt []int32) (string, error) {
	if c.vocab != tokenizer.VocabSize {
		return "", fmt.Errorf("a vocabulary of %d has no text", c.vocab)
	}
	text, err := tokenizer.Decode(prompt)
	if err != nil {
		return "", err
	}
	again, err := tokenizer.EncodeSpecial(string(text))
	if err != nil || !slices.Equal(again, prompt) {
		return "", fmt.Errorf("%q stands for other tokens than the prompt's", shortened(string(text)))
	}
	return string(text), nil
}

// settleModel finds out what the server calls its model, if the user does not
// say. Some need no name, some list what they have, some do neither.
func (c *Client) settleModel(ctx context.Context) error {
	if c.named {
		return nil
	}
	text, err := c.do(ctx, http.MethodGet, strings.TrimSuffix(c.endpoint, "completions")+"models", nil)
	var refused *statusError
	if errors.As(err, &refused) && refused.status != http.StatusUnauthorized && refused.status != http.StatusForbidden {
		c.named = true
		return nil
	}
	if err != nil {
		return err
	}
	var listed struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	if err := json.Unmarshal(text, &listed); err != nil || len(listed.Data) == 0 {
		c.named = true
		return nil
	}
	if len(listed.Data) > 1 {
		names := make([]string, 0, len(listed.Data))
		for _, m := range listed.Data {
			names = append(names, m.ID)
		}
		return fmt.Errorf("serves several models: choose one of %s", shortened(strings.Join(names, ", ")))
	}
	c.options.Model, c.named = listed.Data[0].ID, true
	return nil
}

// do sends one request and returns the body of a good answer: JSON, or what claims
// to be.
func (c *Client) do(ctx context.Context, method, address string, body []byte) ([]byte, error) {
	limited, cancel := context.WithTimeout(ctx, c.options.Timeout)
	defer cancel()
	r, err := http.NewRequestWithContext(limited, method, address, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json")
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if c.options.APIKey != "" {
		r.Header.Set("Authorization", "Bearer "+c.options.APIKey)
	}
	answer, err := c.http.Do(r)
	if err != nil {
		return nil, c.failure(ctx, limited, err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		// What it says helps, but is not needed.
		text, _ := io.ReadAll(io.LimitReader(answer.Body, answerLimit))
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, newStatusError(answer, text)
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, answerLimit+1))
	switch kind, _, _ := mime.ParseMediaType(answer.Header.Get("Content-Type")); {
	case err != nil:
		return nil, c.failure(ctx, limited, err)
	case len(text) > answerLimit:
		return nil, fmt.Errorf("the answer is longer than %d MB", answerLimit>>20)
	case kind == "text/html":
		return nil, fmt.Errorf("answers with a web page instead of JSON: %q", shortened(string(text)))
	case kind == "text/event-stream", bytes.HasPrefix(text, []byte("data:")):
		return nil, errors.New("answers with a stream of events, though it was told not to")
	}
	return text, nil
}

// failure says in few words why there was no answer.
func (c *Client) failure(ctx, limited context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if limited.Err() != nil {
		return fmt.Errorf("no answer within %v", c.options.Timeout)
	}
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err // without the address again
	}
	return err
}

// statusError is an answer with another status than 200.
type statusError struct {
	status int
	says   string
}

func newStatusError(answer *http.Response, text []byte) *statusError {
	e := &statusError{status: answer.StatusCode, says: messageOf(text)}
	if to := answer.Header.Get("Location"); to != "" {
		e.says = "it wants to be asked at " + shortened(to)
	}
	return e
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("HTTP %d %s", e.status, http.StatusText(e.status))
	if e.says != "" {
		text += ": " + e.says
	}
	switch e.status {
	case http.StatusUnauthorized, http.StatusForbidden:
		text += " (is the API key right?)"
	case http.StatusNotFound:
		text += " (is that the address and the model's name?)"
	}
	return text
}

// isRejection reports whether the server did not like the form of the question.
func (e *statusError) isRejection() bool {
	return e.status == http.StatusBadRequest || e.status == http.StatusUnprocessableEntity
}

// messageOf digs a server's words out of its error: {"error": {"message": …}} at
// OpenAI, vLLM and llama.cpp, {"error": …} at others, {"detail": …} at FastAPI.
func messageOf(text []byte) string {
	var body struct {
		Error   json.RawMessage `json:"error"`
		Message string          `json:"message"`
		Detail  json.RawMessage `json:"detail"`
	}
	if json.Unmarshal(text, &body) != nil {
		return shortened(string(text))
	}
	for _, raw := range []json.RawMessage{body.Error, body.Detail} {
		var inner struct {
			Message string `json:"message"`
		}
		var plain string
		switch {
		case json.Unmarshal(raw, &inner) == nil && inner.Message != "":
			return shortened(inner.Message)
		case json.Unmarshal(raw, &plain) == nil && plain != "":
			return shortened(plain)
		case len(raw) > 0 && string(raw) != "null":
			return shortened(string(raw))
		}
	}
	return shortened(body.Message)
}

// shortened makes one short line of a server's words, with nothing in it that a
// terminal would obey.
func shortened(text string) string {
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text[:min(len(text), 4*quotedLimit)], "?")), " ")
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
	if len(text) > quotedLimit {
		text = strings.ToValidUTF8(text[:quotedLimit], "") + " …"
	}
	return text
}

// finite reports whether a number can be a log-probability.
func finite(x *float64) bool { return x != nil && !math.IsNaN(*x) && !math.IsInf(*x, 0) }
