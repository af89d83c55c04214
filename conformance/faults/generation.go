package faults

import (
	"math"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// generation lists the faults that show only when tokens follow others through
// a KV cache. The first call, with an empty cache, is right in all of them.
func generation() []Fault {
	all := []Fault{
		{
			ID: "kv-cache-position", Tap: taps.QRot,
			Explanation: "A windowed layer takes the number of keys in its cache for the next position.",
			Thread:      "https://github.com/rajveer43/VeloxQuant-MLX/issues/389",
			Related:     true,
			Stages:      Swap{Wide: kvCachePosition[float64], Single: kvCachePosition[float32]},
			Graph:       kvCachePositionGraph,
		},
		{
			ID: "kv-cache-position-off-by-one", Tap: taps.QRot,
			Explanation: "Every layer but the first turns the new tokens as if they stood one position later.",
			Thread:      "https://github.com/fla-org/flash-linear-attention/issues/766",
			Related:     true,
			Stages:      Swap{Wide: kvCachePositionOffByOne[float64], Single: kvCachePositionOffByOne[float32]},
			Graph:       kvCachePositionOffByOneGraph,
		},
		{
			ID: "kv-cache-position-zero", Tap: taps.QRot,
			Explanation: "Positions start at 0 again in every call.",
			Thread:      "https://github.com/Blaizzy/mlx-vlm/issues/1983",
			Related:     true,
			Stages:      Swap{Wide: kvCachePositionZero[float64], Single: kvCachePositionZero[float32]},
			Graph:       kvCachePositionZeroGraph,
		},
		{
			ID: "kv-cache-window", Tap: taps.AttnCore,
			Explanation: "A windowed layer's cache drops a key one step too early: new tokens see window - 1 keys.",
			Thread:      "https://github.com/huggingface/transformers/pull/47708",
			Related:     true,
			Stages:      Swap{Wide: kvCacheWindow[float64], Single: kvCacheWindow[float32]},
			Graph:       kvCacheWindowGraph,
		},
		{
			ID: "kv-cache-window-ignored", Tap: taps.AttnCore,
			Special:     1, // the same as window-one-too-many at window + 1 tokens
			Explanation: "Windowed layers cache every key, and new tokens see them all.",
			Thread:      "https://github.com/sgl-project/sglang/pull/30050",
			Stages:      Swap{Wide: kvCacheWindowIgnored[float64], Single: kvCacheWindowIgnored[float32]},
			Graph:       kvCacheWindowIgnoredGraph,
		},
		{
			ID: "kv-cache-trimmed-before-attention", Tap: taps.AttnCore,
			Explanation: "A windowed layer's cache is cut to the window of the last new token before the first ones have read it.",
			Thread:      "https://github.com/pytorch/executorch/pull/20346",
			Related:     true,
			Stages:      Swap{Wide: kvCacheTrimmedBeforeAttention[float64], Single: kvCacheTrimmedBeforeAttention[float32]},
			Graph:       kvCacheTrimmedBeforeAttentionGraph,
		},
		{
			ID: "kv-cache-sinks-dropped", Tap: taps.AttnCore,
			Explanation: "New tokens attend to the cache without the sinks.",
			Thread:      "https://github.com/sgl-project/sglang/pull/30050",
			Stages:      Swap{Wide: kvCacheSinksDropped[float64], Single: kvCacheSinksDropped[float32]},
			Graph:       kvCacheSinksDroppedGraph,
		},
		{
			ID: "kv-cache-keys-rotated-twice", Tap: taps.AttnCore,
			Explanation: "Keys that come out of the cache are turned once more.",
			Thread:      "https://github.com/NVIDIA/TensorRT-LLM/pull/16378",
			Stages:      Swap{Wide: kvCacheKeysRotatedTwice[float64], Single: kvCacheKeysRotatedTwice[float32]},
			Graph:       kvCacheKeysRotatedTwiceGraph,
		},
	}
	for i := range all {
		all[i].Stage, all[i].Cached = stageGeneration, true
	}
	return all
}

// repositioned turns queries and keys of new tokens as if the first of them
// stood elsewhere.
func repositioned[F reference.Float](s *reference.Stages[F], first func(l reference.Layer[F], position int) int) {
	moved := func(rotate rotation[F]) rotation[F] {
		return func(l reference.Layer[F], x []F, positions []int) []F {
			if len(positions) == 0 || positions[0] == 0 {
				return rotate(l, x, positions)
			}
			return rotate(l, x, shifted(positions, first(l, positions[0])-positions[0]))
		}
	}
	s.RopeQuery, s.RopeKey = moved(s.RopeQuery), moved(s.RopeKey)
}

// kvCachePosition: the next token needs window - 1 keys before it, and so many
// are kept.
func kvCachePosition[F reference.Float](s *reference.Stages[F]) {
	repositioned(s, func(l reference.Layer[F], position int) int {
		if window := l.Config.Window(l.Index); window > 0 {
			return min(position, window-1)
		}
		return position
	})
}

func kvCachePositionOffByOne[F reference.Float](s *reference.Stages[F]) {
	repositioned(s, func(l reference.Layer[F], position int) int {
		if l.Index == 0 {
			return position
		}
		return position + 1
	})
}

func kvCachePositionZero[F reference.Float](s *reference.Stages[F]) {
	repositioned(s, func(reference.Layer[F], int) int { return 0 })
}

// decoding changes attention of new tokens, and leaves that of a first call as
// it is.
func decoding[F reference.Float](s *reference.Stages[F], change func(reference.Layer[F], reference.AttentionInput[F]) (reference.Layer[F], reference.AttentionInput[F])) {
	attention := s.Attention
	s.Attention = func(l reference.Layer[F], in reference.AttentionInput[F]) []F {
		if in.FirstQuery > 0 {
			l, in = change(l, in)
		}
		return attention(l, in)
	}
}

// cut makes the queries of a windowed layer see no key before least.
func cut[F reference.Float](l reference.Layer[F], least func(query, window int) int) reference.Layer[F] {
	return restaged(l, func(s *reference.Stages[F]) {
		keyRange := s.KeyRange
		s.KeyRange = func(l reference.Layer[F], query int) (from, to int) {
			from, to = keyRange(l, query)
			if window := l.Config.Window(l.Index); window > 0 {
				from = min(max(from, least(query, window)), to)
			}
			return from, to
		}
	})
}

func kvCacheWindow[F reference.Float](s *reference.Stages[F]) {
	decoding(s, func(l reference.Layer[F], in reference.AttentionInput[F]) (reference.Layer[F], reference.AttentionInput[F]) {
		return cut(l, func(query, window int) int { return query - window + 2 }), in
	})
}

func kvCacheTrimmedBeforeAttention[F reference.Float](s *reference.Stages[F]) {
	decoding(s, func(l reference.Layer[F], in reference.AttentionInput[F]) (reference.Layer[F], reference.AttentionInput[F]) {
		end := in.FirstQuery + in.QueryCount
		return cut(l, func(_, window int) int { return end - window }), in
	})
}

func kvCacheWindowIgnored[F reference.Float](s *reference.Stages[F]) {
	s.KeepFrom = func(reference.Layer[F], int) int { return 0 }
	decoding(s, func(l reference.Layer[F], in reference.AttentionInput[F]) (reference.Layer[F], reference.AttentionInput[F]) {
		l.Config.SlidingWindow = 0
		return l, in
	})
}

func kvCacheSinksDropped[F reference.Float](s *reference.Stages[F]) {
	decoding(s, func(l reference.Layer[F], in reference.AttentionInput[F]) (reference.Layer[F], reference.AttentionInput[F]) {
		return restaged(l, func(s *reference.Stages[F]) {
			softmax := s.Softmax
			s.Softmax = func(l reference.Layer[F], scores []F, _ F) { softmax(l, scores, F(noSink)) }
		}), in
	})
}

func kvCacheKeysRotatedTwice[F reference.Float](s *reference.Stages[F]) {
	decoding(s, func(l reference.Layer[F], in reference.AttentionInput[F]) (reference.Layer[F], reference.AttentionInput[F]) {
		in.Keys = l.Stages.RopeKey(l, in.Keys, span(in.FirstKey, in.KeyCount))
		return l, in
	})
}

// watched remembers, while a graph is built, what those stages were given that
// are the same in every layer.
type watched struct {
	queries exporter.Value         // positions of the new tokens
	keys    map[int]exporter.Value // positions of the keys, by window
	tables  func(s *exporter.Scope, positions exporter.Value) (cos, sin exporter.Value)
}

func watch(s *exporter.Stages) *watched {
	w := &watched{keys: map[int]exporter.Value{}}
	tables, visible := s.RotaryTables, s.Visible
	s.RotaryTables = func(scope *exporter.Scope, r exporter.Rotary, positions exporter.Value, limit int) (cos, sin exporter.Value) {
		w.queries = positions
		w.tables = func(scope *exporter.Scope, positions exporter.Value) (cos, sin exporter.Value) {
			return tables(scope, r, positions, limit)
		}
		return tables(scope, r, positions, limit)
	}
	s.Visible = func(scope *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		w.keys[window] = keys
		return visible(scope, queries, keys, window)
	}
	return w
}

// first returns the position of the first of some tokens, [1].
func first(s *exporter.Scope, positions exporter.Value) exporter.Value {
	return s.Slice(positions, 0, 0, 1, 1, exporter.N(1))
}

// later is 1 if the tokens follow others, else 0: [1], int64.
func later(s *exporter.Scope, positions exporter.Value) exporter.Value {
	return s.Min(first(s, positions), s.Int64(1))
}

// follows is the same as a boolean.
func follows(s *exporter.Scope, positions exporter.Value) exporter.Value {
	return s.Less(s.Int64(0), first(s, positions))
}

// repositionedGraph turns queries and keys of new tokens as if they stood
// elsewhere.
func repositionedGraph(s *exporter.Stages, elsewhere func(l exporter.Layer, positions exporter.Value) exporter.Value) {
	w := watch(s)
	moved := func(rotate turning) turning {
		return func(l exporter.Layer, x, _, _ exporter.Value) exporter.Value {
			cos, sin := w.tables(l.Sub("moved"), elsewhere(l, w.queries))
			return rotate(l, x, cos, sin)
		}
	}
	s.RopeQuery, s.RopeKey = moved(s.RopeQuery), moved(s.RopeKey)
}

func kvCachePositionGraph(s *exporter.Stages) {
	repositionedGraph(s, func(l exporter.Layer, positions exporter.Value) exporter.Value {
		window := l.Config.Window(l.Index)
		if window == 0 {
			return positions
		}
		start := first(l.Scope, positions)
		return l.Add(l.Subtract(positions, start), l.Min(start, l.Int64(window-1)))
	})
}

func kvCachePositionOffByOneGraph(s *exporter.Stages) {
	repositionedGraph(s, func(l exporter.Layer, positions exporter.Value) exporter.Value {
		if l.Index == 0 {
			return positions
		}
		return l.Add(positions, later(l.Scope, positions))
	})
}

func kvCachePositionZeroGraph(s *exporter.Stages) {
	repositionedGraph(s, func(l exporter.Layer, positions exporter.Value) exporter.Value {
		return l.Subtract(positions, first(l.Scope, positions))
	})
}

// cutGraph makes the queries of a windowed layer see no key before least, which
// may be one position for all queries, [1], or one for each, [queries, 1].
func cutGraph(s *exporter.Stages, least func(scope *exporter.Scope, queries exporter.Value, window int) exporter.Value) {
	visible := s.Visible
	s.Visible = func(scope *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		right := visible(scope, queries, keys, window)
		if window == 0 {
			return right
		}
		// No key is before 0, which is the bound of a first call.
		bound := scope.Mul(least(scope, queries, window), later(scope, queries))
		return scope.And(right, scope.GreaterOrEqual(scope.Unsqueeze(keys, 0), bound))
	}
}

func kvCacheWindowGraph(s *exporter.Stages) {
	cutGraph(s, func(scope *exporter.Scope, queries exporter.Value, window int) exporter.Value {
		return scope.Subtract(scope.Unsqueeze(queries, 1), scope.Int64(window-2))
	})
}

func kvCacheTrimmedBeforeAttentionGraph(s *exporter.Stages) {
	cutGraph(s, func(scope *exporter.Scope, queries exporter.Value, window int) exporter.Value {
		last := scope.Slice(queries, 0, -1, math.MaxInt64, 1, exporter.N(1))
		return scope.Subtract(last, scope.Int64(window-1))
	})
}

func kvCacheWindowIgnoredGraph(s *exporter.Stages) {
	s.Kept = func(config.Config, int) int { return 0 }
	visible := s.Visible
	s.Visible = func(scope *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		right := visible(scope, queries, keys, window)
		if window == 0 {
			return right
		}
		return or(scope, right, scope.And(visible(scope, queries, keys, 0), follows(scope, queries)))
	}
}

func kvCacheSinksDroppedGraph(s *exporter.Stages) {
	w := watch(s)
	attention := s.Attention
	s.Attention = func(l exporter.Layer, in exporter.AttentionInput) exporter.Value {
		in.Sinks = l.Where(follows(l.Scope, w.queries), l.Float(noSink), in.Sinks)
		return attention(l, in)
	}
}

func kvCacheKeysRotatedTwiceGraph(s *exporter.Stages) {
	w := watch(s)
	attention := s.Attention
	s.Attention = func(l exporter.Layer, in exporter.AttentionInput) exporter.Value {
		cos, sin := w.tables(l.Sub("again"), w.keys[l.Config.Window(l.Index)])
		again := l.Stages.RopeKey(l, in.Keys, cos, sin)
		in.Keys = l.Where(follows(l.Scope, w.queries), again, in.Keys)
		return attention(l, in)
	}
}
