package main

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
)

// sampler chooses the next token. The same seed and logits give the same
// tokens, on every machine.
type sampler struct {
	temperature, topP float64
	random            *rand.Rand
}

func newSampler(temperature, topP float64, seed uint64) *sampler {
	return &sampler{temperature, topP, rand.New(rand.NewPCG(seed, 0))}
}

// candidate is a token with its probability, up to a common factor.
type candidate struct {
	id     int32
	weight float64
}

// pick returns a token. Ids beyond the tokenizer's, which a padded vocabulary
// has, are never chosen; of equal logits the lowest id is. A logit that is not
// a number is an error: the model's arithmetic broke.
func (s *sampler) pick(logits []float32) (int32, error) {
	logits = logits[:min(len(logits), tokenizer.VocabSize)]
	best := 0
	for i, v := range logits {
		if v != v || math.IsInf(float64(v), 1) {
			return 0, fmt.Errorf("the logit of id %d is %v", i, v)
		}
		if v > logits[best] {
			best = i
		}
	}
	if s.temperature == 0 {
		return int32(best), nil
	}
	top := float64(logits[best])
	candidates := make([]candidate, 0, len(logits))
	var total float64
	for i, v := range logits {
		if w := math.Exp((float64(v) - top) / s.temperature); w > 0 {
			candidates = append(candidates, candidate{int32(i), w})
			total += w
		}
	}
	// The sort is by weight and then by id, so that it has one result only.
	slices.SortFunc(candidates, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(b.weight, a.weight), cmp.Compare(a.id, b.id))
	})
	if s.topP < 1 {
		var kept float64
		for i, c := range candidates {
			kept += c.weight
			if kept >= s.topP*total {
				candidates, total = candidates[:i+1], kept
				break
			}
		}
	}
	left := s.random.Float64() * total
	for _, c := range candidates {
		left -= c.weight
		if left < 0 {
			return c.id, nil
		}
	}
	return candidates[len(candidates)-1].id, nil
}
