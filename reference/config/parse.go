package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/gptoss-conformance/gptoss/reference/config/strictjson"
)

// maxFileBytes bounds a config.json; the real ones have about 2 kB.
const maxFileBytes = 1 << 20

// Read reads and parses a config.json. See [Parse].
func Read(path string) (Config, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Config{}, err
	}
	if !info.Mode().IsRegular() {
		return Config{}, fmt.Errorf("%s: not a regular file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return Config{}, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return Parse(data, path)
}

// Parse reads a config.json in OpenAI's spelling (gpt_oss/torch/model.py,
// ModelConfig) or in either of Hugging Face's (transformers 4: rope_scaling and
// rope_theta; transformers 5: rope_parameters with rope_theta inside), told
// apart by their keys. The path appears in errors only.
//
// A key that the model needs is never given a default. Three things are not
// in some spellings because that implementation has them in code, and are
// taken from there: OpenAI's has no norm epsilon, no SwiGLU alpha and no layer
// pattern (1e-5, 1.702, even layers slide), transformers 4's has no alpha.
//
// Unknown keys are ignored. Keys that repeat another one (num_experts beside
// num_local_experts, rope_theta in two places) must agree. Settings that
// gpt-oss does not have (tied embeddings, attention without bias, another
// activation or RoPE type) are errors.
func Parse(data []byte, path string) (Config, error) {
	c, err := parse(data)
	if err == nil {
		err = c.Validate()
	}
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Keys that only one spelling has.
var (
	huggingFaceKeys = []string{"num_local_experts", "num_experts_per_tok", "rope_scaling", "rope_parameters", "rms_norm_eps"}
	openAIKeys      = []string{"rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta"}
)

func parse(data []byte) (Config, error) {
	if len(data) > maxFileBytes {
		return Config{}, fmt.Errorf("is longer than %d bytes: not a config.json", maxFileBytes)
	}
	o, err := readObject(data, "")
	if err != nil {
		return Config{}, err
	}
	switch {
	case slices.ContainsFunc(huggingFaceKeys, o.has):
		return parseHuggingFace(o)
	case slices.ContainsFunc(openAIKeys, o.has):
		return parseOpenAI(o)
	}
	return Config{}, fmt.Errorf("is no configuration of gpt-oss: it has neither Hugging Face's keys (%s) nor OpenAI's (%s)",
		strings.Join(huggingFaceKeys, ", "), strings.Join(openAIKeys, ", "))
}

func parseOpenAI(o *object) (Config, error) {
	c := Config{
		Layers:          o.integer("num_hidden_layers"),
		Experts:         o.integer("num_experts"),
		ExpertsPerToken: o.integer("experts_per_token"),
		VocabSize:       o.integer("vocab_size"),

		HiddenSize:       o.integer("hidden_size"),
		IntermediateSize: o.integer("intermediate_size"),
		HeadDim:          o.integer("head_dim"),
		Heads:            o.integer("num_attention_heads"),
		KVHeads:          o.integer("num_key_value_heads"),

		SlidingWindow: o.integer("sliding_window"),

		InitialContextLength: o.integer("initial_context_length"),
		RopeTheta:            o.number("rope_theta"),
		RopeScalingFactor:    o.number("rope_scaling_factor"),
		RopeNTKAlpha:         o.number("rope_ntk_alpha"),
		RopeNTKBeta:          o.number("rope_ntk_beta"),

		SwiGLULimit: o.number("swiglu_limit"),
		SwiGLUAlpha: OpenAISwiGLUAlpha,
		NormEpsilon: OpenAINormEpsilon,
	}
	if o.err != nil {
		return c, o.err
	}
	if err := checkLayers(c.Layers); err != nil {
		return c, err
	}
	c.Sliding = Alternating(c.Layers)
	return c, nil
}

func parseHuggingFace(o *object) (Config, error) {
	o.only("model_type", `"gpt_oss"`)
	o.only("hidden_act", `"silu"`)
	o.only("tie_word_embeddings", "false")
	o.only("attention_bias", "true")
	if o.has("quantization_config") {
		o.child("quantization_config").only("quant_method", `"mxfp4"`)
	}

	c := Config{
		Layers:          o.integer("num_hidden_layers"),
		Experts:         o.integer("num_local_experts", "num_experts"),
		ExpertsPerToken: o.integer("num_experts_per_tok", "experts_per_token"),
		VocabSize:       o.integer("vocab_size"),

		HiddenSize:       o.integer("hidden_size"),
		IntermediateSize: o.integer("intermediate_size"),
		HeadDim:          o.integer("head_dim"),
		Heads:            o.integer("num_attention_heads"),
		KVHeads:          o.integer("num_key_value_heads"),

		SwiGLULimit: o.number("swiglu_limit"),
		SwiGLUAlpha: OpenAISwiGLUAlpha,
		NormEpsilon: o.number("rms_norm_eps"),
	}
	if o.has("swiglu_alpha") {
		c.SwiGLUAlpha = o.number("swiglu_alpha")
	}
	parseRope(o, &c)
	if o.err != nil {
		return c, o.err
	}
	if err := checkLayers(c.Layers); err != nil {
		return c, err
	}

	types := o.strings("layer_types")
	if o.err != nil {
		return c, o.err
	}
	if len(types) != c.Layers {
		return c, fmt.Errorf("layer_types has %d elements, but num_hidden_layers is %d", len(types), c.Layers)
	}
	for i, kind := range types {
		switch kind {
		case "sliding_attention", "full_attention":
			c.Sliding = append(c.Sliding, kind == "sliding_attention")
		default:
			return c, fmt.Errorf("layer_types[%d] is %.40q, neither sliding_attention nor full_attention", i, kind)
		}
	}
	if slices.Contains(c.Sliding, true) {
		c.SlidingWindow = o.integer("sliding_window")
		if o.err == nil && c.SlidingWindow < 1 {
			return c, fmt.Errorf("sliding_window is %d, but some layers slide", c.SlidingWindow)
		}
	}
	return c, o.err
}

// parseRope reads the RoPE settings from rope_scaling and rope_theta, from
// rope_parameters, or from both if they agree.
func parseRope(o *object, c *Config) {
	var found []Config
	for _, key := range []string{"rope_scaling", "rope_parameters"} {
		if !o.has(key) {
			continue
		}
		p := o.child(key)
		p.only("rope_type", `"yarn"`)
		p.only("type", `"yarn"`) // the old name of rope_type
		if p.err == nil && !p.has("rope_type") && !p.has("type") {
			p.fail("rope_type", errMissing)
		}
		// What would change the model in ways that gpt-oss does not have.
		p.only("partial_rotary_factor", "1", "1.0")
		p.absent("mscale")
		p.absent("mscale_all_dim")

		r := Config{
			RopeScalingFactor:    p.number("factor"),
			RopeNTKBeta:          p.number("beta_fast"),
			RopeNTKAlpha:         p.number("beta_slow"),
			InitialContextLength: p.integer("original_max_position_embeddings"),
			RopeTruncate:         p.boolean("truncate"),
		}
		// transformers has no YaRN below 1 either, but scales all the same.
		if p.err == nil && r.RopeScalingFactor < 1 {
			p.fail("factor", errors.New("is below 1"))
		}
		switch {
		case p.has("rope_theta"):
			r.RopeTheta = p.number("rope_theta")
			if o.has("rope_theta") && o.number("rope_theta") != r.RopeTheta {
				o.fail("rope_theta", fmt.Errorf("is not what %s says", key))
			}
		default:
			r.RopeTheta = o.number("rope_theta")
		}
		if p.has("attention_factor") {
			// transformers lets a file replace YaRN's 0.1·ln(factor) + 1.
			want := 0.1*math.Log(r.RopeScalingFactor) + 1
			if got := p.number("attention_factor"); math.Abs(got-want) > 1e-6 {
				p.fail("attention_factor", fmt.Errorf("is %g; gpt-oss has 0.1·ln(factor) + 1 = %g", got, want))
			}
		}
		found = append(found, r)
	}
	switch {
	case len(found) == 0:
		o.fail("rope_scaling", errors.New("is missing, and so is rope_parameters"))
		return
	case len(found) == 2 && !equal(found[0], found[1]):
		o.fail("rope_scaling", errors.New("and rope_parameters say different things"))
	}
	r := found[0]
	c.RopeTheta, c.RopeScalingFactor, c.RopeTruncate = r.RopeTheta, r.RopeScalingFactor, r.RopeTruncate
	c.RopeNTKAlpha, c.RopeNTKBeta, c.InitialContextLength = r.RopeNTKAlpha, r.RopeNTKBeta, r.InitialContextLength

	// The published files repeat OpenAI's names; some people's converters more of them.
	o.agrees("initial_context_length", float64(c.InitialContextLength), "original_max_position_embeddings")
	o.agrees("rope_scaling_factor", c.RopeScalingFactor, "factor")
	o.agrees("rope_ntk_alpha", c.RopeNTKAlpha, "beta_slow")
	o.agrees("rope_ntk_beta", c.RopeNTKBeta, "beta_fast")
}

func equal(a, b Config) bool {
	return a.RopeTheta == b.RopeTheta && a.RopeScalingFactor == b.RopeScalingFactor && a.RopeTruncate == b.RopeTruncate &&
		a.RopeNTKAlpha == b.RopeNTKAlpha && a.RopeNTKBeta == b.RopeNTKBeta && a.InitialContextLength == b.InitialContextLength
}

var errMissing = errors.New("is missing; it has no default")

// object is a JSON object that is read key by key. The first error sticks.
type object struct {
	name   string // "" or "rope_scaling."
	values map[string]json.RawMessage
	err    error
	parent *object
}

func readObject(data []byte, name string) (*object, error) {
	r, err := strictjson.NewReader(data)
	if err != nil {
		return nil, err
	}
	o := &object{name: name, values: map[string]json.RawMessage{}}
	return o, r.Object(func(key string) (err error) {
		o.values[key], err = r.Raw()
		return err
	})
}

func (o *object) fail(key string, err error) {
	err = fmt.Errorf("%s%s %w", o.name, key, err)
	for p := o; p != nil; p = p.parent {
		if p.err == nil {
			p.err = err
		}
	}
}

// has reports whether the key is there and not null.
func (o *object) has(key string) bool {
	raw, ok := o.values[key]
	return ok && string(raw) != "null"
}

// get returns the text of the first of the keys that is there. All that are
// there must agree.
func (o *object) get(keys []string) (key, text string, ok bool) {
	for _, k := range keys {
		if !o.has(k) {
			continue
		}
		raw := string(o.values[k])
		if ok && raw != text {
			o.fail(key, fmt.Errorf("is %.30s, but %s is %.30s", text, k, raw))
		}
		if !ok {
			key, text, ok = k, raw, true
		}
	}
	if !ok {
		o.fail(keys[0], errMissing)
	}
	return key, text, ok
}

func (o *object) integer(keys ...string) int {
	key, text, ok := o.get(keys)
	if !ok {
		return 0
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		o.fail(key, fmt.Errorf("is %.30s, not an integer", text))
	}
	return n
}

func (o *object) number(key string) float64 {
	_, text, ok := o.get([]string{key})
	if !ok {
		return 0
	}
	// JSON numbers are a subset of what ParseFloat reads; its "inf" and "0x1p3"
	// are no JSON.
	x, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsInf(x, 0) {
		o.fail(key, fmt.Errorf("is %.30s, not a number that float64 holds", text))
	}
	return x
}

func (o *object) boolean(key string) bool {
	_, text, ok := o.get([]string{key})
	if ok && text != "true" && text != "false" {
		o.fail(key, fmt.Errorf("is %.30s, neither true nor false", text))
	}
	return text == "true"
}

func (o *object) strings(key string) []string {
	_, text, ok := o.get([]string{key})
	if !ok {
		return nil
	}
	var out []string
	r, err := strictjson.NewReader([]byte(text))
	if err == nil {
		err = r.Array(func(int) error {
			s, err := r.String()
			out = append(out, s)
			return err
		})
	}
	if err != nil {
		o.fail(key, err)
	}
	return out
}

func (o *object) child(key string) *object {
	c, err := readObject(o.values[key], o.name+key+".")
	if err != nil {
		o.fail(key, err)
	}
	if c == nil {
		c = &object{name: o.name + key + "."}
	}
	c.parent = o
	return c
}

// only fails if the key is there with another value than those given.
func (o *object) only(key string, want ...string) {
	if o.has(key) && !slices.Contains(want, string(o.values[key])) {
		o.fail(key, fmt.Errorf("is %.30s; gpt-oss has %s", o.values[key], want[0]))
	}
}

func (o *object) absent(key string) {
	if o.has(key) {
		o.fail(key, errors.New("is something that gpt-oss does not have"))
	}
}

// agrees fails if the key is there and not the number that another key gave.
func (o *object) agrees(key string, want float64, other string) {
	if o.has(key) {
		if got := o.number(key); got != want {
			o.fail(key, fmt.Errorf("is %g, but %s is %g", got, other, want))
		}
	}
}
