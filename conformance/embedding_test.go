package conformance_test

import (
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestEmbedding judges the token lookup.
func TestEmbedding(t *testing.T) { suite.Stage(t, conformance.StageEmbedding) }
