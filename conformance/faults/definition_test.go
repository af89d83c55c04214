package faults

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// oracle holds some logits of every fault, in float64, from numpy:
// tools/oracles/faults.py, which was written from the faults' definitions and
// shares no code with this package.
const oracle = "testdata/toy.safetensors"

// agree is the distance of two float64 evaluations in other orders. Faults that
// make large activations lose three more digits than the right model.
const agree = 1e-9

// TestDefinitions: every fault computes what its definition says.
func TestDefinitions(t *testing.T) {
	file, err := tensor.OpenSafetensors(oracle)
	require.NoError(t, err)
	defer file.Close()
	data, err := os.ReadFile(filepath.Join(fixtures.Dir("toy"), "model.safetensors"))
	require.NoError(t, err)
	require.Equal(t, file.Metadata()["checkpoint_sha256"], fmt.Sprintf("%x", sha256.Sum256(data)),
		"%s was made from another fixture: run tools/oracles/faults.py", oracle)

	s := subjects()["toy"]
	right := reference.New(s.weights, reference.Exact())
	check := func(id string, m reference.Model[float64], calls [][]int32) {
		golden, ok := file.Tensor(id)
		if !assert.True(t, ok, "%s has no %s: run tools/oracles/faults.py", oracle, id) {
			return
		}
		want, err := golden.Float64s()
		require.NoError(t, err)
		rows, columns := golden.Shape[0], golden.Shape[1]
		var cache reference.Cache[float64]
		var all []float64
		for _, tokens := range calls {
			logits, err := m.Forward(t.Context(), tokens, &cache, reference.Observer[float64]{})
			require.NoError(t, err)
			all = append(all, logits...)
		}
		vocab := s.weights.Config.VocabSize
		last := all[len(all)-rows*vocab:]
		for i, w := range want {
			row, column := i/columns, i%columns*(vocab/columns)
			if !assert.InDelta(t, w, last[row*vocab+column], agree, "%s: row %d, column %d", id, row, column) {
				return
			}
		}
	}
	check("right", right, s.chunks)
	for _, f := range All() {
		check(f.ID, Apply(f, right), s.tokens(f.Cached))
	}
}
