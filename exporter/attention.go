package exporter

import (
	"math"
	"slices"
)

// QKV projects x [tokens, hidden] to queries [tokens, heads, head_dim], keys and
// values [tokens, kv_heads, head_dim] with one fused linear layer whose rows are
// q, then k, then v.
//
// Source: openai/gpt-oss gpt_oss/torch/model.py AttentionBlock.
func QKV(l Layer, x Value) (q, k, v Value) {
	c := l.Config
	fused := Linear(l.Scope, x, l.Weights.QKV, l.Weights.QKVBias)
	part := func(from, heads int) Value {
		width := heads * c.HeadDim
		columns := l.Slice(fused, 1, from, from+width, 1, N(width))
		return l.Reshape(columns, x.shape[0], N(heads), N(c.HeadDim))
	}
	return part(0, c.Heads), part(c.QueryWidth(), c.KVHeads), part(c.QueryWidth()+c.KVWidth(), c.KVHeads)
}

// Visible returns which keys each query sees, as booleans [queries, keys], given
// the positions of both: none after its own, and with a window (0: none) no key
// that is window or more before it.
func Visible(s *Scope, queries, keys Value, window int) Value {
	distance := s.Subtract(s.Unsqueeze(queries, 1), s.Unsqueeze(keys, 0))
	visible := s.GreaterOrEqual(distance, s.Int64(0))
	if window > 0 {
		visible = s.And(visible, s.Less(distance, s.Int64(window)))
	}
	return visible
}

// GroupHeads turns x [tokens, heads, width] into [kv_heads, group, tokens, width],
// where a group is the query heads that share a key and value head: neighbours
// do (grouped-query attention, https://arxiv.org/abs/2305.13245).
func GroupHeads(l Layer, x Value) Value {
	c := l.Config
	split := l.Reshape(x, x.shape[0], N(c.KVHeads), N(c.Heads/c.KVHeads), x.shape[2])
	return l.Transpose(split, 1, 2, 0, 3)
}

// MergeHeads undoes [GroupHeads] and joins the heads: [tokens, heads·width].
func MergeHeads(l Layer, x Value) Value {
	width := l.Config.Heads * x.shape[3].Size
	return l.Reshape(l.Transpose(x, 2, 0, 1, 3), x.shape[2], N(width))
}

// Scale is the factor on the scores, 1/√head_dim.
func Scale(l Layer) float64 { return 1 / math.Sqrt(float64(l.Config.HeadDim)) }

// Softmax turns scores [kv_heads, group, queries, keys] into probabilities. The
// head's sink [kv_heads, group, 1, 1] is one more score: it takes part in the
// maximum and in the sum, and its own probability is dropped, so that the rest
// add up to less than one.
//
// Source: Xiao et al. 2023, https://arxiv.org/abs/2309.17453, with the sink
// learned instead of a first token; openai/gpt-oss gpt_oss/torch/model.py sdpa.
func Softmax(l Layer, scores, sinks Value) Value {
	keys := scores.shape[3]
	each := l.Concat(0, N(4), l.Int64s(1, 1), l.SizeOf(scores, 2), l.Int64s(1))
	sinks = l.ExpandTo(sinks, each, append(slices.Clone(scores.shape[:3]), N(1)))
	extended := l.Concat(3, l.Symbol("keys_and_sink"), scores, sinks)
	if keys.Symbol == "" {
		extended.shape[3] = N(keys.Size + 1)
	}
	return l.Slice(l.Softmax(extended), 3, 0, -1, 1, keys)
}

// AttentionInput is what attention sees: rotated queries of some tokens, and the
// rotated keys and the values of those tokens and, with a cache, of tokens
// before them.
type AttentionInput struct {
	Queries      Value // [queries, heads, head_dim]
	Keys, Values Value // [keys, kv_heads, head_dim]
	Visible      Value // [queries, keys], boolean
	Sinks        Value // [heads]
}

// Attention computes sinks attention before the output projection: [queries,
// heads·head_dim].
//
// In a short format torch rounds the scores, the scaled scores, the
// probabilities and the result.
func Attention(l Layer, in AttentionInput) Value {
	q := l.Stages.GroupHeads(l, in.Queries)
	k := l.Unsqueeze(l.Transpose(in.Keys, 1, 2, 0), 1)   // [kv_heads, 1, head_dim, keys]
	v := l.Unsqueeze(l.Transpose(in.Values, 1, 0, 2), 1) // [kv_heads, 1, keys, head_dim]
	sinks := l.Stages.GroupHeads(l, l.Unsqueeze(in.Sinks, 0, 2))
	scores := l.Round(l.MatMul(q, k))
	scores = l.Round(l.Mul(scores, l.Float(l.Stages.Scale(l))))
	scores = l.Where(in.Visible, scores, l.Float(math.Inf(-1)))
	probabilities := l.Round(l.Stages.Softmax(l, scores, sinks))
	return l.Stages.MergeHeads(l, l.Round(l.MatMul(probabilities, v)))
}

// AttentionOut projects attn_core [tokens, heads·head_dim] to [tokens, hidden].
func AttentionOut(l Layer, x Value) Value {
	return Linear(l.Scope, x, l.Weights.Out, l.Weights.OutBias)
}
