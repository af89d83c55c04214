package checkpoint

import (
	"encoding/binary"
	"math"
	"sync"
)

// MXFP4 (OCP Microscaling Formats 1.0, E2M1 elements with E8M0 scales): groups
// of 32 values along the inputs share a scale byte. Each value is a 4-bit code;
// of the two codes in a byte the low one comes first.
//
//	value = code · 2^(scale − 127)
const (
	groupValues = 32
	groupBytes  = groupValues / 2
	scaleBias   = 127
)

// fp4 has the values of the 16 codes; the upper half is negative. Code 8 is −0.
var fp4 = [16]float32{0, 0.5, 1, 1.5, 2, 3, 4, 6, float32(math.Copysign(0, -1)), -0.5, -1, -1.5, -2, -3, -4, -6}

// mxfp4 has the value of every code at every scale; 16 kB. All finite ones are
// exact, the smallest (0.5 at scale 0 = 2^-128) as subnormal float32, which
// bfloat16 has too; torch's loader (ldexp in bfloat16) gives the same bits.
// Infinity marks those that overflow, which [Model.Check] refuses.
var mxfp4 = func() (table [256][16]float32) {
	for scale := range table {
		for code, v := range fp4 {
			table[scale][code] = float32(math.Ldexp(float64(v), scale-scaleBias))
		}
	}
	return table
}()

// MXFP4 is one expert's matrix in MXFP4. ColCount is a multiple of 32.
type MXFP4 struct {
	RowCount, ColCount int
	Blocks             []byte // [rows, cols/32, 16]
	Scales             []byte // [rows, cols/32]
}

// Dims returns outputs and inputs.
func (m MXFP4) Dims() (int, int) { return m.RowCount, m.ColCount }

// Rows decodes rows [from, from+n) into dst.
func (m MXFP4) Rows(dst []float32, from, n int) {
	groups := m.ColCount / groupValues
	scales := m.Scales[from*groups : (from+n)*groups]
	blocks := m.Blocks[from*groups*groupBytes:]
	for g, scale := range scales {
		table := &mxfp4[scale]
		block := (*[groupBytes]byte)(blocks[g*groupBytes:])
		out := (*[groupValues]float32)(dst[g*groupValues:])
		for i, b := range block {
			out[2*i] = table[b&15]
			out[2*i+1] = table[b>>4]
		}
	}
}

// pairs has the two bfloat16 of every byte at every scale, as they lie in a file;
// 256 kB, of which a checkpoint uses a few scales.
var pairs = sync.OnceValue(func() *[256][256]uint32 {
	var table [256][256]uint32
	for scale := range table {
		for b := range table[scale] {
			low, high := math.Float32bits(mxfp4[scale][b&15]), math.Float32bits(mxfp4[scale][b>>4])
			table[scale][b] = low>>16 | high&0xffff0000
		}
	}
	return &table
})

// putBF16 stores the whole matrix as bfloat16, little-endian.
func (m MXFP4) putBF16(dst []byte) {
	table := pairs()
	for g, scale := range m.Scales {
		at := &table[scale]
		block := (*[groupBytes]byte)(m.Blocks[g*groupBytes:])
		out := dst[g*2*groupValues:][:2*groupValues]
		for i := 0; i < groupBytes; i += 2 {
			binary.LittleEndian.PutUint64(out[4*i:], uint64(at[block[i]])|uint64(at[block[i+1]])<<32)
		}
	}
}

// firstOverflow returns the first group with a value that float32 and bfloat16
// can't hold, or −1. Only scales from 253 on can have any: 6·2^(252−127) is the
// largest value below 2^128.
func (m MXFP4) firstOverflow() int {
	const firstUnsafe = 253
	scales := m.Scales
	for at := 0; at < len(scales); {
		// Most scales are near 120: skip eight at a time while none is above 127.
		if at+8 <= len(scales) && binary.LittleEndian.Uint64(scales[at:])&0x8080808080808080 == 0 {
			at += 8
			continue
		}
		if scale := scales[at]; scale >= firstUnsafe {
			block := m.Blocks[at*groupBytes : (at+1)*groupBytes]
			if overflows(block, scale) {
				return at
			}
		}
		at++
	}
	return -1
}

func overflows(block []byte, scale byte) bool {
	table := &mxfp4[scale]
	for _, b := range block {
		if math.IsInf(float64(table[b&15]), 0) || math.IsInf(float64(table[b>>4]), 0) {
			return true
		}
	}
	return false
}

// PackedMXFP4 returns the bytes, for kernels that decode in registers.
func (m MXFP4) PackedMXFP4() (blocks, scales []byte) { return m.Blocks, m.Scales }
