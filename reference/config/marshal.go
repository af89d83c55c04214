package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// openAIFile has the keys of ModelConfig in gpt_oss/torch/model.py and no
// others: its loader passes them all on as arguments.
type openAIFile struct {
	Layers          int    `json:"num_hidden_layers"`
	Experts         int    `json:"num_experts"`
	ExpertsPerToken int    `json:"experts_per_token"`
	Vocab           int    `json:"vocab_size"`
	Hidden          int    `json:"hidden_size"`
	Intermediate    int    `json:"intermediate_size"`
	Limit           number `json:"swiglu_limit"`
	HeadDim         int    `json:"head_dim"`
	Heads           int    `json:"num_attention_heads"`
	KVHeads         int    `json:"num_key_value_heads"`
	Window          int    `json:"sliding_window"`
	Context         int    `json:"initial_context_length"`
	Theta           number `json:"rope_theta"`
	Factor          number `json:"rope_scaling_factor"`
	Alpha           number `json:"rope_ntk_alpha"`
	Beta            number `json:"rope_ntk_beta"`
}

// MarshalOpenAI writes a config.json as OpenAI's loader reads it. A model that
// this file can't describe is an error: another epsilon, alpha or layer pattern
// than the ones that model.py has in code, or truncated YaRN bounds.
func (c Config) MarshalOpenAI() ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	switch {
	case c.NormEpsilon != OpenAINormEpsilon:
		return nil, fmt.Errorf("OpenAI's config.json has no rms_norm_eps: its model always uses %g, this one has %g", OpenAINormEpsilon, c.NormEpsilon)
	case c.SwiGLUAlpha != OpenAISwiGLUAlpha:
		return nil, fmt.Errorf("OpenAI's config.json has no swiglu_alpha: its model always uses %g, this one has %g", OpenAISwiGLUAlpha, c.SwiGLUAlpha)
	case c.RopeTruncate:
		return nil, errors.New("OpenAI's model never truncates YaRN's bounds, this one does")
	}
	window, err := c.alternatingWindow()
	if err != nil {
		return nil, err
	}
	return marshal(openAIFile{
		c.Layers, c.Experts, c.ExpertsPerToken, c.VocabSize, c.HiddenSize, c.IntermediateSize, number(c.SwiGLULimit),
		c.HeadDim, c.Heads, c.KVHeads, window, c.InitialContextLength,
		number(c.RopeTheta), number(c.RopeScalingFactor), number(c.RopeNTKAlpha), number(c.RopeNTKBeta),
	})
}

// alternatingWindow returns the sliding_window with which OpenAI's pattern
// gives every layer the window that it has; 0 stands for none.
func (c Config) alternatingWindow() (int, error) {
	as := Config{SlidingWindow: c.SlidingWindow, Sliding: Alternating(c.Layers)}
	if !slices.Contains(c.Sliding, true) {
		as.SlidingWindow = 0
	}
	for layer := range c.Layers {
		if c.Window(layer) != as.Window(layer) {
			return 0, fmt.Errorf("in OpenAI's model exactly the even layers slide; layer %d of this one does not fit", layer)
		}
	}
	return as.SlidingWindow, nil
}

type huggingFaceFile struct {
	Architectures   []string          `json:"architectures"`
	AttentionBias   bool              `json:"attention_bias"`
	HeadDim         int               `json:"head_dim"`
	Activation      string            `json:"hidden_act"`
	Hidden          int               `json:"hidden_size"`
	Intermediate    int               `json:"intermediate_size"`
	LayerTypes      []string          `json:"layer_types"`
	MaxPositions    int               `json:"max_position_embeddings"`
	ModelType       string            `json:"model_type"`
	Heads           int               `json:"num_attention_heads"`
	ExpertsPerToken int               `json:"num_experts_per_tok"`
	Layers          int               `json:"num_hidden_layers"`
	KVHeads         int               `json:"num_key_value_heads"`
	Experts         int               `json:"num_local_experts"`
	Quantization    *quantizationFile `json:"quantization_config,omitempty"`
	Epsilon         number            `json:"rms_norm_eps"`
	Rope            ropeFile          `json:"rope_scaling"`
	Theta           number            `json:"rope_theta"`
	Window          *int              `json:"sliding_window"`
	SwiGLUAlpha     number            `json:"swiglu_alpha"`
	Limit           number            `json:"swiglu_limit"`
	Tied            bool              `json:"tie_word_embeddings"`
	TorchDType      string            `json:"torch_dtype"`
	Vocab           int               `json:"vocab_size"`
}

// number is written as a float even when it is whole: transformers refuses 7
// where it wants 7.0.
type number float64

// MarshalJSON writes the shortest decimal that gives the same float64.
func (x number) MarshalJSON() ([]byte, error) {
	text := strconv.FormatFloat(float64(x), 'g', -1, 64)
	if !strings.ContainsAny(text, ".e") {
		text += ".0"
	}
	return []byte(text), nil
}

type quantizationFile struct {
	NotConverted []string `json:"modules_to_not_convert"`
	Method       string   `json:"quant_method"`
}

type ropeFile struct {
	BetaFast number `json:"beta_fast"`
	BetaSlow number `json:"beta_slow"`
	Factor   number `json:"factor"`
	Original int    `json:"original_max_position_embeddings"`
	Type     string `json:"rope_type"`
	Truncate bool   `json:"truncate"`
}

// MarshalHuggingFace writes a config.json as the published gpt-oss models have
// it; transformers 4.55 and later, and 5, read it. With mxfp4 it says that the
// experts are quantized. Only a YaRN factor below 1 can't be expressed.
func (c Config) MarshalHuggingFace(mxfp4 bool) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.RopeScalingFactor < 1 {
		return nil, fmt.Errorf("a YaRN factor of %g means no YaRN in OpenAI's model, but not in transformers", c.RopeScalingFactor)
	}
	f := huggingFaceFile{
		Architectures: []string{"GptOssForCausalLM"}, AttentionBias: true, HeadDim: c.HeadDim, Activation: "silu",
		Hidden: c.HiddenSize, Intermediate: c.IntermediateSize,
		// The longest context that the scaled frequencies are meant for.
		MaxPositions: int(min(float64(c.InitialContextLength)*c.RopeScalingFactor, maxContext)),
		ModelType:    "gpt_oss", Heads: c.Heads, ExpertsPerToken: c.ExpertsPerToken, Layers: c.Layers,
		KVHeads: c.KVHeads, Experts: c.Experts, Epsilon: number(c.NormEpsilon),
		Rope:  ropeFile{number(c.RopeNTKBeta), number(c.RopeNTKAlpha), number(c.RopeScalingFactor), c.InitialContextLength, "yarn", c.RopeTruncate},
		Theta: number(c.RopeTheta), SwiGLUAlpha: number(c.SwiGLUAlpha), Limit: number(c.SwiGLULimit), TorchDType: "bfloat16", Vocab: c.VocabSize,
	}
	for layer := range c.Layers {
		kind := "full_attention"
		if c.Window(layer) > 0 {
			kind = "sliding_attention"
			f.Window = &c.SlidingWindow
		}
		f.LayerTypes = append(f.LayerTypes, kind)
	}
	if mxfp4 {
		f.Quantization = &quantizationFile{
			NotConverted: []string{"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"},
			Method:       "mxfp4",
		}
	}
	return marshal(f)
}

func marshal(file any) ([]byte, error) {
	data, err := json.MarshalIndent(file, "", "  ")
	return append(data, '\n'), err
}
