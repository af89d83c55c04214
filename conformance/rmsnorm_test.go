package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestRMSNorm judges the three norms: attn_normed, mlp_normed, final_norm.
func TestRMSNorm(t *testing.T) {
	suite.Stage(t, conformance.StageRMSNorm)
	suite.Injected(t, conformance.StageRMSNorm)
}
