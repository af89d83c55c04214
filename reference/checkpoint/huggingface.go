package checkpoint

import (
	"fmt"
	"path/filepath"
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

// huggingFace plans Hugging Face's layout: safetensors, q, k and v apart.
func (p *plan) huggingFace(path string) ([]*output, map[*output][]item, error) {
	c := p.Config
	text, err := c.MarshalHuggingFace(p.mxfp4(HuggingFace))
	if err != nil {
		return nil, nil, err
	}
	items := []item{p.matrix("model.embed_tokens.weight", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		layer := fmt.Sprintf("model.layers.%d.", n)
		vector := func(name, canonical string, v []float32) {
			items = append(items, p.vector(layer+name, canonical, v))
		}
		matrix := func(name, canonical string, m Matrix) {
			items = append(items, p.matrix(layer+name, canonical, false, m))
		}
		vector("input_layernorm.weight", attn+"norm.scale", b.AttnNorm)
		from := 0
		for _, q := range []struct {
			name string
			rows int
		}{{"q_proj", c.QueryWidth()}, {"k_proj", c.KVWidth()}, {"v_proj", c.KVWidth()}} {
			matrix("self_attn."+q.name+".weight", attn+"qkv.weight", rowsOf(b.QKV, from, q.rows))
			vector("self_attn."+q.name+".bias", attn+"qkv.bias", b.QKVBias[from:from+q.rows])
			from += q.rows
		}
		vector("self_attn.sinks", attn+"sinks", b.Sinks)
		matrix("self_attn.o_proj.weight", attn+"out.weight", b.Out)
		vector("self_attn.o_proj.bias", attn+"out.bias", b.OutBias)
		vector("post_attention_layernorm.weight", mlp+"norm.scale", b.MLPNorm)
		matrix("mlp.router.weight", mlp+"gate.weight", b.Gate)
		vector("mlp.router.bias", mlp+"gate.bias", b.GateBias)
		for _, e := range []struct {
			name, canonical string
			parts           []Matrix
			bias            [][]float32
		}{{"gate_up_proj", "mlp1", b.MLP1, b.MLP1Bias}, {"down_proj", "mlp2", b.MLP2, b.MLP2Bias}} {
			name := layer + "mlp.experts." + e.name
			if p.mxfp4(HuggingFace) {
				items = append(items, packedExperts(name+"_blocks", name+"_scales", e.parts)...)
			} else {
				items = append(items, p.experts(name, mlp+e.canonical+"_weight", true, e.parts))
			}
			items = append(items, p.vectors(name+"_bias", mlp+e.canonical+"_bias", e.bias))
		}
	}
	items = append(items, p.vector("model.norm.weight", "norm.scale", p.FinalNorm), p.matrix("lm_head.weight", "unembedding.weight", false, p.Unembedding))

	outputs, byFile, err := p.shards(path, items, "model-%05d-of-%05d.safetensors")
	if err != nil {
		return nil, nil, err
	}
	if len(outputs) > 1 {
		index, err := makeIndex(outputs, byFile)
		if err != nil {
			return nil, nil, err
		}
		outputs = append(outputs, textFile(filepath.Join(path, indexName), index))
	}
	return append(outputs, textFile(filepath.Join(path, configName), text)), byFile, nil
}
