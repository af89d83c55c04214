package faults

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/gptoss-conformance/gptoss/reference"
)

// TestInOneLayer: a fault in one layer computes what the right blocks and the wrong
// one compute, run one after the other by hand.
func TestInOneLayer(t *testing.T) {
	s := subjects()["toy"]
	tokens := s.whole[0]
	right := reference.New(s.weights, reference.Exact())
	const layer = 1
	tried := 0
	for _, f := range All() {
		if !f.ByLayer() {
			continue
		}
		tried++
		for i, form := range forms(f) {
			t.Run(fmt.Sprintf("%s/%d", f.ID, i), func(t *testing.T) {
				t.Parallel()
				wrong := Apply(form, right)
				var cache reference.Cache[float64]
				x := right.Embed(t.Context(), tokens, reference.Observer[float64]{})
				for block := range s.weights.Config.Layers {
					m := right
					if block == layer {
						m = wrong
					}
					x = m.Block(t.Context(), block, x, &cache, reference.Observer[float64]{})
				}
				want := right.Logits(t.Context(), x, reference.Observer[float64]{})
				confined := Apply(form.In(layer), right)
				got, err := confined.Forward(t.Context(), tokens, nil, reference.Observer[float64]{})
				assert.NoError(t, err)
				assert.Equal(t, want, got)
			})
		}
	}
	assert.Greater(t, tried, 80)
}

// TestWhatIsInNoLayer: what acts before, after or between the layers, or speaks of
// all of them, has no form in one.
func TestWhatIsInNoLayer(t *testing.T) {
	for _, id := range []string{"embedding-scaled", "final-norm-missing", "unembedding-tied", "window-on-odd-layers", "kv-cache-window"} {
		f, found := ByID(id)
		assert.True(t, found, id)
		assert.False(t, f.ByLayer(), id)
	}
}
