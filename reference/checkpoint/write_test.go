package checkpoint

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// tiny is the smallest configuration that has everything: two kinds of layers,
// grouped heads, several experts, different widths everywhere.
func tiny() config.Config {
	return config.Config{
		Layers: 2, Experts: 3, ExpertsPerToken: 2, VocabSize: 11,
		HiddenSize: 64, IntermediateSize: 32, HeadDim: 8, Heads: 4, KVHeads: 2,
		SlidingWindow: 3, Sliding: config.Alternating(2),
		InitialContextLength: 64, RopeTheta: 150000, RopeScalingFactor: 32, RopeNTKAlpha: 1, RopeNTKBeta: 8,
		SwiGLULimit: 7, SwiGLUAlpha: config.OpenAISwiGLUAlpha, NormEpsilon: config.OpenAINormEpsilon,
	}
}

// weights makes the tensors of OpenAI's layout.
func weights(c config.Config) []tensor.Named {
	r := rand.New(rand.NewPCG(1, 2))
	var out []tensor.Named
	bf16 := func(name string, shape ...int) {
		n := 1
		for _, d := range shape {
			n *= d
		}
		values := make([]float32, n)
		for i := range values {
			values[i] = float32(r.NormFloat64())
		}
		out = append(out, tensor.Named{Name: name, Tensor: tensor.FromBFloat16s(shape, values)})
	}
	mxfp4 := func(name string, experts, rows, cols int) {
		blocks, scales := make([]byte, experts*rows*cols/2), make([]byte, experts*rows*cols/32)
		for i := range blocks {
			blocks[i] = byte(r.Uint32())
		}
		for i := range scales {
			scales[i] = byte(118 + r.IntN(8))
		}
		out = append(out,
			tensor.Named{Name: name + ".blocks", Tensor: tensor.Tensor{DType: tensor.U8, Shape: []int{experts, rows, cols / 32, 16}, Data: blocks}},
			tensor.Named{Name: name + ".scales", Tensor: tensor.Tensor{DType: tensor.U8, Shape: []int{experts, rows, cols / 32}, Data: scales}})
	}
	bf16("embedding.weight", c.VocabSize, c.HiddenSize)
	for n := range c.Layers {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		bf16(attn+"norm.scale", c.HiddenSize)
		bf16(attn+"qkv.weight", c.QKVWidth(), c.HiddenSize)
		bf16(attn+"qkv.bias", c.QKVWidth())
		bf16(attn+"sinks", c.Heads)
		bf16(attn+"out.weight", c.HiddenSize, c.QueryWidth())
		bf16(attn+"out.bias", c.HiddenSize)
		bf16(mlp+"norm.scale", c.HiddenSize)
		bf16(mlp+"gate.weight", c.Experts, c.HiddenSize)
		bf16(mlp+"gate.bias", c.Experts)
		mxfp4(mlp+"mlp1_weight", c.Experts, 2*c.IntermediateSize, c.HiddenSize)
		bf16(mlp+"mlp1_bias", c.Experts, 2*c.IntermediateSize)
		mxfp4(mlp+"mlp2_weight", c.Experts, c.HiddenSize, c.IntermediateSize)
		bf16(mlp+"mlp2_bias", c.Experts, c.HiddenSize)
	}
	bf16("norm.scale", c.HiddenSize)
	bf16("unembedding.weight", c.VocabSize, c.HiddenSize)
	return out
}

// huggingFaceWeights renames and splits OpenAI's tensors; with plain experts it
// dequantizes and transposes them, one value at a time by the definition.
func huggingFaceWeights(c config.Config, from []tensor.Named, plain bool) []tensor.Named {
	var out []tensor.Named
	find := func(name string) tensor.Tensor {
		i := slices.IndexFunc(from, func(t tensor.Named) bool { return t.Name == name })
		return from[i].Tensor
	}
	add := func(name string, t tensor.Tensor) { out = append(out, tensor.Named{Name: name, Tensor: t}) }
	rows := func(t tensor.Tensor, begin, n int) tensor.Tensor {
		width := len(t.Data) / t.Shape[0]
		shape := slices.Clone(t.Shape)
		shape[0] = n
		return tensor.Tensor{DType: t.DType, Shape: shape, Data: t.Data[begin*width : (begin+n)*width]}
	}
	add("model.embed_tokens.weight", find("embedding.weight"))
	for n := range c.Layers {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		layer := fmt.Sprintf("model.layers.%d.", n)
		add(layer+"input_layernorm.weight", find(attn+"norm.scale"))
		add(layer+"post_attention_layernorm.weight", find(mlp+"norm.scale"))
		for _, kind := range []string{"weight", "bias"} {
			qkv := find(attn + "qkv." + kind)
			add(layer+"self_attn.q_proj."+kind, rows(qkv, 0, c.QueryWidth()))
			add(layer+"self_attn.k_proj."+kind, rows(qkv, c.QueryWidth(), c.KVWidth()))
			add(layer+"self_attn.v_proj."+kind, rows(qkv, c.QueryWidth()+c.KVWidth(), c.KVWidth()))
			add(layer+"self_attn.o_proj."+kind, find(attn+"out."+kind))
			add(layer+"mlp.router."+kind, find(mlp+"gate."+kind))
		}
		add(layer+"self_attn.sinks", find(attn+"sinks"))
		for _, name := range [][2]string{{"gate_up_proj", "mlp1"}, {"down_proj", "mlp2"}} {
			experts := layer + "mlp.experts." + name[0]
			add(experts+"_bias", find(mlp+name[1]+"_bias"))
			blocks, scales := find(mlp+name[1]+"_weight.blocks"), find(mlp+name[1]+"_weight.scales")
			if !plain {
				add(experts+"_blocks", blocks)
				add(experts+"_scales", scales)
				continue
			}
			e, r, k := blocks.Shape[0], blocks.Shape[1], blocks.Shape[2]*32
			values := make([]float32, e*r*k)
			table := []float32{0, 0.5, 1, 1.5, 2, 3, 4, 6}
			for i := range values {
				code := blocks.Data[i/2] >> (4 * (i % 2)) & 15
				v := table[code&7]
				for s := scales.Data[i/32]; s < 127; s++ {
					v /= 2
				}
				if code >= 8 {
					v = -v
				}
				expert, row, col := i/(r*k), i/k%r, i%k
				values[expert*r*k+col*r+row] = v
			}
			add(experts, tensor.FromBFloat16s([]int{e, k, r}, values))
		}
	}
	add("model.norm.weight", find("norm.scale"))
	add("lm_head.weight", find("unembedding.weight"))
	return out
}

func put(t testing.TB, path string, data []byte) {
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o777))
	require.NoError(t, os.WriteFile(path, data, 0o666))
}

// writeOpenAI writes a checkpoint in so many files.
func writeOpenAI(t testing.TB, directory string, c config.Config, w []tensor.Named, shards int) {
	data, err := c.MarshalOpenAI()
	require.NoError(t, err)
	put(t, filepath.Join(directory, "config.json"), data)
	for i, part := range split(w, shards) {
		name := "model.safetensors"
		if shards > 1 {
			name = fmt.Sprintf("model--%05d-of-%05d.safetensors", i+1, shards)
		}
		require.NoError(t, tensor.WriteSafetensors(filepath.Join(directory, name), part, nil))
	}
}

// writeHuggingFace writes a checkpoint in so many files, with an index if there are several.
func writeHuggingFace(t testing.TB, directory string, c config.Config, w []tensor.Named, shards int) {
	quantized := slices.ContainsFunc(w, func(t tensor.Named) bool { return t.DType == tensor.U8 })
	data, err := c.MarshalHuggingFace(quantized)
	require.NoError(t, err)
	put(t, filepath.Join(directory, "config.json"), data)
	index := ""
	for i, part := range split(w, shards) {
		name := "model.safetensors"
		if shards > 1 {
			name = fmt.Sprintf("model-%05d-of-%05d.safetensors", i, shards-1) // OpenAI's count from 0
		}
		require.NoError(t, tensor.WriteSafetensors(filepath.Join(directory, name), part, map[string]string{"format": "pt"}))
		for _, tensor := range part {
			index += fmt.Sprintf(",\n%q: %q", tensor.Name, name)
		}
	}
	if shards > 1 {
		put(t, filepath.Join(directory, "model.safetensors.index.json"),
			[]byte(`{"metadata": {"total_size": 1}, "weight_map": {`+index[1:]+"}}"))
	}
}

func split(w []tensor.Named, parts int) [][]tensor.Named {
	size := (len(w) + parts - 1) / parts
	return slices.Collect(slices.Chunk(w, size))
}

// headerLength returns the bytes before a safetensors file's data.
func headerLength(data []byte) int { return 8 + int(binary.LittleEndian.Uint64(data)) }
