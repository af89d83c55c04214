package checkpoint

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

func digest(t *testing.T, m *Model) string {
	t.Helper()
	d, err := m.Digest(t.Context())
	require.NoError(t, err)
	return d
}

func TestDigestIsTheSameFromEveryLayout(t *testing.T) {
	c := tiny()
	w := weights(c)
	want := ""
	for i, write := range []func(d string){
		func(d string) { writeOpenAI(t, d, c, w, 1) },
		func(d string) { writeOpenAI(t, d, c, w, 3) },
		func(d string) { writeHuggingFace(t, d, c, huggingFaceWeights(c, w, false), 2) },
		func(d string) { writeHuggingFace(t, d, c, huggingFaceWeights(c, w, true), 1) },
		func(d string) {
			wide := huggingFaceWeights(c, w, true)
			for i, n := range wide {
				values, err := n.Float32s()
				require.NoError(t, err)
				wide[i].Tensor = tensor.FromFloat32s(n.Shape, values)
			}
			writeHuggingFace(t, d, c, wide, 1)
		},
	} {
		directory := t.TempDir()
		write(directory)
		m := open(t, directory)
		got := digest(t, m)
		if i == 0 {
			want = got
		}
		require.Equal(t, want, got, "case %d", i)
		require.Equal(t, want, digest(t, m.Densify(1<<30)))
		require.Equal(t, m, m.Densify(1000))
	}
}

func TestDigestSeesEveryChange(t *testing.T) {
	c := tiny()
	directory := t.TempDir()
	writeOpenAI(t, directory, c, weights(c), 1)
	base := digest(t, open(t, directory))
	for i := range weights(c) {
		w := weights(c)
		w[i].Data[len(w[i].Data)/2] ^= 1
		d := t.TempDir()
		writeOpenAI(t, d, c, w, 1)
		require.NotEqual(t, base, digest(t, open(t, d)), w[i].Name)
	}
	m := open(t, directory)
	m.Config.SwiGLULimit = 8
	require.NotEqual(t, base, digest(t, m))
}

// The definition once more, written from README.md and not from digest.go.
func TestDigestByTheDefinition(t *testing.T) {
	c := tiny()
	c.VocabSize = 1500 // two leaves
	directory := t.TempDir()
	writeOpenAI(t, directory, c, weights(c), 1)
	m := open(t, directory)

	text := "gptoss-digest-1\nlayers 2\nexperts 3\nexperts_per_token 2\nvocab 1500\nhidden 64\nintermediate 32\n" +
		"head_dim 8\nheads 4\nkv_heads 2\nwindows 3,0\ncontext 64\nrope_theta 150000\nrope_factor 32\nrope_alpha 1\nrope_beta 8\n" +
		"rope_truncate false\nswiglu_limit 7\nswiglu_alpha 1.702\nnorm_epsilon 1e-05\n"
	matrix := func(name string, w Matrix) {
		rows, cols := w.Dims()
		all := values(w)
		var leaves []byte
		for from := 0; from < rows; from += 1024 {
			sum := sha256.Sum256(form(all[from*cols:min(from+1024, rows)*cols], cols))
			leaves = append(leaves, sum[:]...)
		}
		sum := sha256.Sum256(leaves)
		text += fmt.Sprintf("%s %d %d %s\n", name, rows, cols, hex.EncodeToString(sum[:]))
	}
	vector := func(name string, v []float32) { matrix(name, Dense{1, len(v), v}) }
	matrix("embedding.weight", m.Embedding)
	for i, b := range m.Blocks {
		block := fmt.Sprintf("block.%d.", i)
		vector(block+"attn.norm.scale", b.AttnNorm)
		matrix(block+"attn.qkv.weight", b.QKV)
		vector(block+"attn.qkv.bias", b.QKVBias)
		vector(block+"attn.sinks", b.Sinks)
		matrix(block+"attn.out.weight", b.Out)
		vector(block+"attn.out.bias", b.OutBias)
		vector(block+"mlp.norm.scale", b.MLPNorm)
		matrix(block+"mlp.gate.weight", b.Gate)
		vector(block+"mlp.gate.bias", b.GateBias)
		for e := range c.Experts {
			matrix(fmt.Sprintf("%smlp.mlp1_weight.%d", block, e), b.MLP1[e])
			vector(fmt.Sprintf("%smlp.mlp1_bias.%d", block, e), b.MLP1Bias[e])
			matrix(fmt.Sprintf("%smlp.mlp2_weight.%d", block, e), b.MLP2[e])
			vector(fmt.Sprintf("%smlp.mlp2_bias.%d", block, e), b.MLP2Bias[e])
		}
	}
	vector("norm.scale", m.FinalNorm)
	matrix("unembedding.weight", m.Unembedding)
	sum := sha256.Sum256([]byte(text))
	assert.Equal(t, "sha256:"+hex.EncodeToString(sum[:]), digest(t, m))
}

// form is the canonical form of a leaf, by search over all scales.
func form(all []float32, cols int) []byte {
	magnitudes := []float64{0, 0.5, 1, 1.5, 2, 3, 4, 6}
	encode := func(group []float32) (block []byte, scale byte, ok bool) {
	scales:
		for s := 0; s <= 252; s++ { // the lowest scale has the largest codes
			block = make([]byte, 16)
		values:
			for i, v := range group {
				for code, x := range magnitudes {
					if math.Abs(float64(v)) == math.Ldexp(x, s-127) {
						if math.Signbit(float64(v)) {
							code += 8
						}
						block[i/2] |= byte(code) << (4 * (i % 2))
						continue values
					}
				}
				continue scales
			}
			return block, byte(s), true
		}
		return nil, 0, false
	}
	if cols%32 == 0 {
		var blocks, scales []byte
		ok := true
		for from := 0; from < len(all) && ok; from += 32 {
			var block []byte
			var scale byte
			block, scale, ok = encode(all[from : from+32])
			blocks, scales = append(blocks, block...), append(scales, scale)
		}
		if ok {
			return append(append([]byte{'M'}, blocks...), scales...)
		}
	}
	var b, f bytes.Buffer
	b.WriteByte('B')
	f.WriteByte('F')
	short := true
	for _, v := range all {
		bits := math.Float32bits(v)
		short = short && bits&0xffff == 0
		binary.Write(&b, binary.LittleEndian, uint16(bits>>16))
		binary.Write(&f, binary.LittleEndian, bits)
	}
	if short {
		return b.Bytes()
	}
	return f.Bytes()
}

func TestDigestRefusesNonFinite(t *testing.T) {
	m := &Model{Config: tiny()}
	m.Embedding = Dense{1, 2, []float32{1, float32(math.NaN())}}
	m.checks = []check{{`x: tensor "embedding.weight"`, m.Embedding}}
	m.Unembedding = m.Embedding
	_, err := m.Digest(t.Context())
	require.ErrorContains(t, err, `tensor "embedding.weight" is not finite at row 0, column 1`)
}

func TestDigestStopsWhenCancelled(t *testing.T) {
	c := tiny()
	directory := t.TempDir()
	writeOpenAI(t, directory, c, weights(c), 1)
	m := open(t, directory)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := m.Digest(ctx)
	require.ErrorIs(t, err, context.Canceled)
}
