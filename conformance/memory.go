package conformance

import (
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"sync"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Memory keeps what judging one subject after another on the same prompts of the
// same checkpoints has in common: decoded weights, the float64 truth, and the
// spread of perturbed runs. It changes no verdict, only the time to it.
//
// A Memory is safe for concurrent use; a nil one remembers nothing. It holds on
// to everything, so it is for small models.
type Memory struct {
	mutex  sync.Mutex
	dense  map[*checkpoint.Model]*remembered[*checkpoint.Model]
	truths map[promptKey]*remembered[*evaluation[float64]]
	spread map[spreadKey]*remembered[measured]
}

type promptKey struct {
	model  *checkpoint.Model
	tokens string
}

// spreadKey has everything that perturbed runs depend on.
type spreadKey struct {
	promptKey
	precision reference.Precision
	samples   int
	routing   uint64 // a hash of the experts that were forced
	names     string
	logits    bool
}

// measured is what perturbed runs gave.
type measured struct {
	spreads map[string]spread
	logits  [][]float64 // of each run, if the subject's logits are weighed
}

// remembered is a value that is computed once. A computation that fails is
// tried again by whoever asks next.
type remembered[T any] struct {
	mutex sync.Mutex
	done  bool
	value T
}

func (r *remembered[T]) get(compute func() (T, error)) (T, error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.done {
		return r.value, nil
	}
	value, err := compute()
	if err == nil {
		r.value, r.done = value, true
	}
	return value, err
}

// entry finds or makes the place for a value.
func entry[K comparable, T any](mutex *sync.Mutex, places *map[K]*remembered[T], key K) *remembered[T] {
	mutex.Lock()
	defer mutex.Unlock()
	if *places == nil {
		*places = map[K]*remembered[T]{}
	}
	place := (*places)[key]
	if place == nil {
		place = new(remembered[T])
		(*places)[key] = place
	}
	return place
}

// densified returns a model with its weights decoded.
func (m *Memory) densified(weights *checkpoint.Model) *checkpoint.Model {
	if m == nil {
		return weights.Densify(densifyBelow)
	}
	dense, _ := entry(&m.mutex, &m.dense, weights).get(func() (*checkpoint.Model, error) {
		return weights.Densify(densifyBelow), nil
	})
	return dense
}

// free returns the evaluation of a model from the tokens alone.
func (m *Memory) free(ctx context.Context, model *reference.Model[float64], tokens []int32) *evaluation[float64] {
	if m == nil {
		return newEvaluation(ctx, model, tokens)
	}
	key := promptKey{model.Weights, fmt.Sprint(tokens)}
	whole, err := entry(&m.mutex, &m.truths, key).get(func() (*evaluation[float64], error) {
		e := newEvaluation(ctx, model, tokens)
		for _, name := range taps.All(model.Weights.Config) {
			if layer, _ := taps.Split(name); taps.Integer(name) {
				e.indices(layer)
			} else {
				e.real(name)
			}
			if err := ctx.Err(); err != nil {
				return nil, err
			}
		}
		return e, nil
	})
	e := newEvaluation(ctx, model, tokens)
	if err == nil { // else the context is done, and so is the caller
		e.reals, e.integers = maps.Clone(whole.reals), maps.Clone(whole.integers)
	}
	return e
}

// spreads returns what compute measures, which depends on the key alone.
func (m *Memory) spreads(key spreadKey, compute func() (measured, error)) (measured, error) {
	if m == nil {
		return compute()
	}
	kept, err := entry(&m.mutex, &m.spread, key).get(compute)
	if err != nil {
		return kept, err
	}
	own := measured{spreads: make(map[string]spread, len(kept.spreads)), logits: kept.logits}
	for name, s := range kept.spreads { // the caller may widen its own
		own.spreads[name] = spread{rms: slices.Clone(s.rms), max: slices.Clone(s.max), quantiles: slices.Clone(s.quantiles)}
	}
	return own, nil
}

// freeSpreads measures perturbed runs from the tokens, with the subject's experts
// forced where it tapped all of them.
func (j *judging) freeSpreads(replayed *observed, want map[string][]float64) (measured, error) {
	names := orderedTaps(j.model.Weights, want)
	key := spreadKey{
		promptKey: promptKey{j.model.Weights, fmt.Sprint(j.tokens)},
		precision: j.subject.precision, samples: j.options.Samples,
		routing: hashRouting(replayed), names: fmt.Sprint(names), logits: j.weighs(),
	}
	return j.options.Memory.spreads(key, func() (measured, error) {
		var m measured
		var err error
		m.spreads, err = spreadsOf(j.ctx, j.model.Weights, j.tokens, j.subject, replayed, j.options.Samples, want, func(s source) {
			if key.logits { // only weighing hypotheses takes them, and they are large
				m.logits = append(m.logits, s.real(taps.Logits))
			}
		})
		return m, err
	})
}

func hashRouting(replayed *observed) uint64 {
	hash := fnv.New64a()
	for _, name := range slices.Sorted(maps.Keys(replayed.integers)) {
		fmt.Fprintln(hash, name, replayed.integers[name])
	}
	return hash.Sum64()
}
