package config

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// gptOSS is gpt-oss-20b's configuration, or with 36 layers and 128 experts
// 120b's.
func gptOSS(layers, experts int) Config {
	return Config{
		Layers: layers, Experts: experts, ExpertsPerToken: 4, VocabSize: 201088,
		HiddenSize: 2880, IntermediateSize: 2880, HeadDim: 64, Heads: 64, KVHeads: 8,
		SlidingWindow: 128, Sliding: Alternating(layers),
		InitialContextLength: 4096, RopeTheta: 150000, RopeScalingFactor: 32, RopeNTKAlpha: 1, RopeNTKBeta: 32,
		SwiGLULimit: 7, SwiGLUAlpha: 1.702, NormEpsilon: 1e-5,
	}
}

func layerTypes(layers int) string {
	var types []string
	for i := range layers {
		types = append(types, []string{`"sliding_attention"`, `"full_attention"`}[i%2])
	}
	return "[" + strings.Join(types, ",") + "]"
}

// As published with the models, in the three spellings.
func published(layers, experts int) map[string]string {
	huggingFace := func(rope string) string {
		return fmt.Sprintf(`{
	"architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0, "eos_token_id": 200002,
	"experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
	"initializer_range": 0.02, "intermediate_size": 2880, "layer_types": %s, "max_position_embeddings": 131072,
	"model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": %d,
	"num_key_value_heads": 8, "num_local_experts": %d, "output_router_logits": false, "pad_token_id": 199999,
	"quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
	"rms_norm_eps": 1e-05, %s, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
	"tie_word_embeddings": false, "transformers_version": "4.55.0.dev0", "use_cache": true, "vocab_size": 201088}`,
			layerTypes(layers), layers, experts, rope)
	}
	return map[string]string{
		"OpenAI": fmt.Sprintf(`{"num_hidden_layers": %d, "num_experts": %d, "experts_per_token": 4, "vocab_size": 201088,
	"hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
	"num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000,
	"rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32}`, layers, experts),
		"transformers 4": huggingFace(`"rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
	"original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false}, "rope_theta": 150000`),
		"transformers 5": huggingFace(`"rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
	"original_max_position_embeddings": 4096, "rope_theta": 150000.0, "rope_type": "yarn", "truncate": false}, "swiglu_alpha": 1.702`),
		"both": huggingFace(`"rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
	"original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false}, "rope_theta": 150000,
	"rope_parameters": {"beta_fast": 32, "beta_slow": 1, "factor": 32, "original_max_position_embeddings": 4096,
	"rope_theta": 150000.0, "type": "yarn", "rope_type": "yarn", "truncate": false, "attention_factor": 1.3465735902799727, "mscale": null, "partial_rotary_factor": 1.0}`),
	}
}

func TestParsePublished(t *testing.T) {
	for _, size := range [][2]int{{24, 32}, {36, 128}} {
		for name, text := range published(size[0], size[1]) {
			t.Run(fmt.Sprintf("%s with %d layers", name, size[0]), func(t *testing.T) {
				got, err := Parse([]byte(text), "config.json")
				require.NoError(t, err)
				assert.Equal(t, gptOSS(size[0], size[1]), got)
			})
		}
	}
}

// testdata has what transformers itself wrote; see testdata/make.py.
func TestReadRealFiles(t *testing.T) {
	got, err := Read(filepath.Join("testdata", "transformers5.json"))
	require.NoError(t, err)
	want := gptOSS(24, 32)
	assert.Equal(t, want, got)
}

// change applies one replacement, which must apply.
func change(t *testing.T, text, old, new string) []byte {
	require.Contains(t, text, old)
	return []byte(strings.Replace(text, old, new, 1))
}

func TestParseRefusals(t *testing.T) {
	const openAI, four, five, both = "OpenAI", "transformers 4", "transformers 5", "both"
	files := published(24, 32)
	for _, test := range []struct{ from, old, new, want string }{
		{openAI, `"num_hidden_layers": 24`, `"num_hidden_layers": 24.0`, "num_hidden_layers is 24.0, not an integer"},
		{openAI, `"num_hidden_layers": 24`, `"num_hidden_layers": "24"`, "not an integer"},
		{openAI, `"num_hidden_layers": 24`, `"num_hidden_layers": 0`, "not between 1 and"},
		{openAI, `"num_hidden_layers": 24`, `"num_hidden_layers": 1000000000`, "not between 1 and"},
		{openAI, `"num_hidden_layers": 24`, `"num_hidden_layers": 99999999999999999999`, "not an integer"},
		{openAI, `"num_hidden_layers": 24, `, `"num_hidden_layers": 24, "num_hidden_layers": 24, `, "occurs twice"},
		{openAI, `"num_hidden_layers": 24`, `"num_hidden_layers": null`, "num_hidden_layers is missing"},
		{openAI, `"num_hidden_layers": 24, `, ``, "num_hidden_layers is missing; it has no default"},
		{openAI, `"num_experts": 32, `, ``, "num_experts is missing"},
		{openAI, `"swiglu_limit": 7.0, `, ``, "swiglu_limit is missing"},
		{openAI, `"swiglu_limit": 7.0`, `"swiglu_limit": -7.0`, "swiglu_limit is -7, not a positive number"},
		{openAI, `"swiglu_limit": 7.0`, `"swiglu_limit": true`, "not a number"},
		{openAI, `"swiglu_limit": 7.0`, `"swiglu_limit": NaN`, "not valid JSON"},
		{openAI, `"rope_theta": 150000`, `"rope_theta": 1e999`, "not a number that float64 holds"},
		{openAI, `"rope_theta": 150000`, `"rope_theta": 1`, "rope_theta is 1, not a number above 1"},
		{openAI, `"rope_theta": 150000`, `"rope_theta": [150000]`, "not a number"},
		{openAI, `"hidden_size": 2880`, `"hidden_size": -2880`, "hidden_size is -2880"},
		{openAI, `"experts_per_token": 4`, `"experts_per_token": 33`, "only 32 experts"},
		{openAI, `"num_key_value_heads": 8`, `"num_key_value_heads": 7`, "not a multiple"},
		{openAI, `"head_dim": 64`, `"head_dim": 63`, "even"},
		{openAI, `"sliding_window": 128`, `"sliding_window": -1`, "sliding_window is -1"},
		{openAI, `"rope_ntk_beta": 32`, `"rope_ntk_beta": 0.5`, "YaRN's ramp"},
		{openAI, `"rope_ntk_beta": 32`, `"rope_ntk_beta": 1000`, "YaRN's ramp"},
		{openAI, `"initial_context_length": 4096`, `"initial_context_length": 100000000`, "YaRN's ramp"},
		{openAI, `"rope_scaling_factor": 32.0`, `"rope_scaling_factor": 0`, "not a positive number"},
		{four, `"model_type": "gpt_oss"`, `"model_type": "llama"`, `model_type is "llama"; gpt-oss has "gpt_oss"`},
		{four, `"hidden_act": "silu"`, `"hidden_act": "gelu"`, "hidden_act"},
		{four, `"tie_word_embeddings": false`, `"tie_word_embeddings": true`, "tie_word_embeddings is true; gpt-oss has false"},
		{four, `"attention_bias": true`, `"attention_bias": false`, "attention_bias"},
		{four, `"quant_method": "mxfp4"`, `"quant_method": "gptq"`, `quantization_config.quant_method is "gptq"`},
		{four, `"num_local_experts": 32`, `"num_local_experts": 32, "num_experts": 16`, "num_local_experts is 32, but num_experts is 16"},
		{four, `"num_local_experts": 32, `, ``, "num_local_experts is missing"},
		{four, `"experts_per_token": 4`, `"experts_per_token": 2`, "num_experts_per_tok is 4, but experts_per_token is 2"},
		{four, `"initial_context_length": 4096`, `"initial_context_length": 8192`, "initial_context_length is 8192, but original_max_position_embeddings is 4096"},
		{four, `"layer_types": ["sliding_attention",`, `"layer_types": [`, "layer_types has 23 elements, but num_hidden_layers is 24"},
		{four, `"layer_types": ["sliding_attention",`, `"layer_types": ["chunked_attention",`, `layer_types[0] is "chunked_attention"`},
		{four, `"layer_types": ["sliding_attention",`, `"layer_types": [1,`, "layer_types is a number, not a string"},
		{four, `"sliding_window": 128`, `"sliding_window": null`, "sliding_window is missing"},
		{four, `"sliding_window": 128`, `"sliding_window": 0`, "sliding_window is 0, but some layers slide"},
		{four, `"rms_norm_eps": 1e-05, `, ``, "rms_norm_eps is missing"},
		{four, `"swiglu_limit": 7.0,`, ``, "swiglu_limit is missing"},
		{four, `, "truncate": false`, ``, "rope_scaling.truncate is missing"},
		{four, `"truncate": false`, `"truncate": 0`, "neither true nor false"},
		{four, `"rope_type": "yarn"`, `"rope_type": "llama3"`, `rope_scaling.rope_type is "llama3"`},
		{four, `"rope_type": "yarn", `, ``, "rope_scaling.rope_type is missing"},
		{four, `"factor": 32.0`, `"factor": 0.5`, "rope_scaling.factor is below 1"},
		{four, `"factor": 32.0`, `"factor": 32.0, "factor": 32.0`, `key "factor" occurs twice`},
		{four, `"factor": 32.0`, `"factor": 32.0, "mscale": 1.0`, "rope_scaling.mscale"},
		{four, `"factor": 32.0`, `"factor": 32.0, "attention_factor": 1.0`, "rope_scaling.attention_factor is 1"},
		{four, `"factor": 32.0`, `"factor": 32.0, "partial_rotary_factor": 0.5`, "partial_rotary_factor"},
		{four, `"original_max_position_embeddings": 4096, `, ``, "rope_scaling.original_max_position_embeddings is missing"},
		{four, `, "rope_theta": 150000`, ``, "rope_theta is missing"},
		{four, `"rope_scaling": {`, `"other": {`, "rope_scaling is missing, and so is rope_parameters"},
		{four, `"rope_scaling": {`, `"rope_scaling": null, "other": {`, "rope_scaling is missing"},
		{five, `"rope_parameters": {`, `"rope_theta": 10000, "rope_parameters": {`, "rope_theta is not what rope_parameters says"},
		{five, `"rope_theta": 150000.0, `, ``, "rope_theta is missing"},
		{five, `"rope_parameters": {`, `"rope_parameters": [], "x": {`, "rope_parameters is an array, not an object"},
		{five, `"swiglu_alpha": 1.702`, `"swiglu_alpha": "1.702"`, "swiglu_alpha"},
		{both, `"beta_slow": 1,`, `"beta_slow": 2,`, "rope_scaling and rope_parameters say different things"},
	} {
		t.Run(test.want+" after "+test.new, func(t *testing.T) {
			_, err := Parse(change(t, files[test.from], test.old, test.new), "some/config.json")
			require.ErrorContains(t, err, test.want)
			assert.True(t, strings.HasPrefix(err.Error(), "some/config.json: "), err)
			assert.NotContains(t, err.Error(), "\n")
		})
	}
	for name, text := range map[string]string{
		"is not valid JSON":                    "",
		"is an array, not an object":           "[]",
		"is no configuration of gpt-oss":       `{"num_hidden_layers": 24}`,
		"is longer than":                       strings.Repeat(" ", maxFileBytes) + "{}",
		"is not valid JSON: invalid character": `{} {}`,
	} {
		_, err := Parse([]byte(text), "config.json")
		require.ErrorContains(t, err, name)
	}
}

// A key is missing in each of the files in turn: an error, unless it is one that
// the model does not need or that repeats another.
func TestEveryNeededKeyIsNeeded(t *testing.T) {
	optional := map[string]bool{}
	for _, key := range []string{"architectures", "attention_bias", "attention_dropout", "eos_token_id", "experts_per_token", "num_experts_per_tok",
		"hidden_act", "initial_context_length", "initializer_range", "max_position_embeddings", "model_type", "output_router_logits",
		"pad_token_id", "quantization_config", "router_aux_loss_coef", "tie_word_embeddings", "transformers_version", "use_cache", "swiglu_alpha"} {
		optional[key] = true
	}
	for name, text := range published(24, 32) {
		if name == "both" {
			continue
		}
		var whole map[string]any
		require.NoError(t, json.Unmarshal([]byte(text), &whole))
		for key := range whole {
			value := whole[key]
			delete(whole, key)
			data, err := json.Marshal(whole)
			require.NoError(t, err)
			whole[key] = value
			got, err := Parse(data, "config.json")
			if optional[key] && !(name == "OpenAI" && (key == "initial_context_length" || key == "experts_per_token")) {
				require.NoError(t, err, key)
				require.Equal(t, gptOSS(24, 32), got)
				continue
			}
			require.ErrorContains(t, err, key, name)
			require.ErrorContains(t, err, "missing", name)
		}
	}
}

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.json")
	_, err := Read(path)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Read(t.TempDir())
	require.ErrorContains(t, err, "not a regular file")
	require.NoError(t, os.WriteFile(path, []byte(published(24, 32)["OpenAI"]), 0o666))
	got, err := Read(path)
	require.NoError(t, err)
	require.Equal(t, gptOSS(24, 32), got)
}

// small has values that differ from gpt-oss's everywhere.
func small() Config {
	return Config{
		Layers: 3, Experts: 6, ExpertsPerToken: 2, VocabSize: 97, HiddenSize: 96, IntermediateSize: 64,
		HeadDim: 16, Heads: 6, KVHeads: 2, SlidingWindow: 5, Sliding: Alternating(3),
		InitialContextLength: 256, RopeTheta: 10000.5, RopeScalingFactor: 4.25, RopeNTKAlpha: 1.25, RopeNTKBeta: 16,
		SwiGLULimit: 5.5, SwiGLUAlpha: 1.702, NormEpsilon: 1e-5,
	}
}

func TestMarshalRoundTrip(t *testing.T) {
	for _, c := range []Config{gptOSS(24, 32), gptOSS(36, 128), small()} {
		data, err := c.MarshalOpenAI()
		require.NoError(t, err)
		got, err := Parse(data, "config.json")
		require.NoError(t, err)
		require.Equal(t, c, got)
		for _, mxfp4 := range []bool{true, false} {
			data, err = c.MarshalHuggingFace(mxfp4)
			require.NoError(t, err)
			require.Equal(t, mxfp4, strings.Contains(string(data), "quantization_config"))
			got, err = Parse(data, "config.json")
			require.NoError(t, err)
			require.Equal(t, c, got)
		}
	}
}

func TestMarshalWhatOnlyHuggingFaceHas(t *testing.T) {
	for name, alter := range map[string]func(*Config){
		"rms_norm_eps": func(c *Config) { c.NormEpsilon = 1e-6 },
		"swiglu_alpha": func(c *Config) { c.SwiGLUAlpha = 1.5 },
		"truncates":    func(c *Config) { c.RopeTruncate = true },
		"layer 1":      func(c *Config) { c.Sliding = []bool{true, true, false} },
		"layer 0":      func(c *Config) { c.Sliding = []bool{false, true, true} },
	} {
		c := small()
		alter(&c)
		_, err := c.MarshalOpenAI()
		require.ErrorContains(t, err, name)
		data, err := c.MarshalHuggingFace(true)
		require.NoError(t, err)
		got, err := Parse(data, "config.json")
		require.NoError(t, err)
		require.Equal(t, c, got)
	}
}

func TestMarshalWithoutWindow(t *testing.T) {
	windows := func(c Config) (w []int) {
		for i := range c.Layers {
			w = append(w, c.Window(i))
		}
		return w
	}
	c := small()
	c.Sliding = make([]bool, 3)
	data, err := c.MarshalOpenAI()
	require.NoError(t, err)
	got, err := Parse(data, "config.json")
	require.NoError(t, err)
	require.Equal(t, []int{0, 0, 0}, windows(got), "a window of 0 is none, as in model.py")
	data, err = got.MarshalHuggingFace(false)
	require.NoError(t, err)
	got, err = Parse(data, "config.json")
	require.NoError(t, err)
	require.Equal(t, []int{0, 0, 0}, windows(got))
}

func TestMarshalRefuses(t *testing.T) {
	c := small()
	c.RopeScalingFactor = 0.5
	_, err := c.MarshalHuggingFace(true)
	require.ErrorContains(t, err, "0.5")
	c.Heads = 0
	_, err = c.MarshalHuggingFace(true)
	require.Error(t, err)
	_, err = c.MarshalOpenAI()
	require.Error(t, err)
}

// Any change of one byte gives an error or a valid configuration, and so does
// any cut; neither panics.
func TestDamage(t *testing.T) {
	for _, text := range published(2, 32) {
		for at := range len(text) {
			_, err := Parse([]byte(text[:at]), "config.json")
			require.Error(t, err)
			damaged := []byte(text)
			for _, b := range []byte{0, '"', '9', ' ', text[at] ^ 1, text[at] | 0x80} {
				damaged[at] = b
				if c, err := Parse(damaged, "config.json"); err == nil {
					require.NoError(t, c.Validate())
				}
			}
		}
	}
}

func FuzzConfig(f *testing.F) {
	for _, text := range published(2, 32) {
		f.Add([]byte(text))
	}
	data, err := os.ReadFile(filepath.Join("testdata", "transformers5.json"))
	require.NoError(f, err)
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data, "config.json")
		if err != nil {
			return
		}
		require.NoError(t, c.Validate())
		if c.RopeScalingFactor >= 1 {
			out, err := c.MarshalHuggingFace(true)
			require.NoError(t, err)
			_, err = Parse(out, "config.json")
			require.NoError(t, err)
		}
	})
}
