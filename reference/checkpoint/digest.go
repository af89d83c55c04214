package checkpoint

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/gptoss-conformance/gptoss/reference/config"
)

// digestVersion is the first line of what is hashed; it changes when the
// definition does.
const digestVersion = "gptoss-digest-1"

// leafRows is how many rows of a matrix are hashed together.
const leafRows = 1024

// releaseValues is after how many values the mapped files' memory is given back.
const releaseValues = 64 << 20

// Digest identifies the model: sha256 over its configuration and the values of
// its weights, "sha256:<hex>". It depends on nothing else, so that every layout
// and sharding of the same model has the same digest, MXFP4 and its exact
// dequantization included. README.md in this folder defines it.
//
// It reads the whole checkpoint, in parallel, and reports the first weight that
// is not finite.
func (m *Model) Digest(ctx context.Context) (string, error) {
	return m.DigestProgress(ctx, func(int64, int64) {})
}

// DigestProgress is Digest with a function that several goroutines call with
// the weights (numbers) done so far and in all.
func (m *Model) DigestProgress(ctx context.Context, progress func(done, total int64)) (string, error) {
	type leaf struct {
		matrix  Matrix
		from, n int
	}
	named := m.canonical()
	var leaves []leaf
	counts := make([]int, len(named))
	for i, t := range named {
		rows, _ := t.matrix.Dims()
		for from := 0; from < rows; from += leafRows {
			leaves = append(leaves, leaf{t.matrix, from, min(leafRows, rows-from)})
			counts[i]++
		}
	}

	// Whole checkpoint first: its errors name file and tensor.
	if err := m.Check(ctx); err != nil {
		return "", err
	}
	m.Release()
	sums := make([][sha256.Size]byte, len(leaves))
	var values atomic.Int64
	total := m.Weights()
	group, ctx := errgroup.WithContext(ctx)
	workers := min(runtime.GOMAXPROCS(0), max(len(leaves), 1))
	for worker := range workers {
		group.Go(func() error {
			h := leafHasher{release: m.Release}
			for i := worker; i < len(leaves); i += workers {
				if err := ctx.Err(); err != nil {
					return err
				}
				l := leaves[i]
				sums[i] = h.sum(l.matrix, l.from, l.n)
				_, cols := l.matrix.Dims()
				n := int64(l.n) * int64(cols)
				done := values.Add(n)
				if done/releaseValues != (done-n)/releaseValues {
					m.Release()
				}
				progress(done, total)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return "", err
	}

	var text strings.Builder
	text.WriteString(digestVersion + "\n")
	writeConfig(&text, m.Config)
	for i, t := range named {
		rows, cols := t.matrix.Dims()
		all := sha256.New()
		for _, s := range sums[:counts[i]] {
			all.Write(s[:])
		}
		sums = sums[counts[i]:]
		fmt.Fprintf(&text, "%s %d %d %x\n", t.name, rows, cols, all.Sum(nil))
	}
	root := sha256.Sum256([]byte(text.String()))
	return "sha256:" + hex.EncodeToString(root[:]), nil
}

// writeConfig writes what the forward pass depends on, one line each. Numbers
// are the shortest decimals that give the same float64.
func writeConfig(text *strings.Builder, c config.Config) {
	line := func(name, value string) { text.WriteString(name + " " + value + "\n") }
	integer := func(name string, n int) { line(name, strconv.Itoa(n)) }
	number := func(name string, x float64) { line(name, strconv.FormatFloat(x, 'g', -1, 64)) }
	integer("layers", c.Layers)
	integer("experts", c.Experts)
	integer("experts_per_token", c.ExpertsPerToken)
	integer("vocab", c.VocabSize)
	integer("hidden", c.HiddenSize)
	integer("intermediate", c.IntermediateSize)
	integer("head_dim", c.HeadDim)
	integer("heads", c.Heads)
	integer("kv_heads", c.KVHeads)
	windows := make([]string, c.Layers)
	for i := range windows {
		windows[i] = strconv.Itoa(c.Window(i)) // 0: none
	}
	line("windows", strings.Join(windows, ","))
	integer("context", c.InitialContextLength)
	number("rope_theta", c.RopeTheta)
	number("rope_factor", c.RopeScalingFactor)
	number("rope_alpha", c.RopeNTKAlpha)
	number("rope_beta", c.RopeNTKBeta)
	line("rope_truncate", strconv.FormatBool(c.RopeTruncate))
	number("swiglu_limit", c.SwiGLULimit)
	number("swiglu_alpha", c.SwiGLUAlpha)
	number("norm_epsilon", c.NormEpsilon)
}

// namedMatrix is a weight under its canonical name: OpenAI's, with the expert's
// number where there is one per expert. Vectors are matrices of one row.
type namedMatrix struct {
	name   string
	matrix Matrix
}

func (m *Model) canonical() []namedMatrix {
	var out []namedMatrix
	matrix := func(name string, w Matrix) { out = append(out, namedMatrix{name, w}) }
	vector := func(name string, v []float32) { matrix(name, Dense{1, len(v), v}) }
	matrix("embedding.weight", m.Embedding)
	for n, b := range m.Blocks {
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
		for e := range b.MLP1 {
			matrix(fmt.Sprintf("%smlp1_weight.%d", mlp, e), b.MLP1[e])
			vector(fmt.Sprintf("%smlp1_bias.%d", mlp, e), b.MLP1Bias[e])
			matrix(fmt.Sprintf("%smlp2_weight.%d", mlp, e), b.MLP2[e])
			vector(fmt.Sprintf("%smlp2_bias.%d", mlp, e), b.MLP2Bias[e])
		}
	}
	vector("norm.scale", m.FinalNorm)
	matrix("unembedding.weight", m.Unembedding)
	return out
}

// leafHasher hashes rows in the shortest of three canonical forms, which the
// values alone decide: 'M', canonical MXFP4 (all blocks, then all scales), if
// every group of 32 is one; else 'B', bfloat16, if every value is one; else
// 'F', float32. Little-endian throughout.
type leafHasher struct {
	values, part []float32
	bytes        []byte
	release      func()
}

func (h *leafHasher) sum(m Matrix, from, n int) [sha256.Size]byte {
	_, cols := m.Dims()
	count := n * cols
	if packed, ok := m.(MXFP4); ok {
		groups := count / groupValues
		at := from * cols / groupValues
		if sum, ok := h.packed(packed.Blocks[at*groupBytes:(at+groups)*groupBytes], packed.Scales[at:at+groups]); ok {
			return sum
		}
	}
	if stored, ok := m.(BF16); ok && !h.startsAsMXFP4(m, from, cols) {
		whole := sha256.New()
		whole.Write([]byte{'B'})
		whole.Write(stored.Data[2*from*cols : 2*(from+n)*cols])
		return [sha256.Size]byte(whole.Sum(nil))
	}
	h.values = slices.Grow(h.values[:0], count)[:count]
	readRows(m, h.values, from, n, &h.part, h.release)
	if cols%groupValues == 0 {
		if sum, ok := h.encoded(h.values); ok {
			return sum
		}
	}
	if isBF16(h.values) {
		h.bytes = slices.Grow(h.bytes[:0], 1+2*count)[:1+2*count]
		h.bytes[0] = 'B'
		putBF16(h.bytes[1:], h.values)
		return sha256.Sum256(h.bytes)
	}
	h.bytes = slices.Grow(h.bytes[:0], 1+4*count)[:1+4*count]
	h.bytes[0] = 'F'
	for i, v := range h.values {
		binary.LittleEndian.PutUint32(h.bytes[1+4*i:], math.Float32bits(v))
	}
	return sha256.Sum256(h.bytes)
}

// startsAsMXFP4 looks at the first row only, to find out cheaply that a matrix is
// no MXFP4.
func (h *leafHasher) startsAsMXFP4(m Matrix, from, cols int) bool {
	if cols%groupValues != 0 {
		return false
	}
	h.values = slices.Grow(h.values[:0], cols)[:cols]
	m.Rows(h.values, from, 1)
	_, ok := h.encoded(h.values)
	return ok
}

// packed hashes groups that are MXFP4 already.
func (h *leafHasher) packed(blocks, scales []byte) ([sha256.Size]byte, bool) {
	h.bytes = append(h.bytes[:0], 'M')
	h.bytes = append(append(h.bytes, blocks...), scales...)
	b, s := h.bytes[1:1+len(blocks)], h.bytes[1+len(blocks):]
	for g := range s {
		scale, ok := canonicalMXFP4((*[groupBytes]byte)(b[g*groupBytes:]), s[g])
		if !ok {
			return [sha256.Size]byte{}, false
		}
		s[g] = scale
	}
	return sha256.Sum256(h.bytes), true
}

// encoded hashes values as MXFP4, if they all are.
func (h *leafHasher) encoded(values []float32) ([sha256.Size]byte, bool) {
	groups := len(values) / groupValues
	size := 1 + groups*(groupBytes+1)
	h.bytes = slices.Grow(h.bytes[:0], size)[:size]
	h.bytes[0] = 'M'
	for g := range groups {
		scale, ok := encodeMXFP4((*[groupBytes]byte)(h.bytes[1+g*groupBytes:]), (*[groupValues]float32)(values[g*groupValues:]))
		if !ok {
			return [sha256.Size]byte{}, false
		}
		h.bytes[1+groups*groupBytes+g] = scale
	}
	return sha256.Sum256(h.bytes), true
}
