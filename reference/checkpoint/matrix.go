package checkpoint

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/x448/float16"

	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// BF16 is a matrix of bfloat16, row after row.
type BF16 struct {
	RowCount, ColCount int
	Data               []byte // [rows, cols], little-endian
}

// Dims returns outputs and inputs.
func (m BF16) Dims() (int, int) { return m.RowCount, m.ColCount }

// Rows widens rows [from, from+n) into dst.
func (m BF16) Rows(dst []float32, from, n int) {
	widenBF16(dst[:n*m.ColCount], m.Data[2*from*m.ColCount:])
}

// F16 is a matrix of IEEE half precision, row after row.
type F16 struct {
	RowCount, ColCount int
	Data               []byte // [rows, cols], little-endian
}

// Dims returns outputs and inputs.
func (m F16) Dims() (int, int) { return m.RowCount, m.ColCount }

// Rows widens rows [from, from+n) into dst.
func (m F16) Rows(dst []float32, from, n int) {
	widenF16(dst[:n*m.ColCount], m.Data[2*from*m.ColCount:])
}

// F32 is a matrix of float32, row after row.
type F32 struct {
	RowCount, ColCount int
	Data               []byte // [rows, cols], little-endian
}

// Dims returns outputs and inputs.
func (m F32) Dims() (int, int) { return m.RowCount, m.ColCount }

// Rows copies rows [from, from+n) into dst.
func (m F32) Rows(dst []float32, from, n int) {
	widenF32(dst[:n*m.ColCount], m.Data[4*from*m.ColCount:])
}

func widenBF16(dst []float32, src []byte) {
	src = src[:2*len(dst)]
	for len(dst) >= 4 { // four at a time: one load instead of four
		w := binary.LittleEndian.Uint64(src)
		dst[0] = math.Float32frombits(uint32(w) << 16)
		dst[1] = math.Float32frombits(uint32(w) & 0xffff0000)
		dst[2] = math.Float32frombits(uint32(w>>32) << 16)
		dst[3] = math.Float32frombits(uint32(w>>32) & 0xffff0000)
		dst, src = dst[4:], src[8:]
	}
	for i := range dst {
		dst[i] = tensor.BFloat16(binary.LittleEndian.Uint16(src[2*i:]))
	}
}

func widenF16(dst []float32, src []byte) {
	for i := range dst {
		dst[i] = float16.Frombits(binary.LittleEndian.Uint16(src[2*i:])).Float32()
	}
}

func widenF32(dst []float32, src []byte) {
	for i := range dst {
		dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:]))
	}
}

// widen converts elements of a dtype that [dense] accepts.
func widen(d tensor.DType, dst []float32, src []byte) {
	switch d {
	case tensor.BF16:
		widenBF16(dst, src)
	case tensor.F16:
		widenF16(dst, src)
	case tensor.F32:
		widenF32(dst, src)
	default:
		panic(fmt.Sprintf("checkpoint: %s is no storage type of weights", d))
	}
}

// dense returns the matrix type for a storage type.
func dense(d tensor.DType, rows, cols int, data []byte) Matrix {
	switch d {
	case tensor.BF16:
		return BF16{rows, cols, data}
	case tensor.F16:
		return F16{rows, cols, data}
	case tensor.F32:
		return F32{rows, cols, data}
	}
	panic(fmt.Sprintf("checkpoint: %s is no storage type of weights", d))
}

// isDense reports whether a storage type widens to float32 exactly.
func isDense(d tensor.DType) bool {
	return d == tensor.BF16 || d == tensor.F16 || d == tensor.F32
}

// Transposed is a matrix that is stored as its transpose [cols, rows]:
// Hugging Face's dequantized experts and Flax's kernels, both [in, out].
type Transposed struct {
	RowCount, ColCount int
	DType              tensor.DType // BF16, F16 or F32
	Data               []byte       // [cols, rows], little-endian
}

// Dims returns outputs and inputs.
func (m Transposed) Dims() (int, int) { return m.RowCount, m.ColCount }

// transposeTile is how many rows and columns are turned at a time: 64 x 64
// float32 take 16 kB and stay in the first-level cache.
const transposeTile = 64

// Rows widens rows [from, from+n) into dst. Every stored row is read once, in
// pieces of n; many rows at a time are therefore much faster than one.
func (m Transposed) Rows(dst []float32, from, n int) {
	size := m.DType.Size()
	var line [transposeTile]float32
	for r := 0; r < n; r += transposeTile {
		width := min(transposeTile, n-r)
		if m.DType == tensor.BF16 {
			m.rowsBF16(dst[r*m.ColCount:], from+r, width)
			continue
		}
		for c := range m.ColCount {
			at := (c*m.RowCount + from + r) * size
			widen(m.DType, line[:width], m.Data[at:])
			out := dst[r*m.ColCount+c:]
			for i, v := range line[:width] {
				out[i*m.ColCount] = v
			}
		}
	}
}

// rowsBF16 is Rows for a tile of the usual type: eight stored rows at a time, so
// that each line of dst is written in pieces of 32 bytes.
func (m Transposed) rowsBF16(dst []float32, from, n int) {
	const lanes = 8
	c := 0
	for ; c+lanes <= m.ColCount; c += lanes {
		var lines [lanes][]byte
		for i := range lines {
			at := 2 * ((c+i)*m.RowCount + from)
			lines[i] = m.Data[at : at+2*n]
		}
		for r := range n {
			out := dst[r*m.ColCount+c:][:lanes]
			for i := range lines {
				out[i] = tensor.BFloat16(binary.LittleEndian.Uint16(lines[i][2*r:]))
			}
		}
	}
	for ; c < m.ColCount; c++ {
		for r := range n {
			dst[r*m.ColCount+c] = tensor.BFloat16(binary.LittleEndian.Uint16(m.Data[2*(c*m.RowCount+from+r):]))
		}
	}
}

// Chunked is a matrix inside a tensor that is stored in several pieces, as Flax
// stores arrays of more than 2^30 bytes.
type Chunked struct {
	RowCount, ColCount int
	DType              tensor.DType // BF16, F16 or F32
	Transposed         bool         // stored [cols, rows]
	Start              int          // the matrix's first element in the tensor
	Chunks             [][]byte     // the tensor: pieces of equal size, but the last
}

// Dims returns outputs and inputs.
func (m Chunked) Dims() (int, int) { return m.RowCount, m.ColCount }

// Rows widens rows [from, from+n) into dst.
func (m Chunked) Rows(dst []float32, from, n int) {
	if !m.Transposed {
		m.widen(dst[:n*m.ColCount], m.Start+from*m.ColCount)
		return
	}
	var line [transposeTile]float32
	for r := 0; r < n; r += transposeTile {
		width := min(transposeTile, n-r)
		for c := range m.ColCount {
			m.widen(line[:width], m.Start+c*m.RowCount+from+r)
			out := dst[r*m.ColCount+c:]
			for i, v := range line[:width] {
				out[i*m.ColCount] = v
			}
		}
	}
}

// widen reads elements in storage order.
func (m Chunked) widen(dst []float32, at int) {
	size := m.DType.Size()
	each := len(m.Chunks[0]) / size
	for len(dst) > 0 {
		chunk := m.Chunks[at/each][at%each*size:]
		n := min(len(dst), len(chunk)/size)
		widen(m.DType, dst[:n], chunk)
		dst, at = dst[n:], at+n
	}
}

// Stack is the rows of several matrices one after another: Hugging Face's q, k
// and v, which OpenAI stores as one. All have the same number of columns.
type Stack struct {
	Parts []Matrix
}

// Dims returns outputs and inputs.
func (m Stack) Dims() (rows, cols int) {
	for _, p := range m.Parts {
		r, c := p.Dims()
		rows, cols = rows+r, c
	}
	return rows, cols
}

// Rows decodes rows [from, from+n) into dst.
func (m Stack) Rows(dst []float32, from, n int) {
	for _, p := range m.Parts {
		rows, cols := p.Dims()
		if take := min(rows-from, n); take > 0 {
			p.Rows(dst, from, take)
			dst, n = dst[take*cols:], n-take
			from = 0
			continue
		}
		from = max(from-rows, 0)
	}
}

// PackedBF16 returns the bytes, for kernels that widen in registers.
func (m BF16) PackedBF16() []byte { return m.Data }

// Stacked returns the parts, for kernels that take them one by one.
func (m Stack) Stacked() []kernel.Rows {
	parts := make([]kernel.Rows, len(m.Parts))
	for i, p := range m.Parts {
		parts[i] = p
	}
	return parts
}

// columnsOf returns n columns, from one on, of a matrix that is stored
// transposed: there they are rows, and lie together.
func columnsOf(m Matrix, from, n int) Matrix {
	switch m := m.(type) {
	case Transposed:
		line := m.RowCount * m.DType.Size()
		return Transposed{m.RowCount, n, m.DType, m.Data[from*line : (from+n)*line]}
	case Chunked:
		m.ColCount, m.Start = n, m.Start+from*m.RowCount
		size := m.DType.Size()
		each := len(m.Chunks[0]) / size
		if end := m.Start + n*m.RowCount; m.Start/each == (end-1)/each { // in one piece after all
			chunk := m.Chunks[m.Start/each]
			at := m.Start % each
			return Transposed{m.RowCount, n, m.DType, chunk[at*size : (at+n*m.RowCount)*size]}
		}
		return m
	}
	panic("checkpoint: not stored transposed")
}

// Rows of a wide transposed matrix touch every stored line, and the system maps
// 64 kB around each touch: 184 MB for 2880 lines, whatever is read of them. They
// are therefore read in groups of lines, after each of which the memory is given
// back.
const (
	wideLine  = 64 << 10
	lineGroup = 256
)

// readRows is Rows for matrices of any size in bounded memory.
func readRows(m Matrix, dst []float32, from, n int, buffer *[]float32, release func()) {
	rows, cols := m.Dims()
	if _, ok := asStored(m); !ok || 2*rows < wideLine {
		m.Rows(dst, from, n)
		return
	}
	for c := 0; c < cols; c += lineGroup {
		k := min(lineGroup, cols-c)
		part := resize(*buffer, n*k)
		*buffer = part
		columnsOf(m, c, k).Rows(part, from, n)
		for r := range n {
			copy(dst[r*cols+c:], part[r*k:(r+1)*k])
		}
		release()
	}
}
