package checkpoint

import (
	"fmt"
	"slices"
)

// huggingFace loads the layout of transformers' GptOssForCausalLM. The experts
// are MXFP4 in OpenAI's order of bytes, or dequantized and then transposed:
// gate_up_proj [experts, hidden, 2·intermediate], down_proj [experts,
// intermediate, hidden].
func (l *loader) huggingFace(m *Model) {
	c := l.config
	m.Embedding = l.matrix("model.embed_tokens.weight", c.VocabSize, c.HiddenSize)
	for n := range c.Layers {
		layer := fmt.Sprintf("model.layers.%d.", n)
		attn, mlp, experts := layer+"self_attn.", layer+"mlp.", layer+"mlp.experts."
		m.Blocks = append(m.Blocks, Block{
			AttnNorm: l.vector(layer+"input_layernorm.weight", c.HiddenSize),
			QKV: Stack{[]Matrix{
				l.matrix(attn+"q_proj.weight", c.QueryWidth(), c.HiddenSize),
				l.matrix(attn+"k_proj.weight", c.KVWidth(), c.HiddenSize),
				l.matrix(attn+"v_proj.weight", c.KVWidth(), c.HiddenSize),
			}},
			QKVBias: slices.Concat(
				l.vector(attn+"q_proj.bias", c.QueryWidth()),
				l.vector(attn+"k_proj.bias", c.KVWidth()),
				l.vector(attn+"v_proj.bias", c.KVWidth()),
			),
			Sinks:   l.vector(attn+"sinks", c.Heads),
			Out:     l.matrix(attn+"o_proj.weight", c.HiddenSize, c.QueryWidth()),
			OutBias: l.vector(attn+"o_proj.bias", c.HiddenSize),

			MLPNorm:  l.vector(layer+"post_attention_layernorm.weight", c.HiddenSize),
			Gate:     l.matrix(mlp+"router.weight", c.Experts, c.HiddenSize),
			GateBias: l.vector(mlp+"router.bias", c.Experts),
			MLP1:     l.experts(experts+"gate_up_proj", c.Experts, 2*c.IntermediateSize, c.HiddenSize),
			MLP1Bias: l.vectors(experts+"gate_up_proj_bias", c.Experts, 2*c.IntermediateSize),
			MLP2:     l.experts(experts+"down_proj", c.Experts, c.HiddenSize, c.IntermediateSize),
			MLP2Bias: l.vectors(experts+"down_proj_bias", c.Experts, c.HiddenSize),
		})
	}
	m.FinalNorm = l.vector("model.norm.weight", c.HiddenSize)
	m.Unembedding = l.matrix("lm_head.weight", c.VocabSize, c.HiddenSize)
}

// experts loads quantized experts, or dequantized ones if that is what there is.
func (l *loader) experts(name string, experts, rows, cols int) []Matrix {
	_, blocks := l.tensors[name+"_blocks"]
	_, plain := l.tensors[name]
	if plain && !blocks {
		return l.stacked(name, experts, rows, cols, true)
	}
	return l.mxfp4(name+"_blocks", name+"_scales", experts, rows, cols)
}
