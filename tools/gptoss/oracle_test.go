//go:build oracles

package main

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
)

// These need the environment of `make oracles`: go test -tags oracles ./tools/gptoss.

func probeTwice(t *testing.T, status int, arguments ...string) string {
	t.Helper()
	var texts [2]string
	for i := range texts {
		var stdout, stderr strings.Builder
		got := run(context.Background(), []*cobra.Command{probeCommand()}, append([]string{"probe"}, arguments...), &stdout, &stderr)
		require.Equal(t, status, got, stderr.String())
		texts[i] = stdout.String()
	}
	assert.Equal(t, texts[0], texts[1], "the same command gives the same report")
	return texts[0]
}

// Every implementation on a checkpoint that is no fixture, beyond the window.
func TestOracleProbeOfAnotherCheckpoint(t *testing.T) {
	c := fixtures.Generated[0].Config
	c.HiddenSize, c.SlidingWindow, c.Experts = 96, 9, 5
	dir := filepath.Join(t.TempDir(), "other")
	require.NoError(t, fixtures.Synthesize(t.Context(), c, 99, fixtures.Healthy, dir))
	for _, against := range implementations {
		t.Run(against, func(t *testing.T) {
			arguments := []string{"--against", against, "--checkpoint", dir, "--sequence-length", "30"}
			wrong := against == "flax" || against == "equinox"
			if wrong {
				text := probeTwice(t, exitFail, arguments...)
				assert.Contains(t, text, "diagnosis: window-one-too-many")
				arguments = append(arguments, "--correct-window")
			}
			text := probeTwice(t, exitPass, arguments...)
			assert.Contains(t, text, "verdict: pass")
			assert.True(t, strings.HasSuffix(text, "[issues]\n"), "nothing is missing")
		})
	}
}

// One block alone gets the same input on both sides.
func TestOracleProbeOfOneBlock(t *testing.T) {
	for _, against := range implementations {
		arguments := []string{"--against", against, "--checkpoint", fixtures.Dir("toy"), "--inject-layer", "1"} // a full layer: no window
		text := probeTwice(t, exitPass, arguments...)
		assert.Contains(t, text, "block 1 alone")
		assert.NotContains(t, text, "| logits |")
		assert.True(t, strings.HasSuffix(text, "[issues]\n"), "nothing of the block is missing")
	}
}
