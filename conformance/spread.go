package conformance

import (
	"context"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Where several stages stand between two taps no bound is derived: the spread of
// the reference's own rounding-perturbed runs around the float64 truth is the
// yardstick. A perturbed run sums in another order, rounds at torch's points to
// a randomly chosen neighbour instead of the nearest (Monte Carlo arithmetic,
// Parker 1997), and, like every real implementation, has its RoPE tables from
// float32 angles.

// defaultSamples is the number of perturbed runs. The largest of n samples of
// an error falls short of a further one's in a share 1/(n+1) of cases, and then
// by little; the factor on the spread is calibrated with this number.
const defaultSamples = 6

// source gives taps of one run, widened.
type source struct {
	real    func(full string) []float64
	indices func(layer int) []int32
}

// sample returns the taps of a perturbed run that starts from what is known of
// a subject (nil: from the tokens), in the subject's arithmetic.
//
// The model is the right one, with the faults of a hypothesis applied if there
// are any.
func sample(ctx context.Context, weights *checkpoint.Model, tokens []int32, o *observed, from *observed, seed int, hypothetical ...faults.Fault) source {
	if o.precision == reference.Float32 {
		m := perturbedModel(weights, reference.Single(), kernel.Float32, seed)
		for _, f := range hypothetical {
			m = faults.Apply(f, m)
		}
		return sourceOf(jittered(newEvaluation(ctx, &m, tokens), from, seed))
	}
	m := perturbedModel(weights, reference.Exact(), o.precision.Format(), seed)
	for _, f := range hypothetical {
		m = faults.Apply(f, m)
	}
	return sourceOf(jittered(newEvaluation(ctx, &m, tokens), from, seed))
}

// isWide tells models of real size from small ones, which can be run a hundred
// times: by their embedding, from 2^24 elements on (vocabulary 201,088 has that
// from width 84 on).
func isWide(c config.Config) bool { return c.VocabSize*c.HiddenSize >= 1<<24 }

func perturbedModel[F reference.Float](weights *checkpoint.Model, a reference.Arithmetic[F], format kernel.Format, seed int) reference.Model[F] {
	// Where activations are rounded to 16 bits, the order of sums makes no
	// difference to speak of; and at full width the vector kernels' own order has
	// to do, since the others take minutes.
	orders := []kernel.Dot[F]{kernel.Sequential[F], kernel.Pairwise[F], kernel.Backward[F], kernel.Lanes[F]}
	if format == kernel.Float32 && !isWide(weights.Config) {
		a.Dot = orders[seed%len(orders)]
	}
	a.Round = perturbedRound[F](format, seed)
	m := reference.New(weights, a)
	if format.Digits <= kernel.Float32.Digits {
		m.Stages.RopeQuery = func(l reference.Layer[F], q []F, positions []int) []F {
			return reference.Rotate(l.Arithmetic, q, l.Config.Heads, perturbedTable(l, positions, seed))
		}
		m.Stages.RopeKey = func(l reference.Layer[F], k []F, positions []int) []F {
			return reference.Rotate(l.Arithmetic, k, l.Config.KVHeads, perturbedTable(l, positions, seed))
		}
	}
	return m
}

// perturbedRound rounds to a random neighbour in a format. The chance is drawn
// from the value itself, so that a run does not depend on the order in which
// cores get to it.
func perturbedRound[F reference.Float](format kernel.Format, seed int) func([]F) {
	if format.Digits >= kernel.Float32.Digits { // F itself: move by up to one unit roundoff
		u := F(format.UnitRoundoff())
		return func(x []F) {
			for i, v := range x {
				x[i] = v + v*u*F(2*chance(float64(v), seed)-1)
			}
		}
	}
	return func(x []F) {
		for i, v := range x {
			x[i] = F(format.Stochastic(float64(v), chance(float64(v), seed)))
		}
	}
}

// chance is a number in [0, 1) that depends on a value and a seed only
// (SplitMix64's finalizer over the value's bits).
func chance(v float64, seed int) float64 {
	z := math.Float64bits(v) + uint64(seed+1)*0x9E3779B97F4A7C15
	z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
	z = (z ^ z>>27) * 0x94D049BB133111EB
	return float64((z^z>>31)>>11) / (1 << 53)
}

// perturbedTable is a layer's table from perturbed frequencies and float32 angles.
func perturbedTable[F reference.Float](l reference.Layer[F], positions []int, seed int) reference.RotaryTable[F] {
	return reference.Rounded(l.Arithmetic, singleTable(singleRotary(l.Stages.Frequencies(l.Config), seed), positions))
}

// singleRotary rounds the frequencies to float32 and moves them by up to two
// units, as different powers and divisions do.
func singleRotary(r reference.Rotary, seed int) reference.Rotary {
	moved := slices.Clone(r.InverseFrequencies)
	for i, f := range moved {
		moved[i] = float64(float32(f * (1 + 4*kernel.Float32.UnitRoundoff()*(chance(f, seed)-0.5))))
	}
	return reference.Rotary{InverseFrequencies: moved, Concentration: float64(float32(r.Concentration))}
}

// singleTable evaluates cosines and sines at angles rounded to float32.
func singleTable(r reference.Rotary, positions []int) reference.RotaryTable[float64] {
	half := len(r.InverseFrequencies)
	t := reference.RotaryTable[float64]{Half: half}
	for _, p := range positions {
		for _, f := range r.InverseFrequencies {
			sin, cos := math.Sincos(float64(float32(float64(p) * f)))
			t.Cos = append(t.Cos, cos*r.Concentration)
			t.Sin = append(t.Sin, sin*r.Concentration)
		}
	}
	return t
}

// jittered starts an evaluation from a subject's taps. Those stored more
// coarsely than computed are moved within their storage roundoff: the next stage
// read something that near.
func jittered[F reference.Float](e *evaluation[F], from *observed, seed int) *evaluation[F] {
	if from == nil {
		return e
	}
	known(e, from)
	for name, format := range from.coarse {
		values := slices.Clone(e.reals[name])
		e.reals[name] = values
		for i, v := range values {
			values[i] = v + F(storing(format, float64(v))*(2*chance(float64(v)+float64(i), seed)-1))
		}
	}
	return e
}

func sourceOf[F reference.Float](e *evaluation[F]) source {
	return source{
		real: func(full string) []float64 {
			var value []F
			if _, isKnown := e.reals[full]; isKnown { // the subject's own value: compute what it should have been
				value = e.compute(full)
			} else {
				value = e.real(full)
			}
			wide := make([]float64, len(value))
			for i, v := range value {
				wide[i] = float64(v)
			}
			return wide
		},
		indices: e.indices,
	}
}

// spread is how far perturbed runs come from the truth, row by row (a row is a
// token), and what that looks like over all rows.
type spread struct {
	rms, max  []float64 // per row, the largest over all runs
	quantiles []float64 // of the rows' rms, the largest over all runs
}

// quantilePoints are where the distribution of row errors is compared when rows
// cannot be compared one by one.
var quantilePoints = []float64{0.25, 0.5, 0.75, 0.9}

// spreadsOf measures some taps over all perturbed runs, one run at a time.
// visit sees every run after it was measured; it may be nil.
func spreadsOf(ctx context.Context, weights *checkpoint.Model, tokens []int32, o, from *observed, samples int, want map[string][]float64, visit func(s source)) (map[string]spread, error) {
	result := make(map[string]spread, len(want))
	for seed := range samples {
		run := sample(ctx, weights, tokens, o, from, seed)
		for _, name := range orderedTaps(weights, want) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			result[name] = result[name].including(rowErrorsOf(run.real(name), want[name], len(tokens)))
		}
		if visit != nil {
			visit(run)
		}
	}
	return result, ctx.Err()
}

func orderedTaps(weights *checkpoint.Model, want map[string][]float64) []string {
	var names []string
	for _, name := range taps.All(weights.Config) {
		if _, ok := want[name]; ok {
			names = append(names, name)
		}
	}
	return names
}

func (s spread) including(e rowErrors) spread {
	return spread{
		rms:       largest(s.rms, e.rms),
		max:       largest(s.max, e.max),
		quantiles: largest(s.quantiles, quantiles(e.rms, quantilePoints)),
	}
}

func largest(a, b []float64) []float64 {
	if a == nil {
		return slices.Clone(b)
	}
	for i := range a {
		a[i] = max(a[i], b[i])
	}
	return a
}

// quantiles returns the values of x at some points between 0 and 1.
func quantiles(x, points []float64) []float64 {
	sorted := slices.Sorted(slices.Values(x))
	out := make([]float64, len(points))
	for i, p := range points {
		out[i] = sorted[int(p*float64(len(sorted)-1)+0.5)]
	}
	return out
}

// median of x, 0 if there is none.
func median(x []float64) float64 {
	if len(x) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(x))[len(x)/2]
}
