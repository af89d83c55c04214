package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/config/strictjson"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

const (
	equinoxSuffix = ".eqx"
	metaSuffix    = ".meta.json"
)

// openEquinox opens a file of eqx.tree_serialise_leaves for jax2onnx's module:
// .npy arrays one after another, without names, in the order of the module's
// fields. The configuration, from NAME.eqx.meta.json, says which come where;
// every one's shape is checked.
func (l *loader) openEquinox(m *Model, path string, o Options) error {
	l.layout = Equinox
	l.configFile = path + metaSuffix
	if o.Config != "" {
		l.configFile = o.Config
	}
	var err error
	if l.config, err = readMeta(l.configFile); err != nil {
		return err
	}
	mapping, err := tensor.Map(path)
	if err != nil {
		return err
	}
	l.add(mapping)
	if err := l.equinoxLeaves(path, mapping.Bytes()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	l.equinox(m)
	l.gateBias(m, o.UndoGateBias)
	return l.finish(m)
}

// readMeta reads the configuration of an Equinox file: in the meta file under
// "config", or a configuration by itself. If jax2onnx's tool cut the model,
// "max_layers" says to how many layers, and the configuration has the old
// number.
func readMeta(path string) (config.Config, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return config.Config{}, fmt.Errorf("%s: is missing; a checkpoint needs its configuration", path)
	}
	if err != nil {
		return config.Config{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > 1<<20 {
		return config.Config{}, fmt.Errorf("%s: not a regular file of at most 1 MiB", path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return config.Config{}, err
	}
	return parseMeta(data, path)
}

func parseMeta(data []byte, path string) (config.Config, error) {
	inner, maxLayers := data, 0
	r, err := strictjson.NewReader(data)
	if err == nil {
		err = r.Object(func(key string) (err error) {
			switch key {
			case "config":
				inner, err = r.Raw()
			case "max_layers":
				if maxLayers, err = r.Int(); err != nil {
					err = fmt.Errorf("max_layers %w", err)
				}
			default:
				_, err = r.Raw()
			}
			return err
		})
	}
	if err != nil {
		return config.Config{}, fmt.Errorf("%s: %w", path, err)
	}
	c, err := config.Parse(inner, path)
	if err == nil && maxLayers > 0 && maxLayers < c.Layers {
		c.Layers, c.Sliding = maxLayers, c.Sliding[:maxLayers]
	}
	return c, err
}

// equinoxNames lists the leaves in the order of the file, under the names of
// their fields. Tables of RoPE are stored in every block.
func equinoxNames(c config.Config) []string {
	names := []string{"embedding.weight"}
	for n := range c.Layers {
		for _, leaf := range []string{
			"attn.norm.weight", "attn.norm.eps",
			"attn.rope._concentration", "attn.rope._inv_freq", "attn.rope._cos_cache", "attn.rope._sin_cache",
			"attn.qkv.weight", "attn.qkv.bias", "attn.out.weight", "attn.out.bias", "attn.sinks",
			"mlp.norm.weight", "mlp.norm.eps", "mlp.gate.weight", "mlp.gate.bias",
			"mlp.mlp1_weight", "mlp.mlp1_bias", "mlp.mlp2_weight", "mlp.mlp2_bias",
		} {
			names = append(names, fmt.Sprintf("blocks.%d.%s", n, leaf))
		}
	}
	return append(names, "norm.weight", "norm.eps", "unembedding.weight")
}

// equinoxLeaves finds the arrays. What one is meant to be is checked later,
// when it is taken.
func (l *loader) equinoxLeaves(path string, data []byte) error {
	at := 0
	for _, name := range equinoxNames(l.config) {
		if at == len(data) {
			return fmt.Errorf("cut short: leaf %q is missing, and all after it", name)
		}
		h, err := tensor.ParseNPYHeader(data[at:min(len(data), at+1<<16)])
		if err != nil {
			return fmt.Errorf("leaf %q at byte %d: %w", name, at, err)
		}
		if h.DType == tensor.F16 {
			// jax2onnx has no such model, and one wrong byte makes '<f2' of '<V2'.
			return fmt.Errorf("leaf %q at byte %d: is float16; jax2onnx's model has float32 or bfloat16", name, at)
		}
		if h.Fortran && len(h.Shape) > 1 {
			return fmt.Errorf("leaf %q at byte %d: is in Fortran's order; save it in C order", name, at)
		}
		begin := at + h.Offset
		if h.Bytes > len(data)-begin {
			return fmt.Errorf("leaf %q at byte %d: cut short: %s %v takes %d bytes, %d are left", name, at, h.DType, h.Shape, h.Bytes, len(data)-begin)
		}
		at = begin + h.Bytes
		l.tensors[name] = located{tensor.Tensor{DType: h.DType, Shape: h.Shape, Data: data[begin:at:at]}, path, nil}
		l.names = append(l.names, name)
	}
	if at != len(data) {
		return fmt.Errorf("%d bytes after the last leaf; is num_hidden_layers right?", len(data)-at)
	}
	return nil
}

func (l *loader) equinox(m *Model) {
	c := l.config
	l.epsilon()
	m.Embedding = l.matrix("embedding.weight", c.VocabSize, c.HiddenSize)
	for n := range c.Layers {
		attn, mlp := fmt.Sprintf("blocks.%d.attn.", n), fmt.Sprintf("blocks.%d.mlp.", n)
		l.ropeTables(attn + "rope.")
		m.Blocks = append(m.Blocks, Block{
			AttnNorm: l.vector(attn+"norm.weight", c.HiddenSize),
			QKV:      l.matrix(attn+"qkv.weight", c.QKVWidth(), c.HiddenSize),
			QKVBias:  l.vector(attn+"qkv.bias", c.QKVWidth()),
			Sinks:    l.vector(attn+"sinks", c.Heads),
			Out:      l.matrix(attn+"out.weight", c.HiddenSize, c.QueryWidth()),
			OutBias:  l.vector(attn+"out.bias", c.HiddenSize),

			MLPNorm:  l.vector(mlp+"norm.weight", c.HiddenSize),
			Gate:     l.matrix(mlp+"gate.weight", c.Experts, c.HiddenSize),
			GateBias: l.vector(mlp+"gate.bias", c.Experts),
			MLP1:     l.stacked(mlp+"mlp1_weight", c.Experts, 2*c.IntermediateSize, c.HiddenSize, false),
			MLP1Bias: l.vectors(mlp+"mlp1_bias", c.Experts, 2*c.IntermediateSize),
			MLP2:     l.stacked(mlp+"mlp2_weight", c.Experts, c.HiddenSize, c.IntermediateSize, false),
			MLP2Bias: l.vectors(mlp+"mlp2_bias", c.Experts, c.HiddenSize),
		})
	}
	m.FinalNorm = l.vector("norm.weight", c.HiddenSize)
	m.Unembedding = l.matrix("unembedding.weight", c.VocabSize, c.HiddenSize)
}

// epsilon takes the norms' epsilon from the leaves, where every norm has its
// own: they must agree. float32(1e-5) stands for 1e-5, and any other value for
// the shortest decimal that gives it.
func (l *loader) epsilon() {
	names := []string{"norm.eps"}
	for n := range l.config.Layers {
		names = append(names, fmt.Sprintf("blocks.%d.attn.norm.eps", n), fmt.Sprintf("blocks.%d.mlp.norm.eps", n))
	}
	var first float32
	for i, name := range names {
		v, ok := l.scalar(name)
		switch {
		case !ok:
		case i == 0:
			first = v
		case v != first:
			l.issue("%s: leaf %q is %g, but norm.eps is %g", l.where(), name, v, first)
		}
	}
	if len(l.issues) > 0 {
		return
	}
	l.config.NormEpsilon, _ = strconv.ParseFloat(strconv.FormatFloat(float64(first), 'g', -1, 32), 64)
	if err := l.config.Validate(); err != nil {
		l.issue("%s: leaf \"norm.eps\": %v", l.where(), err)
	}
}

// scalar takes a leaf of shape [].
func (l *loader) scalar(name string) (float32, bool) {
	t, ok := l.take(name, isDense, denseTypes)
	if !ok {
		return 0, false
	}
	v := l.decode(name, t)
	return v[0], len(v) == 1
}

// ropeTables checks the tables of RoPE that every block carries, and drops
// them: they are the configuration once more. Equinox computes them in
// float32, so that inv_freq may be off by some hundred roundings inside YaRN's
// ramp (a difference of two frequencies 32 times apart, times a quotient of
// differences), and the angle by its own rounding.
func (l *loader) ropeTables(prefix string) {
	const u = 0x1p-24 // unit roundoff of float32
	c := l.config
	inverse, concentration := ropeFrequencies(c)
	differs := func(name string, got, want, bound float64, at ...int) bool {
		if math.Abs(got-want) <= bound {
			return false
		}
		l.issue("%s: leaf %q is not what the configuration gives: %v is %g, want %g", l.where(), prefix+name, at, got, want)
		return true
	}
	if v, ok := l.scalar(prefix + "_concentration"); ok {
		differs("_concentration", float64(v), concentration, 8*u*concentration)
	}
	half := c.HeadDim / 2
	stored := l.vector(prefix+"_inv_freq", half)
	for i, v := range stored {
		if differs("_inv_freq", float64(v), inverse[i], 2048*u*inverse[i], i) {
			return
		}
	}
	for name, function := range map[string]func(float64) float64{"_cos_cache": math.Cos, "_sin_cache": math.Sin} {
		rows := l.vectors(prefix+name, c.InitialContextLength, half)
		for position, row := range rows {
			for i, v := range row {
				if i >= len(stored) {
					return
				}
				angle := float64(position) * float64(stored[i])
				if differs(name, float64(v), concentration*function(angle), concentration*(4*u*angle+8*u), position, i) {
					return
				}
			}
		}
	}
}

// ropeFrequencies computes 1/frequency for every pair and YaRN's concentration
// (gpt_oss/torch/model.py, RotaryEmbedding).
func ropeFrequencies(c config.Config) (inverse []float64, concentration float64) {
	half := float64(c.HeadDim) / 2
	bound := func(rotations float64) float64 {
		return half * math.Log(float64(c.InitialContextLength)/(rotations*2*math.Pi)) / math.Log(c.RopeTheta)
	}
	low, high := bound(c.RopeNTKBeta), bound(c.RopeNTKAlpha)
	concentration = 1
	if c.RopeScalingFactor > 1 {
		concentration = 0.1*math.Log(c.RopeScalingFactor) + 1
	}
	for i := range c.HeadDim / 2 {
		f := math.Pow(c.RopeTheta, -float64(i)/half)
		if c.RopeScalingFactor > 1 {
			ramp := min(max((float64(i)-low)/(high-low), 0), 1)
			f = f/c.RopeScalingFactor*ramp + f*(1-ramp)
		}
		inverse = append(inverse, f)
	}
	return inverse, concentration
}

// gateBiasStep is what jax2onnx's load_pretrained_gpt_oss takes from the gate's
// bias of expert i, i times, to break ties in favour of lower experts.
const gateBiasStep = float32(1e-6)

// gateBias reports gate biases that carry jax2onnx's tie breaker, or undoes it:
// add it again and round to bfloat16, which the original had. It is recognised
// by its trace, so that undoing twice does no harm.
func (l *loader) gateBias(m *Model, undo bool) {
	if len(l.issues) > 0 {
		return
	}
	shifted := len(m.Blocks) > 0 && l.config.Experts > 1
	restored := make([][]float32, len(m.Blocks))
	for n, b := range m.Blocks {
		restored[n] = make([]float32, len(b.GateBias))
		for i, v := range b.GateBias {
			step := float32(i) * gateBiasStep
			restored[n][i] = tensor.BFloat16(tensor.ToBFloat16(v + step))
			// The telling sign: a bfloat16 less the step, rounded to float32.
			shifted = shifted && restored[n][i]-step == v
		}
	}
	switch {
	case undo && !shifted:
		m.Notes = append(m.Notes, fmt.Sprintf("%s: the gate biases don't carry jax2onnx's tie breaker; --undo-gate-bias left them as they are", l.where()))
	case undo:
		for n := range m.Blocks {
			m.Blocks[n].GateBias = restored[n]
		}
	case shifted:
		m.Notes = append(m.Notes, fmt.Sprintf("%s: the gate biases carry jax2onnx's tie breaker (expert i's is lower by i · 1e-6); --undo-gate-bias restores them", l.where()))
	}
}

// equinox plans one .eqx file: arrays in the order of the model's leaves.
func (p *plan) equinox(path string) ([]*output, map[*output][]item, error) {
	if d := p.options.DType; d != "" && d != tensor.F32 && d != tensor.BF16 {
		return nil, nil, fmt.Errorf("jax2onnx's Equinox model has float32 or bfloat16 parameters, not %s", d)
	}
	c := p.Config
	c.NormEpsilon = 1e-5 // it is in the leaves, and not in the configuration
	configText, err := c.MarshalOpenAI()
	if err != nil {
		return nil, nil, err
	}
	paramType := "float32"
	if p.options.DType == tensor.BF16 {
		paramType = "bfloat16"
	}
	text, err := json.MarshalIndent(map[string]any{"config": json.RawMessage(configText), "param_dtype": paramType, "seed": 0}, "", "  ")
	if err != nil {
		return nil, nil, err
	}

	table := func(name string, shape []int, values []float32) item {
		t := tensor.FromFloat32s(shape, values)
		return item{Spec: tensor.Spec{Name: name, DType: t.DType, Shape: shape}, raw: t.Data}
	}
	epsilon := func(name string) item {
		return table(name, nil, []float32{float32(p.Config.NormEpsilon)})
	}
	inverse, concentration := ropeFrequencies(c)
	half := len(inverse)
	frequencies := make([]float32, half)
	for i, f := range inverse {
		frequencies[i] = float32(f)
	}
	cos, sin := make([]float32, c.InitialContextLength*half), make([]float32, c.InitialContextLength*half)
	for i := range cos {
		angle := float64(i/half) * inverse[i%half]
		cos[i], sin[i] = float32(math.Cos(angle)*concentration), float32(math.Sin(angle)*concentration)
	}

	items := []item{p.matrix("embedding.weight", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		to := fmt.Sprintf("blocks.%d.", n)
		items = append(items,
			normScale(p.vector(to+"attn.norm.weight", attn+"norm.scale", b.AttnNorm)),
			epsilon(to+"attn.norm.eps"),
			table(to+"attn.rope._concentration", nil, []float32{float32(concentration)}),
			table(to+"attn.rope._inv_freq", []int{half}, frequencies),
			table(to+"attn.rope._cos_cache", []int{c.InitialContextLength, half}, cos),
			table(to+"attn.rope._sin_cache", []int{c.InitialContextLength, half}, sin),
			p.matrix(to+"attn.qkv.weight", attn+"qkv.weight", false, b.QKV),
			p.vector(to+"attn.qkv.bias", attn+"qkv.bias", b.QKVBias),
			p.matrix(to+"attn.out.weight", attn+"out.weight", false, b.Out),
			p.vector(to+"attn.out.bias", attn+"out.bias", b.OutBias),
			p.vector(to+"attn.sinks", attn+"sinks", b.Sinks),
			normScale(p.vector(to+"mlp.norm.weight", mlp+"norm.scale", b.MLPNorm)),
			epsilon(to+"mlp.norm.eps"),
			p.matrix(to+"mlp.gate.weight", mlp+"gate.weight", false, b.Gate),
			p.vector(to+"mlp.gate.bias", mlp+"gate.bias", b.GateBias),
			p.experts(to+"mlp.mlp1_weight", mlp+"mlp1_weight", false, b.MLP1),
			p.vectors(to+"mlp.mlp1_bias", mlp+"mlp1_bias", b.MLP1Bias),
			p.experts(to+"mlp.mlp2_weight", mlp+"mlp2_weight", false, b.MLP2),
			p.vectors(to+"mlp.mlp2_bias", mlp+"mlp2_bias", b.MLP2Bias),
		)
	}
	items = append(items, normScale(p.vector("norm.weight", "norm.scale", p.FinalNorm)), epsilon("norm.eps"),
		p.matrix("unembedding.weight", "unembedding.weight", false, p.Unembedding))

	path = filePath(Equinox, path)
	o := &output{path: path}
	for _, i := range items {
		head, err := tensor.NPYHead(i.Spec)
		if err != nil {
			return nil, nil, err
		}
		size, err := i.Size()
		if err != nil {
			return nil, nil, err
		}
		o.put(head)
		o.reserve(i.Name, int64(size))
	}
	meta := textFile(path+metaSuffix, append(text, '\n'))
	return []*output{o, meta}, map[*output][]item{o: items}, nil
}
