package checkpoint

import (
	"fmt"
	"os"
	"strings"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

const flaxSuffix = ".msgpack"

// openFlax opens a Flax bundle as jax2onnx's export_flax_gpt_oss_params.py
// writes it: nested maps of arrays, Flax's kernels [in, out], the experts dense
// and [out, in]. The maps may be wrapped in one called "params".
func (l *loader) openFlax(m *Model, path string, o Options) error {
	if o.UndoGateBias {
		return fmt.Errorf("%s: only an Equinox file can have a gate bias to undo", m.Source.Path)
	}
	l.layout = Flax
	var err error
	if l.configFile, err = flaxConfig(path, o.Config); err != nil {
		return err
	}
	mapping, err := tensor.Map(path)
	if err != nil {
		return err
	}
	l.add(mapping)
	arrays, err := indexMsgpack(mapping.Bytes())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	wrapped := true
	for _, a := range arrays {
		wrapped = wrapped && strings.HasPrefix(a.name, "params/")
	}
	for _, a := range arrays {
		if wrapped {
			a.name = strings.TrimPrefix(a.name, "params/")
		}
		l.tensors[a.name] = located{a.Tensor, path, a.chunks}
		l.names = append(l.names, a.name)
	}
	if err := l.readConfig(); err != nil {
		return err
	}
	l.flax(m)
	return l.finish(m)
}

// flaxConfig finds the configuration beside a bundle, under both of the names
// that people give it.
func flaxConfig(path, given string) (string, error) {
	if given != "" {
		return given, nil
	}
	names := []string{strings.TrimSuffix(path, flaxSuffix) + ".config.json", path + ".config.json"}
	for _, name := range names {
		if _, err := os.Stat(name); err == nil {
			return name, nil
		}
	}
	return "", fmt.Errorf("%s: has neither %s nor %s beside it; name its configuration with --config", path, names[0], names[1])
}

func (l *loader) flax(m *Model) {
	c := l.config
	m.Embedding = l.matrix("embedding/embedding", c.VocabSize, c.HiddenSize)
	for n := range c.Layers {
		attn, mlp := fmt.Sprintf("block_%d/attn/", n), fmt.Sprintf("block_%d/mlp/", n)
		m.Blocks = append(m.Blocks, Block{
			AttnNorm: l.vector(attn+"norm/scale", c.HiddenSize),
			QKV:      l.kernel(attn+"qkv/kernel", c.QKVWidth(), c.HiddenSize),
			QKVBias:  l.vector(attn+"qkv/bias", c.QKVWidth()),
			Sinks:    l.vector(attn+"sinks", c.Heads),
			Out:      l.kernel(attn+"out/kernel", c.HiddenSize, c.QueryWidth()),
			OutBias:  l.vector(attn+"out/bias", c.HiddenSize),

			MLPNorm:  l.vector(mlp+"norm/scale", c.HiddenSize),
			Gate:     l.kernel(mlp+"gate/kernel", c.Experts, c.HiddenSize),
			GateBias: l.vector(mlp+"gate/bias", c.Experts),
			MLP1:     l.stacked(mlp+"mlp1_weight", c.Experts, 2*c.IntermediateSize, c.HiddenSize, false),
			MLP1Bias: l.vectors(mlp+"mlp1_bias", c.Experts, 2*c.IntermediateSize),
			MLP2:     l.stacked(mlp+"mlp2_weight", c.Experts, c.HiddenSize, c.IntermediateSize, false),
			MLP2Bias: l.vectors(mlp+"mlp2_bias", c.Experts, c.HiddenSize),
		})
	}
	m.FinalNorm = l.vector("norm/scale", c.HiddenSize)
	m.Unembedding = l.kernel("unembedding/kernel", c.VocabSize, c.HiddenSize)
}

// flax plans one msgpack file of dense arrays, matrices transposed to kernels.
func (p *plan) flax(path string) ([]*output, map[*output][]item, error) {
	text, err := p.Config.MarshalOpenAI()
	if err != nil {
		return nil, nil, err
	}
	items := []item{p.matrix("embedding/embedding", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		to := fmt.Sprintf("block_%d/", n)
		items = append(items,
			normScale(p.vector(to+"attn/norm/scale", attn+"norm.scale", b.AttnNorm)),
			p.matrix(to+"attn/qkv/kernel", attn+"qkv.weight", true, b.QKV),
			p.vector(to+"attn/qkv/bias", attn+"qkv.bias", b.QKVBias),
			p.vector(to+"attn/sinks", attn+"sinks", b.Sinks),
			p.matrix(to+"attn/out/kernel", attn+"out.weight", true, b.Out),
			p.vector(to+"attn/out/bias", attn+"out.bias", b.OutBias),
			normScale(p.vector(to+"mlp/norm/scale", mlp+"norm.scale", b.MLPNorm)),
			p.matrix(to+"mlp/gate/kernel", mlp+"gate.weight", true, b.Gate),
			p.vector(to+"mlp/gate/bias", mlp+"gate.bias", b.GateBias),
			p.experts(to+"mlp/mlp1_weight", mlp+"mlp1_weight", false, b.MLP1),
			p.vectors(to+"mlp/mlp1_bias", mlp+"mlp1_bias", b.MLP1Bias),
			p.experts(to+"mlp/mlp2_weight", mlp+"mlp2_weight", false, b.MLP2),
			p.vectors(to+"mlp/mlp2_bias", mlp+"mlp2_bias", b.MLP2Bias),
		)
	}
	items = append(items, normScale(p.vector("norm/scale", "norm.scale", p.FinalNorm)), p.matrix("unembedding/kernel", "unembedding.weight", true, p.Unembedding))
	path = filePath(Flax, path)
	o, err := layOutMsgpack(path, items)
	if err != nil {
		return nil, nil, err
	}
	config := textFile(strings.TrimSuffix(path, flaxSuffix)+".config.json", text)
	return []*output{o, config}, map[*output][]item{o: items}, nil
}

// normScale stores a norm's scale as float32, as all implementations have it.
func normScale(i item) item {
	i.DType = tensor.F32
	return i
}
