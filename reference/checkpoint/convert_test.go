package checkpoint

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/x448/float16"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// testdata holds one model, written by flax, equinox, jax2onnx and safetensors
// themselves.
func TestFilesOfTheRealLibraries(t *testing.T) {
	want := open(t, filepath.Join("testdata", "openai"))
	for _, test := range []struct {
		name, layout string
		options      Options
	}{
		{"flax_bfloat16.msgpack", Flax, Options{}},
		{"flax_chunked.msgpack", Flax, Options{}},
		{"flax_chunked.msgpack", Flax, Options{Config: "testdata/openai/config.json"}},
		{"equinox_bfloat16.eqx", Equinox, Options{UndoGateBias: true}},
		{"equinox_float32.eqx", Equinox, Options{UndoGateBias: true}},
		{"equinox_float32.eqx", Equinox, Options{UndoGateBias: true, Config: "testdata/openai/config.json"}},
	} {
		got, err := OpenWith(filepath.Join("testdata", test.name), test.options)
		require.NoError(t, err)
		require.Equal(t, test.layout, got.Source.Layout)
		require.Empty(t, got.Notes)
		requireSameModel(t, want, got)
		require.Equal(t, digest(t, want), digest(t, got), test.name)
		require.NoError(t, got.Close())
	}
}

func TestGateBias(t *testing.T) {
	want := open(t, filepath.Join("testdata", "openai"))
	for _, name := range []string{"equinox_bfloat16.eqx", "equinox_float32.eqx"} {
		got := open(t, filepath.Join("testdata", name))
		require.Len(t, got.Notes, 1)
		require.Contains(t, got.Notes[0], "--undo-gate-bias")
		for n := range got.Blocks {
			for e, v := range got.Blocks[n].GateBias {
				require.InDelta(t, -1e-6*float64(e), float64(v-want.Blocks[n].GateBias[e]), 1e-7)
			}
		}
	}
	// What we write has no such change, and undoing it changes nothing.
	path := filepath.Join(t.TempDir(), "x.eqx")
	require.NoError(t, want.Write(t.Context(), Equinox, path, WriteOptions{}))
	require.Empty(t, open(t, path).Notes)
	again, err := OpenWith(path, Options{UndoGateBias: true})
	require.NoError(t, err)
	defer again.Close()
	require.Contains(t, again.Notes[0], "left them as they are")
	requireSameModel(t, want, again)
	_, err = OpenWith(filepath.Join("testdata", "openai"), Options{UndoGateBias: true})
	require.ErrorContains(t, err, "only an Equinox file")
	_, err = OpenWith(filepath.Join("testdata", "flax_bfloat16.msgpack"), Options{UndoGateBias: true})
	require.ErrorContains(t, err, "only an Equinox file")
}

// targets are all ways of writing.
var targets = []struct {
	name, layout string
	options      WriteOptions
}{
	{"openai", OpenAI, WriteOptions{}},
	{"openai, sharded", OpenAI, WriteOptions{ShardBytes: 20000}},
	{"huggingface", HuggingFace, WriteOptions{}},
	{"huggingface, sharded", HuggingFace, WriteOptions{ShardBytes: 10000}},
	{"huggingface, dense", HuggingFace, WriteOptions{Experts: ExpertsDense}},
	{"huggingface, dense float32 and sharded", HuggingFace, WriteOptions{Experts: ExpertsDense, DType: tensor.F32, ShardBytes: 1}},
	{"flax", Flax, WriteOptions{}},
	{"flax float32", Flax, WriteOptions{DType: tensor.F32}},
	{"equinox", Equinox, WriteOptions{}},
	{"equinox bfloat16", Equinox, WriteOptions{DType: tensor.BF16}},
}

// Every layout to every other: the same model, the same digest; and the bytes of
// OpenAI's layout, which come back whatever lies between.
func TestConvertEverything(t *testing.T) {
	original := filepath.Join("testdata", "openai")
	want := open(t, original)
	sum := digest(t, want)
	bytesOf := func(path string) map[string]tensor.Tensor {
		all, err := tensor.ReadSafetensors(path)
		require.NoError(t, err)
		return all
	}
	tensors := bytesOf(filepath.Join(original, "model.safetensors"))
	for _, first := range targets {
		t.Run(first.name, func(t *testing.T) {
			a := filepath.Join(t.TempDir(), "a")
			require.NoError(t, want.Write(t.Context(), first.layout, a, first.options))
			from := open(t, a)
			require.Equal(t, first.layout, from.Source.Layout)
			requireSameModel(t, want, from)
			require.Equal(t, sum, digest(t, from))
			for _, second := range targets {
				b := filepath.Join(t.TempDir(), "deep", "b")
				require.NoError(t, from.Write(t.Context(), second.layout, b, second.options), second.name)
				to := open(t, b)
				requireSameModel(t, want, to)
				require.Equal(t, sum, digest(t, to), second.name)
				if second.name == "openai" {
					require.Equal(t, tensors, bytesOf(filepath.Join(b, "model.safetensors")))
				}
			}
		})
	}
}

func TestRoundTripOfFixtureReturnsTheFile(t *testing.T) {
	fixture := filepath.Join("..", "..", "fixtures", "toy")
	m := open(t, fixture)
	a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	require.NoError(t, m.Write(t.Context(), HuggingFace, a, WriteOptions{ShardBytes: 50000}))
	require.NoError(t, open(t, a).Write(t.Context(), OpenAI, b, WriteOptions{}))
	want, err := os.ReadFile(filepath.Join(fixture, "model.safetensors"))
	require.NoError(t, err)
	got, err := os.ReadFile(filepath.Join(b, "model.safetensors"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
}

func TestCut(t *testing.T) {
	m := open(t, filepath.Join("testdata", "openai"))
	for _, target := range targets {
		cut, err := m.Cut(1)
		require.NoError(t, err)
		path := filepath.Join(t.TempDir(), "x")
		require.NoError(t, cut.Write(t.Context(), target.layout, path, target.options))
		got := open(t, path)
		require.Equal(t, 1, got.Config.Layers)
		require.Equal(t, digest(t, cut), digest(t, got))
	}
	for _, n := range []int{0, -1, 3} {
		_, err := m.Cut(n)
		require.ErrorContains(t, err, "has 2 layers, so it can't be cut to")
	}
}

// larger writes a model whose matrices take several tiles and chunks.
func TestConvertInTiles(t *testing.T) {
	c := tiny()
	c.VocabSize, c.HiddenSize = 40000, 96 // 3.84 million values; transposed in several tiles
	directory := t.TempDir()
	writeOpenAI(t, directory, c, weights(c), 1)
	want := open(t, directory)
	for _, to := range targets {
		if to.options.ShardBytes > 0 {
			continue
		}
		path := filepath.Join(t.TempDir(), "x")
		var last int64
		o := to.options
		o.Progress = func(written, total int64) {
			require.LessOrEqual(t, written, total)
			if written == total {
				last = total
			}
		}
		require.NoError(t, want.Write(t.Context(), to.layout, path, o))
		require.Positive(t, last, "progress ends at the total")
		got := open(t, path)
		require.Equal(t, digest(t, want), digest(t, got), to.name)
		back := filepath.Join(t.TempDir(), "y")
		require.NoError(t, got.Write(t.Context(), OpenAI, back, WriteOptions{}))
		a, err := os.ReadFile(filepath.Join(back, "model.safetensors"))
		require.NoError(t, err)
		b := filepath.Join(t.TempDir(), "z")
		require.NoError(t, want.Write(t.Context(), OpenAI, b, WriteOptions{}))
		other, err := os.ReadFile(filepath.Join(b, "model.safetensors"))
		require.NoError(t, err)
		require.True(t, bytes.Equal(a, other), to.name)
	}
}

// altered opens the model of testdata in Flax's layout with one value changed.
func altered(t *testing.T, change func(m *Model)) *Model {
	m := open(t, filepath.Join("testdata", "openai")).Densify(1 << 30)
	change(m)
	return m
}

func TestWriteRefuses(t *testing.T) {
	odd := float32(1.0009765625) // 1 + 2^-10: float16 and float32, no bfloat16
	for _, test := range []struct {
		name    string
		layout  string
		change  func(*Model)
		options WriteOptions
		want    string
	}{
		{"no MXFP4", OpenAI, func(m *Model) { decodedValues(m.Blocks[1].MLP2[2]).Data[64*32-1] = 5 }, WriteOptions{}, `tensor "block.1.mlp.mlp2_weight.blocks" can't hold the source exactly: expert 2, row 63, group 0 is no MXFP4`},
		{"no MXFP4 for Hugging Face", HuggingFace, func(m *Model) { decodedValues(m.Blocks[0].MLP1[0]).Data[40] = 1e30 }, WriteOptions{}, `gate_up_proj_blocks" can't hold the source exactly: expert 0, row 0, group 1`},
		{"no bfloat16", Flax, func(m *Model) { m.Embedding.(Dense).Data[5] = odd }, WriteOptions{DType: tensor.BF16}, `tensor "embedding/embedding" has values that bfloat16 can't hold`},
		{"no bfloat16, transposed", Flax, func(m *Model) { m.Unembedding.(Dense).Data[5] = odd }, WriteOptions{DType: tensor.BF16}, `tensor "unembedding/kernel" has values that bfloat16 can't hold`},
		{"no float16", Flax, func(m *Model) { m.Embedding.(Dense).Data[5] = 1e6 }, WriteOptions{DType: tensor.F16}, `float16 can't hold`},
		{"NaN", HuggingFace, func(m *Model) { m.Blocks[0].Out.(Dense).Data[3] = float32(math.NaN()) }, WriteOptions{}, "is not finite"},
		{"NaN in an expert", OpenAI, func(m *Model) { decodedValues(m.Blocks[0].MLP1[1]).Data[3] = float32(math.Inf(1)) }, WriteOptions{}, "is not finite"},
		{"another epsilon", OpenAI, func(m *Model) { m.Config.NormEpsilon = 1e-6 }, WriteOptions{}, "rms_norm_eps"},
		{"another epsilon in Flax", Flax, func(m *Model) { m.Config.NormEpsilon = 1e-6 }, WriteOptions{}, "rms_norm_eps"},
		{"another pattern", Equinox, func(m *Model) { m.Config.Sliding = []bool{true, true} }, WriteOptions{}, "layer 1"},
		{"another layout", "gguf", nil, WriteOptions{}, `no layout is called "gguf"`},
		{"dense OpenAI", OpenAI, nil, WriteOptions{Experts: ExpertsDense}, "MXFP4 only"},
		{"MXFP4 in Flax", Flax, nil, WriteOptions{Experts: ExpertsMXFP4}, "dense experts only"},
		{"MXFP4 in Equinox", Equinox, nil, WriteOptions{Experts: ExpertsMXFP4}, "dense experts only"},
		{"shards of Flax", Flax, nil, WriteOptions{ShardBytes: 5}, "one file"},
		{"negative shards", OpenAI, nil, WriteOptions{ShardBytes: -5}, "less than no bytes"},
		{"unknown experts", HuggingFace, nil, WriteOptions{Experts: "int4"}, `not "int4"`},
		{"float64", HuggingFace, nil, WriteOptions{DType: tensor.F64}, "not F64"},
		{"float16 Equinox", Equinox, nil, WriteOptions{DType: tensor.F16}, "float32 or bfloat16"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.change == nil {
				test.change = func(*Model) {}
			}
			parent := t.TempDir()
			err := altered(t, test.change).Write(t.Context(), test.layout, filepath.Join(parent, "new", "x"), test.options)
			require.ErrorContains(t, err, test.want)
			assert.NotContains(t, err.Error(), "\n")
			entries, err := os.ReadDir(parent)
			require.NoError(t, err)
			assert.Empty(t, entries, "nothing is left behind, not even the directories")
		})
	}
	t.Run("a checkpoint is there already", func(t *testing.T) {
		m := open(t, filepath.Join("testdata", "openai"))
		d := t.TempDir()
		require.NoError(t, m.Write(t.Context(), OpenAI, d, WriteOptions{}))
		require.ErrorContains(t, m.Write(t.Context(), HuggingFace, d, WriteOptions{}), "holds a checkpoint already (model.safetensors)")
	})
	t.Run("a file is in the way", func(t *testing.T) {
		m := open(t, filepath.Join("testdata", "openai"))
		path := filepath.Join(t.TempDir(), "x")
		put(t, path, []byte("x"))
		require.ErrorContains(t, m.Write(t.Context(), OpenAI, path, WriteOptions{}), "is not a directory")
	})
	t.Run("cancelled", func(t *testing.T) {
		m := open(t, filepath.Join("testdata", "openai"))
		for _, target := range targets {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			parent := t.TempDir()
			o := target.options
			o.Progress = func(int64, int64) { cancel() }
			require.ErrorIs(t, m.Write(ctx, target.layout, filepath.Join(parent, "x"), o), context.Canceled)
			entries, err := os.ReadDir(parent)
			require.NoError(t, err)
			require.Empty(t, entries)
		}
	})
}

// What only some layouts can hold.
func TestWriteKeepsWhatItCan(t *testing.T) {
	odd := float32(1.0009765625)
	t.Run("float32 where bfloat16 is not exact", func(t *testing.T) {
		for _, layout := range []string{OpenAI, HuggingFace, Flax, Equinox} {
			m := altered(t, func(m *Model) {
				m.Embedding.(Dense).Data[5] = odd
				m.Blocks[1].GateBias[2] = odd
			})
			path := filepath.Join(t.TempDir(), "x")
			require.NoError(t, m.Write(t.Context(), layout, path, WriteOptions{}))
			requireSameModel(t, m, open(t, path))
		}
	})
	t.Run("any epsilon in Equinox and Hugging Face", func(t *testing.T) {
		for _, layout := range []string{HuggingFace, Equinox} {
			m := altered(t, func(m *Model) { m.Config.NormEpsilon = 3e-6 })
			path := filepath.Join(t.TempDir(), "x")
			require.NoError(t, m.Write(t.Context(), layout, path, WriteOptions{}))
			require.Equal(t, 3e-6, open(t, path).Config.NormEpsilon)
		}
	})
	t.Run("rounded with Quantize", func(t *testing.T) {
		m := altered(t, func(m *Model) {
			row := decodedValues(m.Blocks[0].MLP1[0]).Data[:32]
			clear(row)
			copy(row, []float32{6, 5, 3.5, 2.5, -1.75, 0.25, 0.75, -0.2, 7.9})
			decodedValues(m.Blocks[0].MLP1[0]).Data[32] = 1e-45 // the smallest float32: rounds away
		})
		path := filepath.Join(t.TempDir(), "x")
		require.NoError(t, m.Write(t.Context(), OpenAI, path, WriteOptions{Quantize: true}))
		row := make([]float32, 64)
		open(t, path).Blocks[0].MLP1[0].Rows(row, 0, 1)
		// Ties to the even code: 5 to 4, 3.5 to 4, 2.5 to 2, 1.75 to 2, 0.25 to 0, 0.75 to 1.
		require.Equal(t, []float32{6, 4, 4, 2, -2, 0, 1, 0, 6}, row[:9])
	})
}

func TestFloat16(t *testing.T) {
	m := altered(t, func(m *Model) {
		for _, w := range m.canonical() {
			values := decodedValues(w.matrix).Data
			for i, v := range values {
				if float16.Fromfloat32(v).Float32() != v {
					values[i] = 0
				}
			}
		}
	})
	for layout, o := range map[string]WriteOptions{
		Flax:        {DType: tensor.F16},
		HuggingFace: {DType: tensor.F16, Experts: ExpertsDense},
		OpenAI:      {DType: tensor.F16},
	} {
		path := filepath.Join(t.TempDir(), "x")
		require.NoError(t, m.Write(t.Context(), layout, path, o))
		got := open(t, path)
		requireSameModel(t, m, got)
		require.Equal(t, digest(t, m), digest(t, got))
		types := map[tensor.DType]int{}
		for _, info := range got.Tensors() {
			types[info.DType]++
		}
		require.Greater(t, types[tensor.F16], 10)
		back := filepath.Join(t.TempDir(), "y")
		require.NoError(t, got.Write(t.Context(), OpenAI, back, WriteOptions{}))
		require.Equal(t, digest(t, m), digest(t, open(t, back)))
	}
}

func TestQuantizeMXFP4(t *testing.T) {
	magnitudes := []float64{0, 0.5, 1, 1.5, 2, 3, 4, 6}
	for seed := range 2000 {
		var values [32]float32
		for i := range values {
			values[i] = float32(math.Ldexp(math.Sin(float64(seed*37+i*i+1)), seed%200-150))
		}
		var block [16]byte
		scale := quantizeMXFP4(&block, &values)
		got := make([]float32, 32)
		MXFP4{1, 32, block[:], []byte{scale}}.Rows(got, 0, 1)
		largest := 0.0
		for _, v := range values {
			largest = max(largest, math.Abs(float64(v)))
		}
		unit := math.Ldexp(1, max(math.Ilogb(largest)-2, -127))
		for i, v := range values {
			best := math.Inf(1)
			for _, x := range magnitudes {
				best = min(best, math.Abs(math.Abs(float64(v))-x*unit))
			}
			require.Equal(t, best, math.Abs(float64(v)-float64(got[i])), "no code is nearer")
		}
	}
}

// chunks of Flax at their real size are too large for a test: the layout is
// compared with flax's own file, made with small chunks.
func TestChunkedIndex(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "flax_chunked.msgpack"))
	require.NoError(t, err)
	arrays, err := indexMsgpack(data)
	require.NoError(t, err)
	chunked := 0
	for _, a := range arrays {
		if a.chunks != nil {
			chunked++
			require.NoError(t, a.CheckSize(located{a.Tensor, "", a.chunks}.size()))
		}
	}
	require.Greater(t, chunked, 8)
}

// Rows of a transposed matrix in groups of lines, in one piece and in chunks.
func TestReadRows(t *testing.T) {
	const rows, cols = wideLine/2 + 5, 2*lineGroup + 7
	data := make([]byte, 2*rows*cols)
	for i := range rows * cols {
		v := uint16(i*7919) &^ 0x4000 // no large exponents, so nothing infinite
		data[2*i], data[2*i+1] = byte(v), byte(v>>8)
	}
	whole := Transposed{rows, cols, tensor.BF16, data}
	cut := 2 * (rows*(lineGroup+3) + 11) // in the middle of a line
	chunked := Chunked{rows, cols, tensor.BF16, true, 0, [][]byte{data[:cut], data[cut:min(2*cut, len(data))], data[min(2*cut, len(data)):]}}
	want := make([]float32, 100*cols)
	whole.Rows(want, 1000, 100)
	for r := range 100 {
		for c := range cols {
			at := 2 * (c*rows + 1000 + r)
			require.Equal(t, tensor.BFloat16(uint16(data[at])|uint16(data[at+1])<<8), want[r*cols+c])
		}
	}
	for _, m := range []Matrix{whole, chunked} {
		var buffer []float32
		released := 0
		got := make([]float32, 100*cols)
		readRows(m, got, 1000, 100, &buffer, func() { released++ })
		require.Equal(t, 3, released) // 2 groups and a rest
		require.True(t, slices.Equal(want, got))
	}
	require.NoError(t, checkFinite(chunked))
}

func TestMsgpackHeadsAreTheShortest(t *testing.T) {
	for _, test := range []struct{ got, want []byte }{
		{mapHead(15), []byte{0x8f}}, {mapHead(16), []byte{0xde, 0, 16}}, {mapHead(1 << 16), []byte{0xdf, 0, 1, 0, 0}},
		{textHead("ab"), []byte{0xa2, 'a', 'b'}}, {textHead(strings.Repeat("a", 32))[:2], []byte{0xd9, 32}},
		{integer(127), []byte{127}}, {integer(128), []byte{0xcc, 128}}, {integer(256), []byte{0xcd, 1, 0}},
		{integer(201088), []byte{0xce, 0, 3, 0x11, 0x80}}, {integer(1 << 32), []byte{0xcf, 0, 0, 0, 1, 0, 0, 0, 0}},
		{extHead(16), []byte{0xd8, 1}}, {extHead(1), []byte{0xd4, 1}}, {extHead(15), []byte{0xc7, 15, 1}},
		{extHead(256), []byte{0xc8, 1, 0, 1}}, {extHead(1 << 30), []byte{0xc9, 0x40, 0, 0, 0, 1}},
	} {
		require.Equal(t, test.want, test.got)
	}
	o := &output{}
	big := tensor.Spec{Name: "x", DType: tensor.BF16, Shape: []int{201088, 2880}}
	require.NoError(t, layOutArray(o, big))
	require.Len(t, o.places["x"], 2, "1.16 GB: two chunks")
	require.Equal(t, int64(1<<30), o.places["x"][0].length)
	require.Equal(t, int64(201088*2880*2), o.places["x"][0].length+o.places["x"][1].length)
}

func TestOpenFlaxAndEquinoxPlaces(t *testing.T) {
	m := open(t, filepath.Join("testdata", "openai"))
	d := t.TempDir()
	require.NoError(t, m.Write(t.Context(), Flax, filepath.Join(d, "a.msgpack"), WriteOptions{}))
	require.FileExists(t, filepath.Join(d, "a.config.json"))
	requireSameModel(t, m, open(t, d))
	require.NoError(t, os.Rename(filepath.Join(d, "a.config.json"), filepath.Join(d, "a.msgpack.config.json")))
	requireSameModel(t, m, open(t, filepath.Join(d, "a.msgpack")))
	require.NoError(t, os.Rename(filepath.Join(d, "a.msgpack.config.json"), filepath.Join(d, "elsewhere.json")))
	_, err := Open(filepath.Join(d, "a.msgpack"))
	require.ErrorContains(t, err, "name its configuration with --config")
	given, err := OpenWith(filepath.Join(d, "a.msgpack"), Options{Config: filepath.Join(d, "elsewhere.json")})
	require.NoError(t, err)
	require.NoError(t, given.Close())

	require.NoError(t, m.Write(t.Context(), Equinox, filepath.Join(d, "b.eqx"), WriteOptions{}))
	_, err = Open(d)
	require.ErrorContains(t, err, "has 2 checkpoints")
	require.NoError(t, os.Remove(filepath.Join(d, "b.eqx.meta.json")))
	_, err = Open(filepath.Join(d, "b.eqx"))
	require.ErrorContains(t, err, "b.eqx.meta.json: is missing")
}

func TestMeta(t *testing.T) {
	c := tiny()
	text, err := c.MarshalOpenAI()
	require.NoError(t, err)
	for _, test := range []struct {
		name, text, want string
		layers           int
	}{
		{"plain", string(text), "", 2},
		{"wrapped", fmt.Sprintf(`{"config": %s, "param_dtype": "float32", "seed": 0}`, text), "", 2},
		{"cut by jax2onnx", fmt.Sprintf(`{"config": %s, "max_layers": 1}`, text), "", 1},
		{"cut to more than there is", fmt.Sprintf(`{"config": %s, "max_layers": 9}`, text), "", 2},
		{"no configuration", `{"seed": 0}`, "is no configuration of gpt-oss", 0},
		{"no JSON", `{"seed": `, "not valid JSON", 0},
		{"a list", `[]`, "is an array", 0},
		{"max_layers is text", fmt.Sprintf(`{"config": %s, "max_layers": "1"}`, text), "max_layers is a string", 0},
	} {
		got, err := parseMeta([]byte(test.text), "m.json")
		if test.want != "" {
			require.ErrorContains(t, err, test.want, test.name)
			require.ErrorContains(t, err, "m.json", test.name)
			continue
		}
		require.NoError(t, err, test.name)
		require.Equal(t, test.layers, got.Layers)
		require.Len(t, got.Sliding, test.layers)
	}
}

// leaf replaces one leaf of an Equinox file that we wrote.
func equinoxWith(t *testing.T, c config.Config, change func([]item) []item) (string, error) {
	m := open(t, filepath.Join("testdata", "openai"))
	m.Config = c
	p := plan{Model: m}
	require.NoError(t, p.chooseTypes(t.Context(), Equinox))
	path := filepath.Join(t.TempDir(), "x.eqx")
	outputs, items, err := p.equinox(path)
	require.NoError(t, err)
	changed := change(items[outputs[0]])
	o := &output{path: path}
	for _, i := range changed {
		head, err := tensor.NPYHead(i.Spec)
		require.NoError(t, err)
		size, err := i.Size()
		require.NoError(t, err)
		o.put(head)
		o.reserve(i.Name, int64(size))
	}
	w := writer{model: m}
	require.NoError(t, w.write(t.Context(), []*output{o, outputs[1]}, map[*output][]item{o: changed}))
	m2, err := Open(path)
	if err == nil {
		require.NoError(t, m2.Close())
	}
	return path, err
}

func TestEquinoxRefuses(t *testing.T) {
	named := func(items []item, name string) *item {
		return &items[slices.IndexFunc(items, func(i item) bool { return i.Name == name })]
	}
	table := func(name string, at int, v float32) func([]item) []item {
		return func(items []item) []item {
			i := named(items, name)
			raw := bytes.Clone(i.raw)
			require.NoError(t, encode(tensor.F32, raw[4*at:4*at+4], []float32{v}))
			i.raw = raw
			return items
		}
	}
	for _, test := range []struct {
		name   string
		change func([]item) []item
		want   string
	}{
		{"nothing", func(i []item) []item { return i }, ""},
		{"cosine", table("blocks.1.attn.rope._cos_cache", 17, 0.5), `leaf "blocks.1.attn.rope._cos_cache" is not what the configuration gives: [4 1] is 0.5`},
		{"sine", table("blocks.0.attn.rope._sin_cache", 255, 9), `_sin_cache" is not what the configuration gives`},
		{"frequency", table("blocks.0.attn.rope._inv_freq", 2, 1), `_inv_freq" is not what the configuration gives: [2] is 1`},
		{"concentration", table("blocks.0.attn.rope._concentration", 0, 1), `_concentration" is not what the configuration gives`},
		{"epsilons that differ", table("blocks.1.mlp.norm.eps", 0, 2e-5), `leaf "blocks.1.mlp.norm.eps" is 2e-05, but norm.eps is 1e-05`},
		{"no epsilon", table("norm.eps", 0, 0), `but norm.eps is 0`},
		{"a leaf too many", func(i []item) []item { return append(i, i[0]) }, "bytes after the last leaf"},
		{"a leaf missing", func(i []item) []item { return i[:len(i)-1] }, `leaf "unembedding.weight" is missing`},
		{"leaves in another order", func(i []item) []item {
			i[7], i[9] = i[9], i[7]
			return i
		}, `tensor "blocks.0.attn.qkv.weight" has shape [64 32], but`},
		{"integers", func(i []item) []item {
			named(i, "norm.eps").Spec.DType = tensor.I32
			return i
		}, `tensor "norm.eps" is I32`},
		{"a vector for a scalar", func(i []item) []item {
			named(i, "norm.eps").Spec.Shape = []int{1}
			return i
		}, `tensor "norm.eps" has shape [1]`},
	} {
		t.Run(test.name, func(t *testing.T) {
			path, err := equinoxWith(t, tinyOfTestdata(t), test.change)
			if test.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, test.want)
			assert.Contains(t, err.Error(), path)
			assert.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestEquinoxRefusesBytes(t *testing.T) {
	whole, err := os.ReadFile(filepath.Join("testdata", "equinox_bfloat16.eqx"))
	require.NoError(t, err)
	meta, err := os.ReadFile(filepath.Join("testdata", "equinox_bfloat16.eqx.meta.json"))
	require.NoError(t, err)
	for _, test := range []struct{ old, new, want string }{
		{"'<V2'", "'<f2'", "is float16"},
		{"'<V2'", "'<i2'", "is I16"},
		{"'<V2'", "'>V2'", "big-endian"},
		{"'fortran_order': False", "'fortran_order': True ", "Fortran's order"},
		{"NUMPY", "NUMPX", "magic string"},
		{"(11, 64)", "(11, 65)", "magic string"},
	} {
		path := filepath.Join(t.TempDir(), "x.eqx")
		require.Contains(t, string(whole), test.old)
		put(t, path, bytes.Replace(whole, []byte(test.old), []byte(test.new), 1))
		put(t, path+".meta.json", meta)
		_, err := Open(path)
		require.ErrorContains(t, err, test.want)
		require.ErrorContains(t, err, path)
	}
}

func tinyOfTestdata(t *testing.T) config.Config {
	c, err := config.Read(filepath.Join("testdata", "openai", "config.json"))
	require.NoError(t, err)
	return c
}

func TestMsgpackRefuses(t *testing.T) {
	array := func(shape, dtype string, body int) string {
		inner := "\x93" + shape + string(textHead(dtype)) + string(sized(0xc4, body)) + strings.Repeat("\x00", body)
		return string(extHead(len(inner))) + inner
	}
	one := array("\x91\x02", "bfloat16", 4)
	chunked := func(rest string) string {
		return "\x81\xa1a\x83" + string(textHead(chunkedKey)) + "\xc3" + rest
	}
	shape2 := "\xa5shape\x81\xa10\x04"
	for _, test := range []struct{ name, data, want string }{
		{"empty", "", "not a Flax bundle"},
		{"text", "hello", "not a Flax bundle"},
		{"list", "\x90", "not a Flax bundle"},
		{"rest", "\x80x", "1 bytes after the bundle"},
		{"huge map", "\xdf\xff\xff\xff\xff", "cut short: a map of"},
		{"cut in a key", "\x81\xa5ab", "cut short"},
		{"a number for a key", "\x81\x01\x01", "no string"},
		{"long key", "\x81\xda\x10\x00" + strings.Repeat("a", 4096), "at most 256"},
		{"the same key twice", "\x82\xa1a" + one + "\xa1a" + one, `key "a" occurs twice`},
		{"a number for an array", "\x81\xa1a\x01", `"a": is no array (msgpack code 0x1)`},
		{"nothing for an array", "\x81\xa1a", `"a": cut short`},
		{"complex", "\x81\xa1a\xd5\x02\x00\x00", "complex number"},
		{"another extension", "\x81\xa1a\xd5\x07\x00\x00", "extension of type 7"},
		{"extension beyond the file", "\x81\xa1a\xc9\xff\xff\xff\xff\x01ab", "cut short: 4294967295 bytes should follow"},
		{"no payload", "\x81\xa1a\xd4\x01\x90", "no array of shape, dtype and bytes"},
		{"huge shape", "\x81\xa1a" + array("\x92\xce\xff\xff\xff\xff\xce\xff\xff\xff\xff", "float32", 4), "too large"},
		{"negative shape", "\x81\xa1a" + array("\x91\xff", "float32", 4), "negative dimension"},
		{"nine dimensions", "\x81\xa1a" + array("\x99\x01\x01\x01\x01\x01\x01\x01\x01\x01", "float32", 4), "at most 8 dimensions"},
		{"shape of text", "\x81\xa1a" + array("\x91\xa1x", "float32", 4), "not made of integers"},
		{"unknown dtype", "\x81\xa1a" + array("\x91\x01", "float31", 4), `dtype "float31" is not known`},
		{"too few bytes", "\x81\xa1a" + array("\x91\x02", "float32", 4), "takes 8"},
		{"chunks without a shape", chunked("\xa6chunks\x81\xa10" + one + "\xa1x\xc0"), `no key "x"`},
		{"shape without chunks", "\x81\xa1a\x82" + string(textHead(chunkedKey)) + "\xc3" + shape2, "needs shape and chunks"},
		{"not marked true", "\x81\xa1a\x83" + string(textHead(chunkedKey)) + "\xc2" + shape2 + "\xa6chunks\x80", "is not true"},
		{"chunks out of order", chunked(shape2 + "\xa6chunks\x82\xa11" + one + "\xa10" + one), `key "1" stands where 0 should`},
		{"chunks that don't fill", chunked(shape2 + "\xa6chunks\x81\xa10" + one), "takes 8"},
		{"chunks of different sizes", chunked(shape2 + "\xa6chunks\x83\xa10" + one + "\xa11" + array("\x91\x01", "bfloat16", 2) + "\xa12" + array("\x91\x01", "bfloat16", 2)), "different sizes"},
		{"a larger last chunk", chunked("\xa5shape\x81\xa10\x03\xa6chunks\x82\xa10" + array("\x91\x01", "bfloat16", 2) + "\xa11" + one), "different sizes"},
		{"chunks of different types", chunked(shape2 + "\xa6chunks\x82\xa10" + one + "\xa11" + array("\x91\x02", "float16", 4)), "chunks of BF16 and F16"},
		{"deep", strings.Repeat("\x81\xa1a", 40), "nests more than"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := indexMsgpack([]byte(test.data))
			require.ErrorContains(t, err, test.want)
		})
	}
	scalar := "\x81\xa1a" + strings.Replace(array("\x90", "float32", 4), "\x01", "\x03", 1)
	arrays, err := indexMsgpack([]byte(scalar))
	require.NoError(t, err)
	require.Equal(t, []int{}, arrays[0].Shape)
}

func TestFlaxRefuses(t *testing.T) {
	m := open(t, filepath.Join("testdata", "openai"))
	write := func(change func([]item) []item) error {
		p := plan{Model: m}
		require.NoError(t, p.chooseTypes(t.Context(), Flax))
		path := filepath.Join(t.TempDir(), "x.msgpack")
		outputs, items, err := p.flax(path)
		require.NoError(t, err)
		changed := change(items[outputs[0]])
		o, err := layOutMsgpack(path, changed)
		require.NoError(t, err)
		w := writer{model: m}
		require.NoError(t, w.write(t.Context(), []*output{o, outputs[1]}, map[*output][]item{o: changed}))
		_, err = Open(path)
		return err
	}
	require.ErrorContains(t, write(func(i []item) []item { return i[1:] }), `tensor "embedding/embedding" is missing`)
	require.ErrorContains(t, write(func(i []item) []item { i[0].Name = "embedding/table"; return i }), `tensor "embedding/embedding" is missing`)
	require.ErrorContains(t, write(func(i []item) []item { i = append(i, i[0]); i[len(i)-1].Name = "extra"; return i }), `tensor "extra" is unexpected`)
}

// The damage test of safetensors for the other two layouts: every cut at 200
// places, every header byte changed.
func TestOpenDamagedFlaxAndEquinox(t *testing.T) {
	m := open(t, filepath.Join("testdata", "openai"))
	for _, layout := range []string{Flax, Equinox} {
		p := plan{Model: m}
		require.NoError(t, p.chooseTypes(t.Context(), layout))
		d := t.TempDir()
		path := filePath(layout, d)
		require.NoError(t, m.Write(t.Context(), layout, d, WriteOptions{}))
		var outputs []*output
		var err error
		if layout == Flax {
			outputs, _, err = p.flax(d)
		} else {
			outputs, _, err = p.equinox(d)
		}
		require.NoError(t, err)
		for _, o := range outputs {
			whole, err := os.ReadFile(o.path)
			require.NoError(t, err)
			require.EqualValues(t, o.size, len(whole))
			try := func(data []byte) (*Model, error) {
				require.NoError(t, os.Remove(o.path))
				require.NoError(t, os.WriteFile(o.path, data, 0o666))
				return Open(path)
			}
			for i := range 200 {
				_, err := try(whole[:len(whole)*i/200])
				require.Error(t, err, "%s cut at %d/200", o.path, i)
				require.NotContains(t, err.Error(), "\n")
			}
			tried := 0
			for _, fixed := range o.fixed {
				for at := fixed.at; at < fixed.at+fixed.length; at += 1 + fixed.length/40 {
					damaged := bytes.Clone(whole)
					damaged[at] ^= 1 << (at % 8)
					tried++
					got, err := try(damaged)
					if err != nil {
						require.NotContains(t, err.Error(), "\n")
						continue
					}
					if o.path == path {
						requireSameModel(t, m, got)
					}
					require.NoError(t, got.Close())
				}
			}
			require.Greater(t, tried, 20)
			_, err = try(whole)
			require.NoError(t, err)
		}
	}
}

func FuzzMsgpack(f *testing.F) {
	for _, name := range []string{"flax_bfloat16.msgpack", "flax_chunked.msgpack"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		require.NoError(f, err)
		f.Add(data)
	}
	f.Add([]byte("\x81\xa1a\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		arrays, err := indexMsgpack(data)
		if err != nil {
			return
		}
		for _, a := range arrays {
			require.NoError(t, a.CheckSize(located{a.Tensor, "", a.chunks}.size()))
		}
	})
}

func FuzzEquinox(f *testing.F) {
	for _, name := range []string{"equinox_bfloat16.eqx", "equinox_float32.eqx"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		require.NoError(f, err)
		f.Add(data)
	}
	c, err := config.Read(filepath.Join("testdata", "openai", "config.json"))
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, data []byte) {
		l := newLoader("x")
		l.config, l.layout = c, Equinox
		l.paths = []string{"x"}
		if l.equinoxLeaves("x", data) != nil {
			return
		}
		var m Model
		l.equinox(&m)
		l.gateBias(&m, true)
		if l.finish(&m) == nil {
			require.Len(t, m.Blocks, 2)
		}
	})
}

// decodedValues is an expert's decoded matrix, to be changed in place.
func decodedValues(m Matrix) Dense {
	if u, ok := m.(unpacked); ok {
		m = u.Matrix
	}
	return m.(Dense)
}
