package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestGeneration judges decoding with a KV cache, token by token.
func TestGeneration(t *testing.T) {
	suite.Stage(t, conformance.StageGeneration)
	suite.Generated(t)
}
