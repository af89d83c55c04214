package checkpoint

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// without returns the tensors but one.
func without(w []tensor.Named, name string) []tensor.Named {
	i := slices.IndexFunc(w, func(t tensor.Named) bool { return t.Name == name })
	return slices.Delete(slices.Clone(w), i, i+1)
}

// with replaces a tensor or adds one.
func with(w []tensor.Named, name string, t tensor.Tensor) []tensor.Named {
	w = slices.Clone(w)
	if i := slices.IndexFunc(w, func(t tensor.Named) bool { return t.Name == name }); i >= 0 {
		w[i].Tensor = t
		return w
	}
	return append(w, tensor.Named{Name: name, Tensor: t})
}

func get(w []tensor.Named, name string) tensor.Tensor {
	t := w[slices.IndexFunc(w, func(t tensor.Named) bool { return t.Name == name })].Tensor
	t.Data = bytes.Clone(t.Data)
	return t
}

func TestOpenRefusesOpenAI(t *testing.T) {
	c := tiny()
	w := weights(c)
	nan := float32(math.NaN())
	poke := func(name string, at int, value byte) []tensor.Named {
		changed := get(w, name)
		changed.Data[at] = value
		return with(w, name, changed)
	}
	overflow := poke("block.1.mlp.mlp1_weight.scales", (1*64+5)*2+1, 254) // expert 1, row 5, group 1
	fine := get(w, "block.1.mlp.mlp1_weight.blocks")
	for _, test := range []struct {
		name    string
		tensors []tensor.Named
		want    string
	}{
		{"missing embedding", without(w, "embedding.weight"), `tensor "embedding.weight" is missing: the configuration calls for BF16, F16 or F32 [11 64]`},
		{"missing scales", without(w, "block.1.mlp.mlp2_weight.scales"), `tensor "block.1.mlp.mlp2_weight.scales" is missing: the configuration calls for U8 [3 64 1]`},
		{"missing vector", without(w, "norm.scale"), `tensor "norm.scale" is missing`},
		{"missing biases", without(w, "block.0.mlp.mlp1_bias"), `tensor "block.0.mlp.mlp1_bias" is missing`},
		{"unexpected layer", with(w, "block.2.attn.sinks", get(w, "block.1.attn.sinks")), `tensor "block.2.attn.sinks" is unexpected: a model of 2 layers`},
		{"unexpected name", with(w, "block.0.attn.extra", get(w, "norm.scale")), "is unexpected"},
		{"stranger's name", with(w, "optimizer.step", get(w, "norm.scale")), `tensor "optimizer.step" is unexpected`},
		{"wrong shape", with(w, "norm.scale", tensor.FromBFloat16s([]int{32}, make([]float32, 32))), `tensor "norm.scale" has shape [32], but `},
		{"more dimensions", with(w, "norm.scale", tensor.FromBFloat16s([]int{1, 64}, make([]float32, 64))), `has shape [1 64]`},
		{"transposed", with(w, "block.0.attn.out.weight", tensor.FromBFloat16s([]int{32, 64}, make([]float32, 64*32))), `calls for [64 32]`},
		{"integers", with(w, "norm.scale", tensor.FromInt32s([]int{64}, make([]int32, 64))), `is I32, want BF16, F16 or F32`},
		{"float64", with(w, "norm.scale", tensor.FromFloat64s([]int{64}, make([]float64, 64))), `is F64, want`},
		{"unknown dtype", with(w, "norm.scale", tensor.Tensor{DType: "F8_E4M3", Shape: []int{64}, Data: make([]byte, 64)}), `is F8_E4M3, want`},
		{"scales as F8_E8M0", with(w, "block.0.mlp.mlp1_weight.scales", tensor.Tensor{DType: "F8_E8M0", Shape: []int{3, 64, 2}, Data: make([]byte, 384)}), `is F8_E8M0, want U8`},
		{"NaN in a vector", with(w, "norm.scale", tensor.FromFloat32s([]int{64}, append(make([]float32, 63), nan))), `tensor "norm.scale" is not finite at element 63`},
		{"NaN in biases", with(w, "block.0.mlp.mlp2_bias", tensor.FromFloat32s([]int{3, 64}, append([]float32{nan}, make([]float32, 191)...))), `is not finite at element 0`},
		{"infinity in a matrix", with(w, "embedding.weight", tensor.FromFloat32s([]int{11, 64}, append(make([]float32, 703), float32(math.Inf(-1))))), `tensor "embedding.weight" is not finite at row 10, column 63`},
		{"half-precision NaN", with(w, "embedding.weight", tensor.Tensor{DType: tensor.F16, Shape: []int{11, 64}, Data: append([]byte{0, 0x7e}, make([]byte, 11*64*2-2)...)}), `not finite at row 0, column 0`},
		{"MXFP4 overflow", overflow, `tensor "block.1.mlp.mlp1_weight.blocks", expert 1 overflows bfloat16 in row 5, group 1 (scale byte 254)`},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := t.TempDir()
			writeOpenAI(t, d, c, test.tensors, 1)
			_, err := Open(d)
			require.ErrorContains(t, err, test.want)
			assert.Contains(t, err.Error(), filepath.Join(d, "model.safetensors"))
			assert.NotContains(t, err.Error(), "\n")
		})
	}

	t.Run("a large scale without large codes", func(t *testing.T) {
		at := ((1*64+5)*2 + 1) * 16
		for i := range 16 {
			fine.Data[at+i] = 0x83 // −0 and 1.5: finite up to scale 254
		}
		d := t.TempDir()
		writeOpenAI(t, d, c, with(overflow, "block.1.mlp.mlp1_weight.blocks", fine), 1)
		m := open(t, d)
		row := make([]float32, 64)
		m.Blocks[1].MLP1[1].Rows(row, 5, 1)
		assert.Equal(t, float32(0x1.8p127), row[32])
		assert.True(t, math.Signbit(float64(row[33])))
	})
	t.Run("all issues are listed", func(t *testing.T) {
		d := t.TempDir()
		writeOpenAI(t, d, c, without(with(w, "norm.scale", tensor.FromInt32s([]int{64}, make([]int32, 64))), "block.1.attn.sinks"), 1)
		_, err := Open(d)
		var issues *IssuesError
		require.ErrorAs(t, err, &issues)
		require.Len(t, issues.Issues, 2)
		assert.Contains(t, err.Error(), "(and 1 more)")
	})
	t.Run("the same tensor in two files", func(t *testing.T) {
		d := t.TempDir()
		writeOpenAI(t, d, c, w, 1)
		require.NoError(t, tensor.WriteSafetensors(filepath.Join(d, "more.safetensors"), w[3:4], nil))
		_, err := Open(d)
		require.ErrorContains(t, err, `tensor "block.0.attn.qkv.bias" is also in`)
	})
	t.Run("another configuration", func(t *testing.T) {
		d := t.TempDir()
		writeOpenAI(t, d, c, w, 1)
		for _, alter := range []func(*config.Config){
			func(c *config.Config) { c.Layers, c.Sliding = 1, config.Alternating(1) },
			func(c *config.Config) { c.Layers, c.Sliding = 3, config.Alternating(3) },
			func(c *config.Config) { c.Experts = 4 },
			func(c *config.Config) { c.HiddenSize = 96 },
			func(c *config.Config) { c.HiddenSize = 65 },
			func(c *config.Config) { c.IntermediateSize = 64 },
			func(c *config.Config) { c.VocabSize = 12 },
			func(c *config.Config) { c.KVHeads = 1 },
		} {
			other := c
			alter(&other)
			data, err := other.MarshalOpenAI()
			require.NoError(t, err)
			put(t, filepath.Join(d, "config.json"), data)
			_, err = Open(d)
			require.Error(t, err)
		}
	})
	t.Run("no configuration", func(t *testing.T) {
		d := t.TempDir()
		writeOpenAI(t, d, c, w, 1)
		require.NoError(t, os.Remove(filepath.Join(d, "config.json")))
		_, err := Open(d)
		require.ErrorContains(t, err, "config.json: is missing; a checkpoint needs its configuration")
	})
	t.Run("widths that MXFP4 can't have", func(t *testing.T) {
		d := t.TempDir()
		writeOpenAI(t, d, c, w, 1)
		other := c
		other.IntermediateSize = 48
		data, err := other.MarshalOpenAI()
		require.NoError(t, err)
		put(t, filepath.Join(d, "config.json"), data)
		_, err = Open(d)
		var issues *IssuesError
		require.ErrorAs(t, err, &issues)
		require.True(t, slices.ContainsFunc(issues.Issues, func(s string) bool { return strings.Contains(s, "48 inputs are no multiple of 32") }))
	})
}

func TestOpenRefusesHuggingFace(t *testing.T) {
	c := tiny()
	w := weights(c)
	hf, plain := huggingFaceWeights(c, w, false), huggingFaceWeights(c, w, true)
	const down = "model.layers.1.mlp.experts.down_proj"
	untransposed := get(plain, down)
	untransposed.Shape = []int{3, 64, 32}
	nan := get(plain, down)
	copy(nan.Data[2*(64*32+3*64+7):], []byte{0xff, 0x7f}) // expert 1, input 3, output 7
	for _, test := range []struct {
		name    string
		tensors []tensor.Named
		want    string
	}{
		{"missing k", without(hf, "model.layers.1.self_attn.k_proj.weight"), `tensor "model.layers.1.self_attn.k_proj.weight" is missing`},
		{"missing bias", without(hf, "model.layers.1.self_attn.v_proj.bias"), `v_proj.bias" is missing`},
		{"missing head", without(hf, "lm_head.weight"), `tensor "lm_head.weight" is missing`},
		{"missing blocks", without(hf, down+"_blocks"), `down_proj_blocks" is missing`},
		{"missing scales", without(hf, down+"_scales"), `down_proj_scales" is missing`},
		{"both kinds of experts", with(hf, down, get(plain, down)), `down_proj" is unexpected`},
		{"not transposed", with(plain, down, untransposed), `has shape [3 64 32], but`},
		{"NaN in an expert", with(plain, down, nan), `down_proj", expert 1 is not finite at row 7, column 3`},
		{"both layouts", with(hf, "embedding.weight", get(w, "embedding.weight")), "neither OpenAI's names"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := t.TempDir()
			writeHuggingFace(t, d, c, test.tensors, 1)
			_, err := Open(d)
			require.ErrorContains(t, err, test.want)
		})
	}
}

func TestOpenRefusesIndex(t *testing.T) {
	c := tiny()
	hf := huggingFaceWeights(c, weights(c), false)
	const first = "model-00000-of-00001.safetensors"
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, directory, index string) string
		want   string
	}{
		{"no JSON", func(_ *testing.T, _, index string) string { return index[1:] }, "not valid JSON"},
		{"no weight_map", func(_ *testing.T, _, index string) string { return "{}" }, "has no weight_map"},
		{"empty weight_map", func(_ *testing.T, _, index string) string { return `{"weight_map": {}}` }, "has no weight_map"},
		{"weight_map is a list", func(_ *testing.T, _, index string) string { return `{"weight_map": []}` }, "is an array, not an object"},
		{"a number for a shard", func(_ *testing.T, _, index string) string { return `{"weight_map": {"a": 1}}` }, `weight_map: "a" is a number, not a string`},
		{"duplicate", func(_ *testing.T, _, index string) string {
			return strings.Replace(index, `"weight_map": {`, `"weight_map": {"lm_head.weight": "`+first+`",`, 1)
		}, "occurs twice"},
		{"parent directory", func(_ *testing.T, _, index string) string { return strings.Replace(index, first, "../"+first, 1) }, "is not the plain name"},
		{"absolute path", func(_ *testing.T, _, index string) string { return strings.Replace(index, first, "/etc/"+first, 1) }, "is not the plain name"},
		{"backslashes", func(_ *testing.T, _, index string) string { return strings.Replace(index, first, `..\\`+first, 1) }, "is not the plain name"},
		{"hidden file", func(_ *testing.T, _, index string) string { return strings.Replace(index, first, "."+first, 1) }, "is not the plain name"},
		{"another suffix", func(_ *testing.T, _, index string) string {
			return strings.Replace(index, first, "pytorch_model.bin", 1)
		}, "is not the plain name"},
		{"shard that is not there", func(_ *testing.T, _, index string) string {
			return strings.ReplaceAll(index, first, "model-9.safetensors")
		}, `is in "model-9.safetensors", which is not in the directory`},
		{"tensor in another shard", func(_ *testing.T, _, index string) string {
			return strings.Replace(index, first, "model-00001-of-00001.safetensors", 1)
		}, `should be in`},
		{"tensor that the index lacks", func(_ *testing.T, _, index string) string {
			return strings.Replace(index, `"lm_head.weight"`, `"lm_head.wait"`, 1)
		}, `lm_head.wait" should be in`},
		{"model.safetensors beside the shards", func(t *testing.T, d, index string) string {
			require.NoError(t, tensor.WriteSafetensors(filepath.Join(d, "model.safetensors"), hf[:1], nil))
			return index
		}, "the index names other files than model.safetensors"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := t.TempDir()
			writeHuggingFace(t, d, c, hf, 2)
			path := filepath.Join(d, "model.safetensors.index.json")
			index, err := os.ReadFile(path)
			require.NoError(t, err)
			put(t, path, []byte(test.damage(t, d, string(index))))
			_, err = Open(d)
			require.ErrorContains(t, err, test.want)
			assert.NotContains(t, err.Error(), "\n")
		})
	}
	t.Run("huge", func(t *testing.T) {
		d := t.TempDir()
		writeHuggingFace(t, d, c, hf, 2)
		require.NoError(t, os.Truncate(filepath.Join(d, "model.safetensors.index.json"), maxIndexBytes+1))
		_, err := Open(d)
		require.ErrorContains(t, err, "not a regular file of at most")
	})
}

func TestOpenRefusesPlaces(t *testing.T) {
	d := t.TempDir()
	_, err := Open(filepath.Join(d, "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Open(d)
	require.ErrorContains(t, err, "no .safetensors, .msgpack or .eqx files here")
	put(t, filepath.Join(d, "model.bin"), []byte("x"))
	_, err = Open(filepath.Join(d, "model.bin"))
	require.ErrorContains(t, err, "not a checkpoint")

	put(t, filepath.Join(d, "other", "x.safetensors"), []byte("\x02\x00\x00\x00\x00\x00\x00\x00{}"))
	_, err = Open(filepath.Join(d, "other"))
	require.ErrorContains(t, err, "neither OpenAI's names")

	hub := filepath.Join(d, "models--a--b")
	require.NoError(t, os.MkdirAll(filepath.Join(hub, "snapshots", "1"), 0o777))
	require.NoError(t, os.MkdirAll(filepath.Join(hub, "snapshots", "2"), 0o777))
	_, err = Open(hub)
	require.ErrorContains(t, err, "has 2 snapshots and no refs/main")
	put(t, filepath.Join(hub, "refs", "main"), []byte("../../../etc"))
	_, err = Open(hub)
	require.ErrorContains(t, err, "does not name a commit")
	put(t, filepath.Join(hub, "refs", "main"), []byte("3"))
	_, err = Open(hub)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// Every cut of every file, at 200 places and everywhere in the header, and every
// change of one header byte is an error, or gives the same values.
func TestOpenDamaged(t *testing.T) {
	c := tiny()
	w := weights(c)
	for _, layout := range []func(d string){
		func(d string) { writeOpenAI(t, d, c, w, 2) },
		func(d string) { writeHuggingFace(t, d, c, huggingFaceWeights(c, w, false), 2) },
	} {
		d := t.TempDir()
		layout(d)
		want := open(t, d)
		entries, err := os.ReadDir(d)
		require.NoError(t, err)
		for _, e := range entries {
			path := filepath.Join(d, e.Name())
			whole, err := os.ReadFile(path)
			require.NoError(t, err)
			header := len(whole)
			if strings.HasSuffix(path, ".safetensors") {
				header = headerLength(whole)
			}
			try := func(data []byte) (*Model, error) {
				// A new file, because the old one is mapped.
				require.NoError(t, os.Remove(path))
				require.NoError(t, os.WriteFile(path, data, 0o666))
				return Open(d)
			}
			for i := range 200 {
				_, err := try(whole[:len(whole)*i/200])
				require.Error(t, err, "%s cut at %d/200", path, i)
			}
			step := max(header/1500, 1)
			for at := 0; at < header; at += step {
				damaged := bytes.Clone(whole)
				damaged[at] ^= 1 << (at % 8)
				m, err := try(damaged)
				if err == nil {
					if e.Name() != configName {
						requireSameModel(t, want, m)
					}
					require.NoError(t, m.Close())
				} else {
					require.NotContains(t, err.Error(), "\n")
				}
			}
			_, err = try(whole)
			require.NoError(t, err)
		}
	}
}

func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model-00000-of-00001.safetensors"}}`))
	f.Add([]byte(`{"weight_map": {"a": "../x.safetensors", "b": "/x.safetensors"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		index, err := parseIndex(data)
		if err != nil {
			return
		}
		require.NotEmpty(t, index)
		for _, shard := range index {
			require.Equal(t, shard, filepath.Base(shard))
			require.True(t, filepath.IsLocal(shard))
		}
	})
}
