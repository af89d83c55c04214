package exporter

import (
	"fmt"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// PastLength is the input that counts the tokens that a cache has seen.
const PastLength = "past_length"

// Names of a layer's cache, without their block. Keys are cached after rotation.
// In portable graphs both are [rows, kv_heads, head_dim] as the taps k_rot and v,
// in graphs of ONNX Runtime's operators [1, kv_heads, rows, head_dim].
const (
	PastK    = "past_k"
	PastV    = "past_v"
	PresentK = "present_k"
	PresentV = "present_v"
)

// A layer without a window caches every token: its past has past_length rows,
// and its present as many more as there are new tokens. A layer with a window
// keeps the last window tokens at most, which is all that the next one can see
// and one more. The first run is given no rows and a length of 0.

// windowed names something that the layers of one window share.
func windowed(name string, window int) string {
	if window == 0 {
		return name
	}
	return fmt.Sprintf("%s_%d", name, window)
}

// cacheInputs declares the cache that goes in, and the sizes of what is attended
// to in the layers of each window.
func (m *model) cacheInputs(common *shared) {
	for layer := range m.config.Layers {
		window := m.config.Window(layer)
		k := keys{count: common.tokens}
		if m.options.KVCache {
			k = keys{past: Symbol(windowed("past", window)), count: Symbol(windowed("keys", window))}
			for _, name := range []string{PastK, PastV} {
				full := taps.Block(layer, name)
				shape := Shape{k.past, N(m.config.KVHeads), N(m.config.HeadDim)}
				if m.stages.FusedAttention != nil {
					shape = Shape{N(1), N(m.config.KVHeads), k.past, N(m.config.HeadDim)}
				}
				m.past[full] = m.graph.Input(full, Float32, shape, "")
			}
		}
		common.keys[window] = k
	}
}

// keyPositions returns the positions of the keys that a layer attends to.
func (m *model) keyPositions(s *Scope, layer int, past, queries Value, k keys) Value {
	if !m.options.KVCache {
		return queries
	}
	// The cached rows are the last ones before the new tokens.
	rows := s.SizeOf(m.past[taps.Block(layer, PastK)], 0)
	count := s.Add(rows, s.SizeOf(queries, 0))
	return s.Add(s.Subtract(past, rows), s.Range(s.Int64(0), s.Squeeze(count, 0), k.count))
}

// Kept returns how many rows a layer's cache keeps, or 0 for all.
func Kept(c config.Config, layer int) int { return c.Window(layer) }

// cached puts the past before a layer's new keys or values, and keeps what the
// next run needs.
func (m *model) cached(l Layer, in blockInput, past, x Value) (all, present Value) {
	if !m.options.KVCache {
		return x, Value{}
	}
	s := l.Sub("cache")
	all = s.Concat(0, in.keys.count, past, x)
	if rows := l.Stages.Kept(l.Config, l.Index); rows > 0 {
		// A start before the first row is the first row.
		return all, s.SliceFrom(all, 0, s.Int64s(-rows), Symbol(windowed("kept", rows)))
	}
	return all, all
}
