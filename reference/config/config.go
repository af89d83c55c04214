// Package config describes the shape of a gpt-oss model: every number that
// changes what the forward pass computes, and nothing else.
//
// The reference, the exporter and the judge read the same Config; none of them
// reads a config.json itself. Nothing has a default: a file that lacks a key
// that the model needs is an error (see [Parse]).
package config

// Constants that OpenAI's config.json does not carry, because its model.py has
// them in code (gpt_oss/torch/model.py, RMSNorm.__init__ and swiglu). Hugging
// Face's config.json states the first as rms_norm_eps, and from transformers 5
// on the second as swiglu_alpha.
const (
	OpenAINormEpsilon = 1e-5
	OpenAISwiGLUAlpha = 1.702
)

// Config is the shape of a gpt-oss model.
//
// Source: openai/gpt-oss gpt_oss/torch/model.py (ModelConfig) and Hugging Face
// transformers' GptOssConfig.
type Config struct {
	Layers          int // transformer blocks
	Experts         int // experts per block
	ExpertsPerToken int // experts that each token is routed to, at most Experts
	VocabSize       int

	HiddenSize       int // width of the residual stream
	IntermediateSize int // width of one expert
	HeadDim          int // even; Heads*HeadDim need not be HiddenSize
	Heads            int // query heads, a multiple of KVHeads
	KVHeads          int // key and value heads

	SlidingWindow int    // keys that a sliding layer sees, the query's own included
	Sliding       []bool // one per layer; OpenAI: every even layer slides

	InitialContextLength int     // YaRN's original context length
	RopeTheta            float64 // base of the rotary frequencies
	RopeScalingFactor    float64 // YaRN factor; at most 1 means no YaRN
	RopeNTKAlpha         float64 // rotations at the upper end of YaRN's ramp (beta_slow)
	RopeNTKBeta          float64 // rotations at the lower end of YaRN's ramp (beta_fast)
	RopeTruncate         bool    // ramp bounds rounded outwards to integers; gpt-oss: false

	SwiGLULimit float64 // clamp of the experts' pre-activations
	SwiGLUAlpha float64 // slope inside the sigmoid
	NormEpsilon float64 // added to the mean square in every RMSNorm
}

// Window returns how many keys a query of the layer may see, its own included,
// or 0 if it sees all earlier keys.
func (c Config) Window(layer int) int {
	if c.Sliding[layer] {
		return c.SlidingWindow
	}
	return 0
}

// QueryWidth returns heads·head_dim, the width of q and of attn_core.
func (c Config) QueryWidth() int { return c.Heads * c.HeadDim }

// KVWidth returns kv_heads·head_dim, the width of k and of v.
func (c Config) KVWidth() int { return c.KVHeads * c.HeadDim }

// QKVWidth returns the rows of the fused projection: q, then k, then v.
func (c Config) QKVWidth() int { return c.QueryWidth() + 2*c.KVWidth() }

// Alternating returns OpenAI's layer pattern: even layers slide, odd ones don't.
func Alternating(layers int) []bool {
	sliding := make([]bool, layers)
	for i := range sliding {
		sliding[i] = i%2 == 0
	}
	return sliding
}
