package checkpoint

import (
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// values reads a whole matrix.
func values(m Matrix) []float32 {
	rows, cols := m.Dims()
	out := make([]float32, rows*cols)
	m.Rows(out, 0, rows)
	return out
}

func requireSameModel(t *testing.T, want, got *Model) {
	t.Helper()
	require.Equal(t, want.Config, got.Config)
	same := func(name string, a, b Matrix) {
		t.Helper()
		ar, ac := a.Dims()
		br, bc := b.Dims()
		require.Equal(t, [2]int{ar, ac}, [2]int{br, bc}, name)
		x, y := values(a), values(b)
		for i := range x {
			// Compared as bits, so that -0 is not 0; element by element, so that a
			// failure is readable.
			if math.Float32bits(x[i]) != math.Float32bits(y[i]) {
				require.Failf(t, "different values", "%s, row %d, column %d: want %g, got %g", name, i/ac, i%ac, x[i], y[i])
			}
		}
	}
	same("embedding", want.Embedding, got.Embedding)
	same("unembedding", want.Unembedding, got.Unembedding)
	require.Equal(t, want.FinalNorm, got.FinalNorm)
	require.Len(t, got.Blocks, len(want.Blocks))
	for i, a := range want.Blocks {
		b := got.Blocks[i]
		same("qkv", a.QKV, b.QKV)
		same("out", a.Out, b.Out)
		same("gate", a.Gate, b.Gate)
		require.Len(t, b.MLP1, len(a.MLP1))
		require.Len(t, b.MLP2, len(a.MLP2))
		for e := range a.MLP1 {
			same("mlp1", a.MLP1[e], b.MLP1[e])
			same("mlp2", a.MLP2[e], b.MLP2[e])
		}
		require.Equal(t, a.AttnNorm, b.AttnNorm)
		require.Equal(t, a.QKVBias, b.QKVBias)
		require.Equal(t, a.Sinks, b.Sinks)
		require.Equal(t, a.OutBias, b.OutBias)
		require.Equal(t, a.MLPNorm, b.MLPNorm)
		require.Equal(t, a.GateBias, b.GateBias)
		require.Equal(t, a.MLP1Bias, b.MLP1Bias)
		require.Equal(t, a.MLP2Bias, b.MLP2Bias)
	}
}

func open(t *testing.T, path string) *Model {
	t.Helper()
	m, err := Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func TestOpenEveryPlace(t *testing.T) {
	c := tiny()
	w := weights(c)
	hf, plain := huggingFaceWeights(c, w, false), huggingFaceWeights(c, w, true)
	first := t.TempDir()
	writeOpenAI(t, first, c, w, 1)
	want := open(t, first)
	assert.Equal(t, c, want.Config)

	for _, test := range []struct {
		name   string
		layout string
		write  func(directory string) (path string)
	}{
		{"OpenAI, the file", OpenAI, func(d string) string {
			writeOpenAI(t, d, c, w, 1)
			return filepath.Join(d, "model.safetensors")
		}},
		{"OpenAI, sharded", OpenAI, func(d string) string { writeOpenAI(t, d, c, w, 5); return d }},
		{"OpenAI, in original", OpenAI, func(d string) string { writeOpenAI(t, filepath.Join(d, "original"), c, w, 2); return d }},
		{"OpenAI, with a stranger's file beside it", OpenAI, func(d string) string {
			writeOpenAI(t, d, c, w, 1)
			stranger := []byte("\x02\x00\x00\x00\x00\x00\x00\x00{}")
			put(t, filepath.Join(d, "adapter.safetensors"), stranger)
			return d
		}},
		{"Hugging Face, one file", HuggingFace, func(d string) string { writeHuggingFace(t, d, c, hf, 1); return d }},
		{"Hugging Face, sharded", HuggingFace, func(d string) string { writeHuggingFace(t, d, c, hf, 4); return d }},
		{"Hugging Face, dequantized", HuggingFace, func(d string) string { writeHuggingFace(t, d, c, plain, 1); return d }},
		{"Hugging Face, dequantized and sharded", HuggingFace, func(d string) string { writeHuggingFace(t, d, c, plain, 3); return d }},
		{"Hugging Face over original", HuggingFace, func(d string) string {
			writeHuggingFace(t, d, c, hf, 2)
			put(t, filepath.Join(d, "original", "model.safetensors"), []byte("not looked at"))
			return d
		}},
		{"Hugging Face, old shards beside model.safetensors", HuggingFace, func(d string) string {
			writeHuggingFace(t, d, c, hf, 1)
			put(t, filepath.Join(d, "old.safetensors"), []byte("not looked at"))
			return d
		}},
		{"hub cache", HuggingFace, func(d string) string {
			hub := filepath.Join(d, "models--openai--gpt-oss-20b")
			blobs, snapshot := filepath.Join(hub, "blobs"), filepath.Join(hub, "snapshots", "0123abcd")
			writeHuggingFace(t, blobs, c, hf, 2)
			require.NoError(t, os.MkdirAll(snapshot, 0o777))
			entries, err := os.ReadDir(blobs)
			require.NoError(t, err)
			for _, e := range entries {
				require.NoError(t, os.Symlink(filepath.Join("..", "..", "blobs", e.Name()), filepath.Join(snapshot, e.Name())))
			}
			require.NoError(t, os.MkdirAll(filepath.Join(hub, "snapshots", "ffff"), 0o777))
			put(t, filepath.Join(hub, "refs", "main"), []byte("0123abcd"))
			return hub
		}},
		{"hub cache without refs", HuggingFace, func(d string) string {
			writeHuggingFace(t, filepath.Join(d, "snapshots", "0123"), c, hf, 1)
			return d
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := test.write(t.TempDir())
			got := open(t, path)
			assert.Equal(t, Source{path, test.layout}, got.Source)
			requireSameModel(t, want, got)
			require.NoError(t, got.Check(t.Context()))
		})
	}
}
