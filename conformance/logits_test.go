package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestLogits judges the unembedding and the residual stream between blocks.
func TestLogits(t *testing.T) {
	suite.Stage(t, conformance.StageLogits)
	suite.Injected(t, conformance.StageLogits)
}
