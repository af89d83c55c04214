package config

import (
	"fmt"
	"math"
)

// Upper limits keep a hostile file from making us multiply or allocate
// something huge. Each is at least 8 times what gpt-oss-120b has.
const (
	maxLayers  = 1 << 10 // 36
	maxExperts = 1 << 12 // 128
	maxVocab   = 1 << 24 // 201,088
	maxWidth   = 1 << 17 // 2,880
	maxHeadDim = 1 << 10 // 64
	maxHeads   = 1 << 10 // 64
	maxContext = 1 << 31 // 131,072
)

func checkLayers(n int) error {
	if n < 1 || n > maxLayers {
		return fmt.Errorf("num_hidden_layers is %d, not between 1 and %d", n, maxLayers)
	}
	return nil
}

// Validate reports the first thing that no gpt-oss model can have. [Parse]
// calls it; so should whoever makes a Config by hand.
func (c Config) Validate() error {
	for _, size := range []struct {
		name    string
		n       int
		maximum int
	}{
		{"num_hidden_layers", c.Layers, maxLayers},
		{"num_experts", c.Experts, maxExperts},
		{"experts_per_token", c.ExpertsPerToken, maxExperts},
		{"vocab_size", c.VocabSize, maxVocab},
		{"hidden_size", c.HiddenSize, maxWidth},
		{"intermediate_size", c.IntermediateSize, maxWidth},
		{"head_dim", c.HeadDim, maxHeadDim},
		{"num_attention_heads", c.Heads, maxHeads},
		{"num_key_value_heads", c.KVHeads, maxHeads},
		{"initial_context_length", c.InitialContextLength, maxContext},
	} {
		if size.n < 1 || size.n > size.maximum {
			return fmt.Errorf("%s is %d, not between 1 and %d", size.name, size.n, size.maximum)
		}
	}
	// 0 means that no layer has a window, as in OpenAI's model.py.
	if c.SlidingWindow < 0 || c.SlidingWindow > maxContext {
		return fmt.Errorf("sliding_window is %d, not between 0 and %d", c.SlidingWindow, maxContext)
	}
	if len(c.Sliding) != c.Layers {
		return fmt.Errorf("the layer pattern has %d elements for %d layers", len(c.Sliding), c.Layers)
	}
	if c.ExpertsPerToken > c.Experts {
		return fmt.Errorf("experts_per_token is %d, but there are only %d experts", c.ExpertsPerToken, c.Experts)
	}
	if c.Heads%c.KVHeads != 0 {
		return fmt.Errorf("num_attention_heads %d is not a multiple of num_key_value_heads %d", c.Heads, c.KVHeads)
	}
	if c.HeadDim%2 != 0 {
		return fmt.Errorf("head_dim is %d; RoPE needs an even number", c.HeadDim)
	}
	for _, x := range []struct {
		name  string
		value float64
	}{
		{"rope_scaling_factor", c.RopeScalingFactor},
		{"rope_ntk_alpha", c.RopeNTKAlpha},
		{"rope_ntk_beta", c.RopeNTKBeta},
		{"swiglu_limit", c.SwiGLULimit},
		{"swiglu_alpha", c.SwiGLUAlpha},
		{"rms_norm_eps", c.NormEpsilon},
	} {
		if !(x.value > 0) || math.IsInf(x.value, 0) {
			return fmt.Errorf("%s is %g, not a positive number", x.name, x.value)
		}
	}
	if !(c.RopeTheta > 1) || math.IsInf(c.RopeTheta, 0) {
		return fmt.Errorf("rope_theta is %g, not a number above 1", c.RopeTheta)
	}
	return c.validateYaRN()
}

// validateYaRN checks what RotaryEmbedding in gpt_oss/torch/model.py asserts:
// the ramp lies inside the head, 0 < low < high < head_dim/2 − 1.
func (c Config) validateYaRN() error {
	if c.RopeScalingFactor <= 1 {
		return nil
	}
	half := float64(c.HeadDim) / 2
	bound := func(rotations float64) float64 {
		return half * math.Log(float64(c.InitialContextLength)/(rotations*2*math.Pi)) / math.Log(c.RopeTheta)
	}
	low, high := bound(c.RopeNTKBeta), bound(c.RopeNTKAlpha)
	if !(0 < low && low < high && high < half-1) {
		return fmt.Errorf("YaRN's ramp from %.4g to %.4g does not lie inside (0, %g): head_dim, rope_theta, initial_context_length and the ntk bounds don't fit each other", low, high, half-1)
	}
	return nil
}
