package checkpoint

import (
	"fmt"
	"path/filepath"
)

// openAI loads OpenAI's layout (gpt_oss/torch/weights.py): names of model.py's
// parameters, experts in MXFP4.
func (l *loader) openAI(m *Model) {
	c := l.config
	m.Embedding = l.matrix("embedding.weight", c.VocabSize, c.HiddenSize)
	for n := range c.Layers {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		m.Blocks = append(m.Blocks, Block{
			AttnNorm: l.vector(attn+"norm.scale", c.HiddenSize),
			QKV:      l.matrix(attn+"qkv.weight", c.QKVWidth(), c.HiddenSize),
			QKVBias:  l.vector(attn+"qkv.bias", c.QKVWidth()),
			Sinks:    l.vector(attn+"sinks", c.Heads),
			Out:      l.matrix(attn+"out.weight", c.HiddenSize, c.QueryWidth()),
			OutBias:  l.vector(attn+"out.bias", c.HiddenSize),

			MLPNorm:  l.vector(mlp+"norm.scale", c.HiddenSize),
			Gate:     l.matrix(mlp+"gate.weight", c.Experts, c.HiddenSize),
			GateBias: l.vector(mlp+"gate.bias", c.Experts),
			MLP1:     l.mxfp4(mlp+"mlp1_weight.blocks", mlp+"mlp1_weight.scales", c.Experts, 2*c.IntermediateSize, c.HiddenSize),
			MLP1Bias: l.vectors(mlp+"mlp1_bias", c.Experts, 2*c.IntermediateSize),
			MLP2:     l.mxfp4(mlp+"mlp2_weight.blocks", mlp+"mlp2_weight.scales", c.Experts, c.HiddenSize, c.IntermediateSize),
			MLP2Bias: l.vectors(mlp+"mlp2_bias", c.Experts, c.HiddenSize),
		})
	}
	m.FinalNorm = l.vector("norm.scale", c.HiddenSize)
	m.Unembedding = l.matrix("unembedding.weight", c.VocabSize, c.HiddenSize)
}

// openAI plans OpenAI's layout: safetensors, experts in MXFP4.
func (p *plan) openAI(path string) ([]*output, map[*output][]item, error) {
	text, err := p.Config.MarshalOpenAI()
	if err != nil {
		return nil, nil, err
	}
	items := []item{p.matrix("embedding.weight", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		vector := func(name string, v []float32) { items = append(items, p.vector(name, name, v)) }
		matrix := func(name string, m Matrix) { items = append(items, p.matrix(name, name, false, m)) }
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		vector(attn+"norm.scale", b.AttnNorm)
		matrix(attn+"qkv.weight", b.QKV)
		vector(attn+"qkv.bias", b.QKVBias)
		vector(attn+"sinks", b.Sinks)
		matrix(attn+"out.weight", b.Out)
		vector(attn+"out.bias", b.OutBias)
		vector(mlp+"norm.scale", b.MLPNorm)
		matrix(mlp+"gate.weight", b.Gate)
		vector(mlp+"gate.bias", b.GateBias)
		items = append(items, packedExperts(mlp+"mlp1_weight.blocks", mlp+"mlp1_weight.scales", b.MLP1)...)
		items = append(items, p.vectors(mlp+"mlp1_bias", mlp+"mlp1_bias", b.MLP1Bias))
		items = append(items, packedExperts(mlp+"mlp2_weight.blocks", mlp+"mlp2_weight.scales", b.MLP2)...)
		items = append(items, p.vectors(mlp+"mlp2_bias", mlp+"mlp2_bias", b.MLP2Bias))
	}
	items = append(items, p.vector("norm.scale", "norm.scale", p.FinalNorm), p.matrix("unembedding.weight", "unembedding.weight", false, p.Unembedding))
	outputs, byFile, err := p.shards(path, items, "model--%05d-of-%05d.safetensors")
	return append(outputs, textFile(filepath.Join(path, configName), text)), byFile, err
}
