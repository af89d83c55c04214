package checkpoint

import "fmt"

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
