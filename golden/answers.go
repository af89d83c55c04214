package golden

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gptoss-conformance/gptoss/fixtures"
)

// Answer is what torch says to one question of a trained fixture.
type Answer struct {
	Name    string    `json:"name"`
	Prompt  []int32   `json:"prompt"`  // as OpenAI's harmony tokenizes and renders it
	Tokens  []int32   `json:"tokens"`  // greedy, in float32, <|return|> included
	Margins []float64 `json:"margins"` // logit of each token over the second most likely one's
	Right   bool      `json:"right"`   // the text is the one that questions.json has
	// What the other runs say, where it differs; nil: the same.
	BFloat16     []int32 `json:"torch bfloat16"`
	Transformers []int32 `json:"transformers float32"` // decoded with its KV cache
}

// Answers returns the goldens of a trained fixture (capitals or canary), in the
// order of its questions. Answers that were made from other weights are an error.
func Answers(fixture string) ([]Answer, error) {
	path := filepath.Join(root(), "answers", fixture+".json")
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, missing(err)
	}
	var file struct {
		About struct {
			SHA256 string `json:"sha256"`
		} `json:"about"`
		Cases []Answer `json:"cases"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	weights, err := os.ReadFile(filepath.Join(fixtures.Dir(fixture), fixtures.WeightsFile))
	if err != nil {
		return nil, err
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(weights)); got != file.About.SHA256 {
		return nil, fmt.Errorf("%s: made from weights with sha256 %s, and the fixture's is %s: `make golden-answers` makes it again", path, file.About.SHA256, got)
	}
	if len(file.Cases) == 0 {
		return nil, fmt.Errorf("%s: no cases", path)
	}
	var problems []error
	for _, a := range file.Cases {
		if len(a.Prompt) == 0 || len(a.Tokens) == 0 || len(a.Tokens) != len(a.Margins) {
			problems = append(problems, fmt.Errorf("%s: case %q has %d prompt tokens, %d tokens and %d margins", path, a.Name, len(a.Prompt), len(a.Tokens), len(a.Margins)))
		}
	}
	return file.Cases, errors.Join(problems...)
}
