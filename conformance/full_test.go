//go:build full

package conformance_test

import "testing"

// TestFull judges all 24 layers at full width.
func TestFull(t *testing.T) {
	openFullWidth(t, "full", 24).runTier(t, "full.md")
}
