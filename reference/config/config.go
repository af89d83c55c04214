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

// Config is the shape of a gpt-oss model. Its JSON is for reports; a config.json
// comes from [Config.MarshalOpenAI] and [Config.MarshalHuggingFace].
//
// Source: openai/gpt-oss gpt_oss/torch/model.py (ModelConfig) and Hugging Face
// transformers' GptOssConfig.
type Config struct {
	Layers          int `json:"num_hidden_layers"` // transformer blocks
	Experts         int `json:"num_experts"`       // experts per block
	ExpertsPerToken int `json:"experts_per_token"` // experts that each token is routed to, at most Experts
	VocabSize       int `json:"vocab_size"`

	HiddenSize       int `json:"hidden_size"`         // width of the residual stream
	IntermediateSize int `json:"intermediate_size"`   // width of one expert
	HeadDim          int `json:"head_dim"`            // even; Heads*HeadDim need not be HiddenSize
	Heads            int `json:"num_attention_heads"` // query heads, a multiple of KVHeads
	KVHeads          int `json:"num_key_value_heads"` // key and value heads

	SlidingWindow int    `json:"sliding_window"` // keys that a sliding layer sees, the query's own included
	Sliding       []bool `json:"sliding"`        // one per layer; OpenAI: every even layer slides

	InitialContextLength int     `json:"initial_context_length"` // YaRN's original context length
	RopeTheta            float64 `json:"rope_theta"`             // base of the rotary frequencies
	RopeScalingFactor    float64 `json:"rope_scaling_factor"`    // YaRN factor; at most 1 means no YaRN
	RopeNTKAlpha         float64 `json:"rope_ntk_alpha"`         // rotations at the upper end of YaRN's ramp (beta_slow)
	RopeNTKBeta          float64 `json:"rope_ntk_beta"`          // rotations at the lower end of YaRN's ramp (beta_fast)
	RopeTruncate         bool    `json:"rope_truncate"`          // ramp bounds rounded outwards to integers; gpt-oss: false

	SwiGLULimit float64 `json:"swiglu_limit"` // clamp of the experts' pre-activations
	SwiGLUAlpha float64 `json:"swiglu_alpha"` // slope inside the sigmoid
	NormEpsilon float64 `json:"rms_norm_eps"` // added to the mean square in every RMSNorm
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
