package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestRope judges the rotation of queries and keys.
func TestRope(t *testing.T) {
	suite.Stage(t, conformance.StageRope)
	suite.Injected(t, conformance.StageRope)
}
