package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestExperts judges the experts' layers, the activation, their sum and its residual.
func TestExperts(t *testing.T) {
	suite.Stage(t, conformance.StageExperts)
	suite.Injected(t, conformance.StageExperts)
}
