package conformance

import (
	"fmt"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// unexercised lists what these tokens on this checkpoint do not put to the test:
// a mistake there would not show, however sharp the bounds.
func (j *judging) unexercised() []string {
	c := j.model.Weights.Config
	var missing []string
	if len(j.tokens) == 1 {
		missing = append(missing, "attention and RoPE (a single token)")
	}
	for layer := range c.Layers {
		if c.Sliding[layer] && len(j.tokens) <= c.SlidingWindow {
			missing = append(missing, fmt.Sprintf("the sliding window (%d tokens, window %d)", len(j.tokens), c.SlidingWindow))
			break
		}
	}
	glu, gluBelow, linear := false, false, false
	for layer := range c.Layers {
		prelinear := j.free.real(taps.Block(layer, taps.Prelinear))
		for i := 0; i < len(prelinear); i += 2 {
			glu = glu || prelinear[i] > c.SwiGLULimit
			gluBelow = gluBelow || prelinear[i] < -c.SwiGLULimit
			linear = linear || prelinear[i+1] > c.SwiGLULimit || prelinear[i+1] < -c.SwiGLULimit
		}
	}
	if !glu {
		missing = append(missing, "the clamp of glu from above")
	}
	if !gluBelow {
		missing = append(missing, "the absence of a clamp of glu from below")
	}
	if !linear {
		missing = append(missing, "the clamp of linear")
	}
	return missing
}
