package server

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// trained are the fixtures that are asked questions, with the questions. canary
// has one; of capitals', these are of every kind: in words and as JSON, plain and
// in a chat, which is far longer than the window, and repeating what stands beyond
// it.
var trained = map[string][]string{
	"canary":   {"self-test"},
	"capitals": {"plain France", "plain json France", "chat json France", "repeat bottle silver 25", "repeat tunnel rabbit 24"},
}

// finalNorm is a tensor that tells the trained fixtures apart: small, and stored
// as it is.
const finalNorm = "norm.scale"

// Prompts chooses what a checkpoint is asked, so that window, sinks and clamps
// count. The fixtures have prompts of their own; for any other checkpoint they are
// drawn: two sequences of window + 8 tokens.
func Prompts(m *checkpoint.Model) ([]fixtures.Prompt, error) {
	name, err := fixtureOf(m)
	if err != nil {
		return nil, err
	}
	if names, ok := trained[name]; ok {
		return questions(name, names)
	}
	if name != "" {
		return fixtures.Prompts(name)
	}
	return drawn(m.Config), nil
}

// fixtureOf finds the fixture that a checkpoint is, in any layout; "" if it is none.
func fixtureOf(m *checkpoint.Model) (string, error) {
	for _, name := range append(fixtures.Names(), "canary", "capitals") {
		c, err := config.Read(filepath.Join(fixtures.Dir(name), fixtures.ConfigFile))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the program has left the repository, which has the fixtures
		}
		if err != nil {
			return "", err
		}
		if c.VocabSize != m.Config.VocabSize || c.HiddenSize != m.Config.HiddenSize || c.Layers != m.Config.Layers {
			continue
		}
		path := filepath.Join(fixtures.Dir(name), fixtures.WeightsFile)
		f, err := tensor.OpenSafetensors(path)
		if err != nil {
			return "", err
		}
		norm, ok := f.Tensor(finalNorm)
		if !ok {
			f.Close()
			return "", fmt.Errorf("%s has no tensor %s", path, finalNorm)
		}
		values, err := norm.Float64s()
		f.Close()
		if err != nil {
			return "", fmt.Errorf("%s: tensor %s: %w", path, finalNorm, err)
		}
		same := func(a float64, b float32) int { return compare(a, float64(b)) }
		if slices.CompareFunc(values, m.FinalNorm, same) == 0 {
			return name, nil
		}
	}
	return "", nil
}

func compare(a, b float64) int {
	if a == b {
		return 0
	}
	return 1
}

func questions(fixture string, names []string) ([]fixtures.Prompt, error) {
	all, err := fixtures.Questions(fixture)
	if err != nil {
		return nil, err
	}
	var prompts []fixtures.Prompt
	for _, name := range names {
		at := slices.IndexFunc(all, func(q fixtures.Question) bool { return q.Name == name })
		if at < 0 {
			return nil, fmt.Errorf("fixture %s has no question %q", fixture, name)
		}
		tokens, _, err := all[at].Tokens()
		if err != nil {
			return nil, err
		}
		prompts = append(prompts, fixtures.Prompt{Name: name, Tokens: tokens})
	}
	return prompts, nil
}

// drawn are random ids, the same on every machine. Special tokens are not among
// them: some servers have ideas of their own about those.
func drawn(c config.Config) []fixtures.Prompt {
	var prompts []fixtures.Prompt
	for _, name := range []string{"drawn", "drawn too"} {
		g := fixtures.NewCounter(1, name)
		tokens := make([]int32, c.SlidingWindow+8)
		for i := range tokens {
			tokens[i] = int32(g.Word(uint64(i)) >> 32 % uint64(min(c.VocabSize, int(tokenizer.StartOfText))))
		}
		prompts = append(prompts, fixtures.Prompt{Name: name, Tokens: tokens})
	}
	return prompts
}
