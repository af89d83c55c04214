package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestGating judges the router: logits, choice and weights.
func TestGating(t *testing.T) {
	suite.Stage(t, conformance.StageGating)
	suite.Injected(t, conformance.StageGating)
}
