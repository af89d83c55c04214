package conformance

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

func boundQ(b bounding, want []float64) []float64 {
	return boundProjection(b, 0, b.truth.model.Weights.Config.QueryWidth(), want)
}

func boundK(b bounding, want []float64) []float64 {
	c := b.truth.model.Weights.Config
	return boundProjection(b, c.QueryWidth(), c.KVWidth(), want)
}

func boundV(b bounding, want []float64) []float64 {
	c := b.truth.model.Weights.Config
	return boundProjection(b, c.QueryWidth()+c.KVWidth(), c.KVWidth(), want)
}

// boundProjection bounds rows [from, from+n) of the fused projection. The
// product and its sum with the bias may be stored apart: two roundings, the
// first of the product, whose size is at most |y| + |bias|.
func boundProjection(b bounding, from, n int, want []float64) []float64 {
	w := b.weights()
	bias := w.QKVBias[from : from+n]
	bound := b.linear(b.at(taps.AttnNormed), rowRange{w.QKV, from, n}, bias)
	for i := range bound {
		bound[i] += b.store * (math.Abs(want[i]) + math.Abs(float64(bias[i%n])))
	}
	return b.stored(bound, want, 1)
}

// rowRange is some rows of a matrix.
type rowRange struct {
	checkpoint.Matrix
	from, n int
}

// Dims returns the rows in the range and the columns.
func (r rowRange) Dims() (int, int) {
	_, cols := r.Matrix.Dims()
	return r.n, cols
}

// Rows decodes rows of the range.
func (r rowRange) Rows(dst []float32, from, n int) { r.Matrix.Rows(dst, r.from+from, n) }

// boundAttnCore bounds o = Σ p_i·v_i, with p the softmax of the scores s_i and
// the sink.
//
// A score is a sum of d products (accumulation(d) of the magnitudes), stored
// before and after it is scaled, or with the query scaled beforehand (d
// independent roundings); then the maximum is subtracted, and in 16-bit
// engines the difference is stored once more. So |δs_i| ≤ scale·(accumulation(d)·|q|·|k|
// + store·λ·‖q∘k‖) + 2·store·|s_i| + store·|s_i − max|. The sink has only the last
// term. To first order a change of one score moves the result by p_i·(v_i −
// o)·δs_i, and a change of the sink's by p_sink·o·δs; the scores' errors are
// independent of each other. Large errors (|s| = 30 in bfloat16) leave the first
// order: a probability then grows by up to e^δs − 1 of itself, and the sum by the
// mean of that.
//
// The exponential is good to 4u, the sum over n keys to accumulation(n), the
// division to u; a probability may be stored (store, and in float16 no better than
// the spacing of its subnormal numbers). The weighted sum adds accumulation(n),
// and the result is stored.
func boundAttnCore(b bounding, want []float64) []float64 {
	c, w := b.truth.model.Weights.Config, b.weights()
	q, k, v := b.at(taps.QRot), b.at(taps.KRot), b.at(taps.V)
	l := b.truth.model.Layer(b.truth.ctx, b.layer)
	stages := &b.truth.model.Stages
	d := c.HeadDim
	scale := math.Abs(stages.Scale(l))
	bound := make([]float64, len(want))
	kernel.Parallel(len(b.truth.tokens)*c.Heads, 16, func(first, last int) {
		if b.truth.ctx.Err() != nil {
			return // a long prompt takes minutes; its bounds are dropped
		}
		n := len(b.truth.tokens)
		p, delta := make([]float64, n), make([]float64, n)
		scores, stored, sizes := make([]independent, d), make([]independent, d), make([]float64, d)
		for row := first; row < last; row++ {
			token, head := row/c.Heads, row%c.Heads
			from, to := stages.KeyRange(l, token)
			from, to = max(from, 0), min(to, n)
			kvHead := stages.KVHead(l, head)
			query := q[row*d:][:d]
			top := float64(w.Sinks[head])
			for i := from; i < to; i++ {
				dot, size, squares := 0.0, 0.0, 0.0
				for j, key := range k[(i*c.KVHeads+kvHead)*d:][:d] {
					product := query[j] * key
					dot += product
					size += math.Abs(product)
					squares += product * product
				}
				p[i] = dot * scale
				top = max(top, p[i])
				delta[i] = scale*(b.accumulation(d)*size+b.store*min(size, lambda*math.Sqrt(squares))) + 2*b.store*math.Abs(p[i])
			}
			sink := math.Exp(float64(w.Sinks[head]) - top)
			sinkError := sink * growth(b.store*(top-float64(w.Sinks[head])))
			sum, meanGrowth := sink, sinkError
			for i := from; i < to; i++ {
				delta[i] = growth(delta[i] + b.store*(top-p[i]))
				p[i] = math.Exp(p[i] - top)
				sum += p[i]
				meanGrowth += p[i] * delta[i]
			}
			beyondFirstOrder := 1 + meanGrowth/sum
			common := 6*b.sum + 2*b.accumulation(to-from+1)
			out := want[row*d:][:d]
			for j, o := range out {
				scores[j] = independent{}
				scores[j].add(sinkError / sum * math.Abs(o))
				stored[j], sizes[j] = independent{}, 0
			}
			for i := from; i < to; i++ {
				probability := p[i] / sum
				rounding := max(b.store*probability, b.tiny)
				for j, value := range v[(i*c.KVHeads+kvHead)*d:][:d] {
					scores[j].add(probability * delta[i] * math.Abs(value-out[j]))
					stored[j].add(rounding * math.Abs(value))
					sizes[j] += probability * math.Abs(value)
				}
			}
			for j := range out {
				bound[row*d+j] = beyondFirstOrder*scores[j].bound() + stored[j].bound() + common*sizes[j]
			}
		}
	})
	return b.stored(bound, want, 1)
}

// growth is e^delta − 1, by how much of itself an exponential grows when its
// argument does; far beyond any use it stays finite, so that a probability of
// zero stays zero.
func growth(delta float64) float64 { return math.Expm1(min(delta, 100)) }

// boundPostAttention bounds the residual sum x + (W·core + bias): the
// projection is stored (once for the product and once with its bias in some
// engines), then the sum.
func boundPostAttention(b bounding, want []float64) []float64 {
	w := b.weights()
	input := b.at(taps.Input)
	bound := b.linear(b.at(taps.AttnCore), w.Out, w.OutBias)
	for i := range bound {
		delta := math.Abs(want[i] - input[i])
		bound[i] += b.store * (2*delta + math.Abs(float64(w.OutBias[i%len(w.OutBias)])))
	}
	return b.stored(bound, want, 1)
}
