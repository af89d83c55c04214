package reference_test

import (
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// TestTheSameBitsOnEveryMachine holds every tap of a run to the hash that it has on
// amd64, AVX-512, AVX2 or none; `make arm64` runs it where Go fuses products with
// sums. That the values are right is for the goldens to say, from which this test
// takes nothing: a new fixture or a change of the arithmetic changes the hash.
func TestTheSameBitsOnEveryMachine(t *testing.T) {
	for precision, want := range map[reference.Precision]string{
		reference.Float64:  "52f26441ee3d1faf53dedc4ec600ccacaea3a4c533f9883092dd111bf577befd",
		reference.BFloat16: "76b261e7023081aa5a02fb211d97e7c779aed6f1842003483d594ea60fb08e16",
		reference.Float16:  "e4b55a2554fba98d1a2a86d1571b267423dc4242e9c47da8d4dd8afa599d7508",
	} {
		t.Run(string(precision), func(t *testing.T) {
			model, err := checkpoint.Open(fixtures.Dir("toy"))
			require.NoError(t, err)
			defer model.Close()
			tokens := make([]int32, 40)
			words := fixtures.NewCounter(1, "machine")
			for i := range tokens {
				tokens[i] = int32(words.Word(uint64(i)) % uint64(model.Config.VocabSize))
			}
			names := taps.All(model.Config)
			results, err := reference.Run(t.Context(), model, tokens, reference.Options{Precision: precision, Taps: names})
			require.NoError(t, err)
			hash := sha256.New()
			for _, name := range names {
				hash.Write(results[name].Data)
			}
			assert.Equal(t, want, hex.EncodeToString(hash.Sum(nil)))
		})
	}
}
