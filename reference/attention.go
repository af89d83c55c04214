package reference

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// QKV projects x [tokens, hidden] to queries [tokens, heads, head_dim], keys and
// values [tokens, kv_heads, head_dim] with one fused linear layer whose rows
// are q, then k, then v.
//
// Source: openai/gpt-oss gpt_oss/torch/model.py AttentionBlock.
func QKV[F Float](l Layer[F], x []F) (q, k, v []F) {
	fused := Linear(l, x, l.Weights.QKV, l.Weights.QKVBias)
	width, queries, keys := l.Config.QKVWidth(), l.Config.QueryWidth(), l.Config.KVWidth()
	return columns(fused, width, 0, queries),
		columns(fused, width, queries, keys),
		columns(fused, width, queries+keys, keys)
}

// columns copies columns [from, from+n) of x [tokens, width].
func columns[F Float](x []F, width, from, n int) []F {
	tokens := len(x) / width
	out := make([]F, tokens*n)
	kernel.Parallel(tokens, 64, func(first, last int) {
		for t := first; t < last; t++ {
			copy(out[t*n:][:n], x[t*width+from:])
		}
	})
	return out
}

// AttentionInput is what attention sees: rotated queries of some tokens, and the
// rotated keys and the values of those tokens and, with a cache, of tokens
// before them.
type AttentionInput[F Float] struct {
	Queries      []F // [QueryCount, heads, head_dim]
	Keys, Values []F // [KeyCount, kv_heads, head_dim]
	FirstQuery   int // position of the first query; the others follow it
	QueryCount   int
	FirstKey     int // position of the first key at hand; the others follow it
	KeyCount     int
}

// KeyRange returns the positions [from, to) of the keys that the query at a
// position sees: none after its own, and in a sliding layer none that is window
// or more before it.
func KeyRange[F Float](l Layer[F], query int) (from, to int) {
	if window := l.Config.Window(l.Index); window > 0 {
		from = max(0, query-window+1)
	}
	return from, query + 1
}

// KVHead returns the key and value head that a query head reads: neighbours
// share one (grouped-query attention, https://arxiv.org/abs/2305.13245).
func KVHead[F Float](l Layer[F], head int) int {
	return head / (l.Config.Heads / l.Config.KVHeads)
}

// Scale is the factor on the scores, 1/√head_dim.
func Scale[F Float](l Layer[F]) F { return F(1 / math.Sqrt(float64(l.Config.HeadDim))) }

// Softmax turns a query's scores into probabilities in place. The head's sink
// is one more score: it takes part in the maximum and in the sum, and its own
// probability is dropped, so that the rest add up to less than one.
//
// Source: Xiao et al. 2023, https://arxiv.org/abs/2309.17453, with the sink
// learned instead of a first token; openai/gpt-oss gpt_oss/torch/model.py sdpa.
func Softmax[F Float](l Layer[F], scores []F, sink F) {
	top := sink
	for _, s := range scores {
		top = max(top, s)
	}
	for i := range scores {
		scores[i] -= top
	}
	kernel.Exp(scores)
	sum := F(kernel.Exponential(float64(sink - top)))
	for _, p := range scores {
		sum += p
	}
	for i := range scores {
		scores[i] /= sum
	}
	l.rounded(scores)
}

// Attention computes sinks attention before the output projection: [tokens,
// heads·head_dim].
//
// In a short format torch rounds the scores, the scaled scores, the
// probabilities and the result.
func Attention[F Float](l Layer[F], in AttentionInput[F]) []F {
	d, heads, kvHeads := l.Config.HeadDim, l.Config.Heads, l.Config.KVHeads
	out := make([]F, len(in.Queries))
	scale := l.Stages.Scale(l)
	kernel.Parallel(in.QueryCount*heads, 16, func(first, last int) {
		if l.cancelled() {
			return // a long prompt takes minutes
		}
		scores := make([]F, in.KeyCount)
		for row := first; row < last; row++ {
			token, head := row/heads, row%heads
			from, to := l.Stages.KeyRange(l, in.FirstQuery+token)
			from, to = max(from-in.FirstKey, 0), min(to-in.FirstKey, in.KeyCount)
			kvHead := l.Stages.KVHead(l, head)
			query := in.Queries[row*d:][:d]
			visible := scores[:to-from]
			if len(visible) > 0 {
				kernel.InnerProducts(visible, query, in.Keys[(from*kvHeads+kvHead)*d:], kvHeads*d, l.Dot)
			}
			l.rounded(visible)
			for i := range visible {
				visible[i] *= scale
			}
			l.rounded(visible)
			l.Stages.Softmax(l, visible, F(l.Weights.Sinks[head]))
			if len(visible) > 0 {
				kernel.WeightedSum(out[row*d:][:d], visible, in.Values[(from*kvHeads+kvHead)*d:], kvHeads*d, l.Dot)
			}
			l.rounded(out[row*d:][:d])
		}
	})
	return out
}

// AttentionOut projects attn_core [tokens, heads·head_dim] to [tokens, hidden].
func AttentionOut[F Float](l Layer[F], x []F) []F {
	return Linear(l, x, l.Weights.Out, l.Weights.OutBias)
}
