package reference

// Cache holds the rotated keys and the values of the tokens that a model has
// seen, layer by layer. A sliding layer keeps only what later queries can still
// see, so its cache stops growing at the window.
//
// The zero value is an empty cache.
type Cache[F Float] struct {
	layers []layerCache[F]
	tokens int
}

type layerCache[F Float] struct {
	first        int // position of the first key kept
	keys, values []F // [kept, kv_heads, head_dim]
}

// Tokens returns how many tokens the model has seen: the position of the next.
func (c *Cache[F]) Tokens() int { return c.tokens }

// Kept returns how many keys a layer holds.
func (c *Cache[F]) Kept(l Layer[F]) int {
	if l.Index >= len(c.layers) {
		return 0
	}
	return len(c.layers[l.Index].keys) / l.Config.KVWidth()
}

// extend appends the new tokens' keys and values [tokens, kv_heads, head_dim]
// and returns everything that attention needs for their queries.
func (c *Cache[F]) extend(l Layer[F], keys, values []F) (allKeys, allValues []F, first int) {
	for len(c.layers) <= l.Index {
		c.layers = append(c.layers, layerCache[F]{})
	}
	layer := &c.layers[l.Index]
	layer.keys = append(layer.keys, keys...)
	layer.values = append(layer.values, values...)
	return layer.keys, layer.values, layer.first
}

// KeepFrom returns the position of the first key that the queries from position
// next on can still see.
func KeepFrom[F Float](l Layer[F], next int) int {
	from, _ := l.Stages.KeyRange(l, next)
	return from
}

// trim drops the keys that no later query of the layer can see. The slices that
// extend returned stay as they were.
func (c *Cache[F]) trim(l Layer[F], next int) {
	layer := &c.layers[l.Index]
	from := l.Stages.KeepFrom(l, next)
	drop := from - layer.first
	if drop <= 0 {
		return
	}
	width := l.Config.KVWidth()
	layer.keys = append([]F(nil), layer.keys[drop*width:]...)
	layer.values = append([]F(nil), layer.values[drop*width:]...)
	layer.first = from
}
