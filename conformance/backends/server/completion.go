package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
)

// Completion is what a server generated after a prompt.
type Completion struct {
	Tokens   []int32
	LogProbs []float64           // of each token
	Top      []map[int32]float64 // of the likeliest tokens in each one's place; nil where they are not listed or not understood
	Text     string
}

// answer is the part of a completion that is read.
type answer struct {
	Error   json.RawMessage `json:"error"`
	Choices []choice        `json:"choices"`
	Usage   struct {
		PromptTokens *int `json:"prompt_tokens"`
	} `json:"usage"`
}

type choice struct {
	Text           string    `json:"text"`
	FinishReason   string    `json:"finish_reason"`
	LogProbs       *logProbs `json:"logprobs"`
	TokenIDs       []int32   `json:"token_ids"`        // vLLM
	PromptTokenIDs []int32   `json:"prompt_token_ids"` // vLLM
}

// logProbs has OpenAI's form for completions, or its form for chats, which
// llama.cpp uses for both and adds ids to.
type logProbs struct {
	Tokens        []string              `json:"tokens"`
	TokenLogProbs []*float64            `json:"token_logprobs"`
	TopLogProbs   []map[string]*float64 `json:"top_logprobs"`

	Content []entry `json:"content"`
}

type entry struct {
	ID      *int32   `json:"id"`
	Token   string   `json:"token"`
	Bytes   []int    `json:"bytes"` // a []byte would be base64
	LogProb *float64 `json:"logprob"`
	Top     []entry  `json:"top_logprobs"`
}

// stopReasons are those for which an answer may be shorter than what was asked for.
var stopReasons = []string{"stop", "eos", "eos_token"}

// read understands an answer in any dialect.
func (c *Client) read(text []byte, prompt []int32, n int) (Completion, error) {
	var a answer
	if err := json.Unmarshal(text, &a); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			at := max(0, min(len(text), int(syntax.Offset))-20)
			return Completion{}, fmt.Errorf("the answer is no JSON (%w), at %q", err, shortened(string(text[at:])))
		}
		return Completion{}, fmt.Errorf("the answer is not of OpenAI's form: %s", shortened(err.Error()))
	}
	if len(a.Error) > 0 && string(a.Error) != "null" {
		return Completion{}, fmt.Errorf("answers with an error: %s", messageOf(text))
	}
	if len(a.Choices) != 1 {
		return Completion{}, fmt.Errorf("the answer has %d choices, want one", len(a.Choices))
	}
	got := a.Choices[0]
	if err := checkPrompt(a, prompt); err != nil {
		return Completion{}, err
	}
	if got.LogProbs == nil || len(got.LogProbs.Tokens) == 0 && len(got.LogProbs.Content) == 0 && got.Text != "" {
		return Completion{}, fmt.Errorf("gives no log-probabilities, by which it could be judged; it said %q", shortened(got.Text))
	}
	list, err := got.LogProbs.entries()
	if err != nil {
		return Completion{}, err
	}
	if len(got.TokenIDs) > 0 && len(got.TokenIDs) != len(list) {
		return Completion{}, fmt.Errorf("the answer has %d token ids and %d log-probabilities", len(got.TokenIDs), len(list))
	}
	completion := Completion{Text: got.Text}
	for i, e := range list {
		if len(got.TokenIDs) > 0 {
			e.ID = &got.TokenIDs[i]
		}
		id, err := c.id(e)
		if err != nil {
			return Completion{}, fmt.Errorf("generated token %d: %w", i, err)
		}
		if !finite(e.LogProb) {
			return Completion{}, fmt.Errorf("the log-probability of generated token %d is null, which stands for NaN or infinity", i)
		}
		completion.Tokens = append(completion.Tokens, id)
		completion.LogProbs = append(completion.LogProbs, *e.LogProb)
		completion.Top = append(completion.Top, c.top(e))
	}
	switch {
	case len(list) > n:
		return Completion{}, fmt.Errorf("generated %d tokens, %d were asked for", len(list), n)
	case len(list) == 0:
		return Completion{}, fmt.Errorf("generated no token that it gives a log-probability for (finish_reason %q)", shortened(got.FinishReason))
	case len(list) < n && !slices.Contains(stopReasons, got.FinishReason):
		return Completion{}, fmt.Errorf("generated %d tokens of the %d asked for, and not because the model stopped (finish_reason %q)", len(list), n, shortened(got.FinishReason))
	}
	return completion, nil
}

// checkPrompt makes sure that the server ran the prompt that it was given, and
// added no token of its own to it.
func checkPrompt(a answer, prompt []int32) error {
	if ids := a.Choices[0].PromptTokenIDs; ids != nil && !slices.Equal(ids, prompt) {
		return fmt.Errorf("ran other tokens than the prompt's %d: %.80s", len(prompt), fmt.Sprint(ids))
	}
	if n := a.Usage.PromptTokens; n != nil && *n != len(prompt) {
		return fmt.Errorf("made %d tokens of a prompt of %d: it adds some of its own, or has another tokenizer", *n, len(prompt))
	}
	return nil
}

// entries brings both forms to one.
func (l logProbs) entries() ([]entry, error) {
	if len(l.Content) > 0 {
		return l.Content, nil
	}
	if len(l.Tokens) != len(l.TokenLogProbs) {
		return nil, fmt.Errorf("the answer has %d tokens and %d log-probabilities", len(l.Tokens), len(l.TokenLogProbs))
	}
	list := make([]entry, len(l.Tokens))
	for i, token := range l.Tokens {
		list[i] = entry{Token: token, LogProb: l.TokenLogProbs[i]}
		if i < len(l.TopLogProbs) {
			for other, p := range l.TopLogProbs[i] {
				list[i].Top = append(list[i].Top, entry{Token: other, LogProb: p})
			}
		}
	}
	return list, nil
}

// top lists the likeliest tokens in a token's place; nil if any of them can't be
// understood, such as a part of a character that is named by its text. Those left
// over would look like a list that leaves likelier tokens out.
func (c *Client) top(e entry) map[int32]float64 {
	if len(e.Top) == 0 {
		return nil
	}
	list := make(map[int32]float64, len(e.Top))
	for _, other := range e.Top {
		id, err := c.id(other)
		if err != nil || !finite(other.LogProb) {
			return nil
		}
		list[id] = *other.LogProb
	}
	return list
}

// tokenIDPrefix is how vLLM writes ids in place of text.
const tokenIDPrefix = "token_id:"

// id finds out which token is meant: by its id, its bytes, or its text.
func (c *Client) id(e entry) (int32, error) {
	id := int64(-1)
	if e.ID != nil {
		id = int64(*e.ID)
	} else if digits, ok := strings.CutPrefix(e.Token, tokenIDPrefix); ok {
		var err error
		if id, err = strconv.ParseInt(digits, 10, 32); err != nil {
			return 0, fmt.Errorf("%q has no id in it", shortened(e.Token))
		}
	} else {
		return c.idOfText(e)
	}
	if id < 0 || id >= int64(c.vocab) {
		return 0, fmt.Errorf("id %d is outside the checkpoint's vocabulary of %d", id, c.vocab)
	}
	return int32(id), nil
}

func (c *Client) idOfText(e entry) (int32, error) {
	if c.vocab != tokenizer.VocabSize {
		return 0, fmt.Errorf("the server names it %q and gives no id, and a vocabulary of %d has no text", shortened(e.Token), c.vocab)
	}
	text := e.Token
	if len(e.Bytes) == 0 && strings.ContainsRune(text, utf8.RuneError) {
		// The vocabulary has that character, but far more tokens that are parts of one.
		return 0, fmt.Errorf("the server names it %q, which stands for any part of a character, and gives no id", shortened(text))
	}
	if len(e.Bytes) > 0 {
		raw := make([]byte, len(e.Bytes))
		for i, b := range e.Bytes {
			if b < 0 || b > 0xff {
				return 0, fmt.Errorf("%d is no byte of a token", b)
			}
			raw[i] = byte(b)
		}
		text = string(raw)
	}
	ids, err := vocabulary()
	if err != nil {
		return 0, err
	}
	id, ok := ids[text]
	if !ok {
		return 0, fmt.Errorf("the server names it %q and gives no id, and no token has that text", shortened(text))
	}
	return id, nil
}

// vocabulary maps the bytes of every token to its id. No two are the same.
var vocabulary = sync.OnceValues(func() (map[string]int32, error) {
	ids := make(map[string]int32, tokenizer.VocabSize)
	for id := range int32(tokenizer.VocabSize) {
		text, err := tokenizer.Decode([]int32{id})
		if err != nil {
			return nil, err
		}
		ids[string(text)] = id
	}
	return ids, nil
})
