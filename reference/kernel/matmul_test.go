package kernel

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// dense is a matrix of float32 in memory.
type dense struct {
	rows, cols int
	data       []float32
}

func (d dense) Dims() (int, int)                { return d.rows, d.cols }
func (d dense) Rows(dst []float32, from, n int) { copy(dst[:n*d.cols], d.data[from*d.cols:]) }

// packed4 and packed16 are the same values in MXFP4 and bfloat16.
type packed4 struct {
	dense
	blocks, scales []byte
}

func (p packed4) PackedMXFP4() (blocks, scales []byte) { return p.blocks, p.scales }

type packed16 struct {
	dense
	bytes []byte
}

func (p packed16) PackedBF16() []byte { return p.bytes }

type stacked []Rows

func (s stacked) Stacked() []Rows { return s }
func (s stacked) Dims() (rows, cols int) {
	for _, p := range s {
		r, c := p.Dims()
		rows, cols = rows+r, c
	}
	return rows, cols
}
func (s stacked) Rows([]float32, int, int) { panic("a stack is taken apart") }

// codeValues are MXFP4's, from the OCP specification.
var codeValues = [16]float64{0, 0.5, 1, 1.5, 2, 3, 4, 6, math.Copysign(0, -1), -0.5, -1, -1.5, -2, -3, -4, -6}

func randomMXFP4(r *rand.Rand, rows, cols int, scale func() byte) packed4 {
	p := packed4{dense: dense{rows, cols, make([]float32, rows*cols)}}
	for g := range rows * cols / 32 {
		s := scale()
		p.scales = append(p.scales, s)
		for i := range 16 {
			b := byte(r.Uint32())
			p.blocks = append(p.blocks, b)
			p.data[32*g+2*i] = float32(math.Ldexp(codeValues[b&15], int(s)-127))
			p.data[32*g+2*i+1] = float32(math.Ldexp(codeValues[b>>4], int(s)-127))
		}
	}
	return p
}

func usualScale(r *rand.Rand) func() byte {
	return func() byte { return byte(118 + r.IntN(6)) }
}

func asBF16(d dense) packed16 {
	p := packed16{dense: d}
	for _, v := range d.data {
		p.bytes = binary.LittleEndian.AppendUint16(p.bytes, uint16(math.Float32bits(v)>>16))
	}
	return p
}

func normals[F Float](r *rand.Rand, n int) []F {
	x := make([]F, n)
	for i := range x {
		x[i] = F(r.NormFloat64())
	}
	return x
}

// on runs a product with one instruction set, or with portable Go (nil).
func on[F Float](set *instructionSet, x []F, w Rows) (y []F) {
	with(set, func() { y = MatMul(x, w, nil) })
	return y
}

// sizes cover rows and tokens that do and do not fill the kernels' blocks,
// panels and tasks, and columns of one group, of the real width and of more than
// a panel's groups.
var sizes = []struct{ rows, cols, tokens int }{
	{1, 32, 1}, {3, 32, 1}, {4, 32, 2}, {5, 64, 3}, {6, 96, 4}, {23, 160, 5},
	{24, 768, 7}, {25, 800, 8}, {97, 96, 66}, {200, 2880, 1}, {50, 2880, 131}, {13, 1536, 9}, {26, 64, 6}, {31, 96, 17},
}

// TestProductsAreWithinTheBound compares every instruction set and portable Go
// with an exact sum. The bound is that of the judge: λ·√n·u·Σ|ab| with λ = 7
// (conformance/bounds.go), n·u·Σ|ab| where that is less.
func TestProductsAreWithinTheBound(t *testing.T) {
	for _, set := range append([]*instructionSet{nil}, instructionSets...) {
		for _, size := range sizes {
			t.Run(fmt.Sprintf("%s/%dx%dx%d", nameOf(set), size.rows, size.cols, size.tokens), func(t *testing.T) {
				r := rand.New(rand.NewPCG(1, 2))
				w := randomMXFP4(r, size.rows, size.cols, usualScale(r))
				x := normals[float32](r, size.tokens*size.cols)
				got, wide := on(set, x, Rows(w)), on(set, widened(x), Rows(w))
				n := float64(size.cols)
				factor := min(n, 7*math.Sqrt(n))
				for i := range got {
					row := w.data[i%size.rows*size.cols:][:size.cols]
					in := x[i/size.rows*size.cols:][:size.cols]
					sum, magnitude := 0.0, 0.0
					for c, v := range in {
						sum += float64(v) * float64(row[c])
						magnitude += math.Abs(float64(v) * float64(row[c]))
					}
					require.InDelta(t, sum, float64(got[i]), factor*Float32.UnitRoundoff()*magnitude, "element %d", i)
					require.InDelta(t, sum, wide[i], 2*n*Float64.UnitRoundoff()*magnitude, "element %d in float64", i)
				}
			})
		}
	}
}

func nameOf(set *instructionSet) string {
	if set == nil {
		return "Go"
	}
	return set.name
}

func widened(x []float32) []float64 {
	y := make([]float64, len(x))
	for i, v := range x {
		y[i] = float64(v)
	}
	return y
}

// TestProductsDoNotDependOnTheMachine: all instruction sets agree to the bit,
// in float64 with portable Go too; and neither the storage of the weights, nor
// the other tokens, nor the number of cores changes a bit.
func TestProductsDoNotDependOnTheMachine(t *testing.T) {
	if len(instructionSets) == 0 {
		t.Skip("this processor has no vector kernels")
	}
	for _, size := range sizes {
		t.Run(fmt.Sprintf("%dx%dx%d", size.rows, size.cols, size.tokens), func(t *testing.T) {
			r := rand.New(rand.NewPCG(3, 4))
			w := randomMXFP4(r, size.rows, size.cols, usualScale(r))
			x := normals[float32](r, size.tokens*size.cols)
			single := on(instructionSets[0], x, Rows(w))
			double := on(nil, widened(x), Rows(w))
			for _, set := range instructionSets {
				for name, stored := range map[string]Rows{
					"MXFP4": w, "bfloat16": asBF16(w.dense), "float32": w.dense, "parts": cut(w.dense),
				} {
					assert.Equal(t, single, on(set, x, stored), "%s from %s", set.name, name)
					assert.Equal(t, double, on(set, widened(x), stored), "%s from %s in float64", set.name, name)
				}
				last := on(set, x[(size.tokens-1)*size.cols:], Rows(w))
				assert.Equal(t, single[(size.tokens-1)*size.rows:], last, "%s, the last token alone", set.name)
				before := runtime.GOMAXPROCS(1)
				assert.Equal(t, single, on(set, x, Rows(w)), "%s on one core", set.name)
				runtime.GOMAXPROCS(before)
			}
		})
	}
}

// absolute is a matrix without its signs.
type absolute struct {
	dense
	signed Rows
}

func (a absolute) Magnitudes() Rows { return a.signed }

// TestMagnitudes: a matrix without its signs is what its values say it is.
func TestMagnitudes(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	w := randomMXFP4(r, 29, 96, usualScale(r))
	plain := dense{w.rows, w.cols, make([]float32, len(w.data))}
	for i, v := range w.data {
		plain.data[i] = float32(math.Abs(float64(v)))
	}
	for _, set := range instructionSets {
		for _, tokens := range []int{1, 7} {
			x := normals[float32](r, tokens*w.cols)
			assert.Equal(t, on(set, x, Rows(plain)), on(set, x, Rows(absolute{plain, w})), set.name)
			assert.Equal(t, on(set, widened(x), Rows(plain)), on(set, widened(x), Rows(absolute{plain, w})), set.name)
		}
	}
}

// cut is a matrix in two parts, one of them bfloat16.
func cut(d dense) Rows {
	at := (d.rows + 1) / 2
	upper := asBF16(dense{at, d.cols, d.data[:at*d.cols]})
	if at == d.rows {
		return stacked{upper}
	}
	return stacked{upper, dense{d.rows - at, d.cols, d.data[at*d.cols:]}}
}

// TestEveryMXFP4WeightIsExact multiplies every code under every scale with one.
// Scale 255 is NaN in the specification and stands over zeros only.
func TestEveryMXFP4WeightIsExact(t *testing.T) {
	for _, set := range append([]*instructionSet{nil}, instructionSets...) {
		for scale := range 256 {
			r := rand.New(rand.NewPCG(5, uint64(scale)))
			w := randomMXFP4(r, 32, 32, func() byte { return byte(scale) })
			for i := range w.blocks { // row r, and only column r, has code r/2 (or the next)
				row, pair := i/16, i%16
				switch {
				case pair != row/2 || scale == 255:
					w.blocks[i] = 0
				case row%2 == 0:
					w.blocks[i] = byte(row / 2)
				default:
					w.blocks[i] = byte(row/2) << 4
				}
			}
			for i := range w.data {
				w.data[i] = 0
				if row, col := i/32, i%32; row == col && scale != 255 {
					w.data[i] = float32(math.Ldexp(codeValues[row/2], scale-127))
				}
			}
			if scale >= 253 && scale < 255 { // larger codes overflow and are refused on opening
				continue
			}
			x := make([]float32, 32)
			for i := range x {
				x[i] = 1
			}
			got, wide := on(set, x, Rows(w)), on(set, widened(x), Rows(w))
			for row := range 32 {
				want := w.data[row*32+row]
				assert.Equal(t, want, got[row], "%s: scale %d, code %d", nameOf(set), scale, row/2)
				assert.Equal(t, float64(want), wide[row], "%s in float64: scale %d, code %d", nameOf(set), scale, row/2)
			}
		}
	}
}

// TestAnotherOrderIsHonoured: a caller's inner product is what sums.
func TestAnotherOrderIsHonoured(t *testing.T) {
	calls := 0
	r := rand.New(rand.NewPCG(7, 8))
	w := randomMXFP4(r, 3, 32, usualScale(r))
	MatMul(normals[float32](r, 64), Rows(w), func(a, b []float32) float32 { calls++; return 0 })
	assert.Equal(t, 6, calls)
}
