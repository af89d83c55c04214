package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestAttention judges projections, sinks attention and its residual.
func TestAttention(t *testing.T) {
	suite.Stage(t, conformance.StageAttention)
	suite.Injected(t, conformance.StageAttention)
}
