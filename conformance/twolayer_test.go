//go:build twolayer

package conformance_test

import "testing"

// TestTwoLayer judges two layers at full width.
func TestTwoLayer(t *testing.T) {
	openFullWidth(t, "twolayer", 2).runTier(t, "twolayer.md")
}
