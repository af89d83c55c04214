package conformance_test

import (
	"math"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/config"
)

// TestRope judges the rotation of queries and keys.
func TestRope(t *testing.T) {
	suite.Stage(t, conformance.StageRope)
	suite.Injected(t, conformance.StageRope)
}

// TestRopeAngles compares the reference's cosines and sines with those of
// OpenAI's torch model in float64, up to position 131,071: an angle may be off by
// 4 units of roundoff times the position, a cosine by that and 2 units more.
func TestRopeAngles(t *testing.T) {
	cases, err := golden.Stage(conformance.StageRope)
	require.NoError(t, err)
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			var shape config.Config
			var positions []int
			for name, into := range map[string]any{
				"head_dim": &shape.HeadDim, "positions": &positions, "initial_context_length": &shape.InitialContextLength,
				"rope_theta": &shape.RopeTheta, "rope_scaling_factor": &shape.RopeScalingFactor,
				"rope_ntk_alpha": &shape.RopeNTKAlpha, "rope_ntk_beta": &shape.RopeNTKBeta,
			} {
				require.NoError(t, c.Parameter(name, into))
			}
			require.GreaterOrEqual(t, slices.Max(positions), 131071)
			truth, err := c.Truth()
			require.NoError(t, err)
			rotary := reference.NewRotary(shape)
			table := rotary.Table(positions)
			for name, got := range map[string][]float64{"cos": table.Cos, "sin": table.Sin} {
				want, err := truth[name].Float64s()
				require.NoError(t, err)
				require.Len(t, got, len(want))
				for i, w := range want {
					position := positions[i/table.Half]
					bound := rotary.Concentration * 0x1p-53 * float64(4*position+2)
					if math.Abs(got[i]-w) > bound {
						assert.Failf(t, name, "pair %d at position %d: got %.17g, want %.17g, bound %.3g", i%table.Half, position, got[i], w, bound)
					}
				}
			}
		})
	}
}
