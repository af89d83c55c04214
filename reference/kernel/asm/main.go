// Command asm writes the vector kernels of package kernel: Go assembly for AVX2
// and AVX-512, through avo. `go generate ./reference/kernel` runs it.
//
// One description serves both instruction sets. A sum has 16 running float32
// lanes (8 in float64) whatever the registers' width: one zmm register, or two
// ymm registers. Both sets therefore round alike, to the last bit.
package main

import (
	"fmt"
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// isa is an instruction set: how many registers hold the lanes of one sum.
type isa struct {
	name  string
	parts int // registers per sum
	width int // bytes per register
	reg   func() VecVirtual
}

var (
	avx512 = isa{"AVX512", 1, 64, func() VecVirtual { return ZMM() }}
	avx2   = isa{"AVX2", 2, 32, func() VecVirtual { return YMM() }}
)

func main() {
	ConstraintExpr("amd64")
	tables()
	for tokens := 1; tokens <= 8; tokens++ {
		rows := 4
		if tokens > 4 {
			rows = 3 // 24 sums and six decoded registers leave two
		}
		streamMXFP4(avx512, rows, tokens)
		streamBF16(avx512, rows, tokens)
	}
	for tokens := 1; tokens <= 4; tokens++ {
		block32(avx512, 6, tokens)
		block64(avx512, 4, tokens)
	}
	for tokens, rows := range []int{4, 2} {
		streamMXFP4(avx2, rows, tokens+1)
		streamBF16(avx2, rows, tokens+1)
	}
	for tokens := 1; tokens <= 2; tokens++ {
		block32(avx2, 3, tokens)
		block64(avx2, 2, tokens)
	}
	for _, set := range []isa{avx512, avx2} {
		decodeMXFP4(set)
		decodeBF16(set)
		reduce(set, 32)
		reduce(set, 64)
		for _, bits := range []int{32, 64} {
			innerProducts(set, bits)
			weightedSum(set, bits)
		}
		exponential(set)
	}
	decode64(avx512, "MXFP4", 16, avx512.mxfp4)
	decode64(avx512, "BF16", 64, avx512.bf16)
	pause()
	Generate()
}

// pause emits what a loop that waits should do in every turn: it leaves the core to
// the other thread that it may have.
func pause() {
	TEXT("pause", NOSPLIT, "func()")
	Doc("pause passes some tens of cycles.")
	PAUSE()
	RET()
}

// Tables. A magnitude is held doubled and a scale halved, so that scale 255
// (2^128, which float32 lacks) can stand over a group of zeros.
var magnitudes, scaleTable, signBit, upperHalf, interleaveLow, interleaveHigh Mem

// constants are what exponential needs, one float32 or int32 each.
var constants = map[string]Mem{}

func tables() {
	values := []float32{0, 1, 2, 3, 4, 6, 8, 12}
	magnitudes = GLOBL("magnitudes", RODATA|NOPTR)
	for i, v := range values {
		DATA(4*i, U32(math.Float32bits(v)))
	}
	scaleTable = GLOBL("scales", RODATA|NOPTR)
	for s := range 256 { // 2^(s-128): 0 and 1 are subnormal
		bits := uint32(s-1) << 23
		if s < 2 {
			bits = 1 << (21 + s)
		}
		DATA(4*s, U32(bits))
	}
	signBit = GLOBL("signBit", RODATA|NOPTR)
	DATA(0, U32(1<<31))
	upperHalf = GLOBL("upperHalf", RODATA|NOPTR)
	DATA(0, U32(0xffff0000))
	for _, c := range exponentialConstants {
		constants[c.name] = GLOBL(c.name, RODATA|NOPTR)
		DATA(0, U32(math.Float32bits(c.value)))
	}
	interleaveLow = GLOBL("interleaveLow", RODATA|NOPTR)
	for i := range 16 { // 0, 16, 1, 17, …
		DATA(4*i, U32(uint32(i/2+i%2*16)))
	}
	interleaveHigh = GLOBL("interleaveHigh", RODATA|NOPTR)
	for i := range 16 {
		DATA(4*i, U32(uint32(8+i/2+i%2*16)))
	}
}

// sum is a running sum: 16 float32 or 8 float64 lanes.
type sum []VecVirtual

func (s isa) sum() sum {
	out := make(sum, s.parts)
	for p := range out {
		out[p] = s.reg()
	}
	return out
}

// zero clears a sum. EVEX's VXORPS needs AVX512DQ, VPXORD does not.
func (s isa) zero(to sum) {
	for _, r := range to {
		if s.parts == 1 {
			VPXORD(r, r, r)
		} else {
			VXORPS(r, r, r)
		}
	}
}

// rows addresses up to eight rows of a matrix that lie stride bytes apart.
type rows struct {
	base, base4     Register
	stride, stride3 Register
}

func addressRows(base, stride Register, count int) rows {
	r := rows{base: base, stride: stride}
	if count > 3 {
		r.stride3 = GP64()
		LEAQ(Mem{Base: stride, Index: stride, Scale: 2}, r.stride3)
	}
	if count > 4 {
		r.base4 = GP64()
		LEAQ(Mem{Base: base, Index: stride, Scale: 4}, r.base4)
	}
	return r
}

func (r rows) at(row, offset int) Mem {
	base := r.base
	if row >= 4 {
		base, row = r.base4, row-4
	}
	m := Mem{Base: base, Disp: offset}
	switch row {
	case 1, 2:
		m.Index, m.Scale = r.stride, uint8(row)
	case 3:
		m.Index, m.Scale = r.stride3, 1
	}
	return m
}

func (r rows) advance(bytes Op) {
	ADDQ(bytes, r.base)
	if r.base4 != nil {
		ADDQ(bytes, r.base4)
	}
}

// decoder emits the decoding of one group of a row: half 0 has the even columns,
// half 1 the odd ones. Registers that next is not given (nil) come in another call.
type decoder func(w, scale Mem, next func(half int, weights sum))

// stream emits a kernel that multiplies `count` rows of packed weights with
// `tokens` rows of x, decoding in registers:
//
//	func(groups int, x *float32, xStride int, w *byte, wStride int, scales *byte, scaleStride int, y *float32, yStride, rowStride int)
//
// x is in split order. Rows of w and their scales lie wStride and scaleStride
// apart; a group is 32 columns. y[t·yStride + r·rowStride] gets the sums. Strides
// are in bytes.
func stream(s isa, format string, count, tokens, groupBytes int, prepare func() decoder) {
	TEXT(fmt.Sprintf("stream%s%sx%d", format, s.name, tokens), NOSPLIT,
		"func(groups int, x *float32, xStride int, w *byte, wStride int, scales *byte, scaleStride int, y *float32, yStride, rowStride int)")
	Doc(fmt.Sprintf("stream%s%sx%d multiplies %d rows of packed weights with %d tokens.", format, s.name, tokens, count, tokens))
	groups := Load(Param("groups"), GP64())
	x := addressRows(Load(Param("x"), GP64()), Load(Param("xStride"), GP64()), tokens)
	w := addressRows(Load(Param("w"), GP64()), Load(Param("wStride"), GP64()), count)
	scales := addressRows(Load(Param("scales"), GP64()), Load(Param("scaleStride"), GP64()), count)
	emit := prepare()
	acc := make([][]sum, count)
	for r := range acc {
		for range tokens {
			a := s.sum()
			s.zero(a)
			acc[r] = append(acc[r], a)
		}
	}

	// With AVX-512 all rows are decoded before the tokens pass by; the 16 registers
	// of AVX2 have room for one half of a row at a time.
	Label("group")
	decoded := make([][2]VecVirtual, count)
	for r := range count {
		emit(w.at(r, 0), scales.at(r, 0), func(half int, weights sum) {
			if s.parts == 1 {
				decoded[r][half] = weights[0]
				return
			}
			for p, v := range weights {
				for t := 0; v != nil && t < tokens; t++ {
					VFMADD231PS(x.at(t, 64*half+32*p), v, acc[r][t][p])
				}
			}
		})
	}
	for half := 0; s.parts == 1 && half < 2; half++ {
		for t := range tokens {
			input := s.reg()
			VMOVUPS(x.at(t, 64*half), input)
			for r := range count {
				VFMADD231PS(input, decoded[r][half], acc[r][t][0])
			}
		}
	}
	x.advance(I32(128))
	w.advance(I32(groupBytes))
	scales.advance(I32(1))
	DECQ(groups)
	JNZ(LabelRef("group"))

	y := addressRows(Load(Param("y"), GP64()), Load(Param("yStride"), GP64()), tokens)
	rowStride := Load(Param("rowStride"), GP64())
	for r := range count {
		if r > 0 {
			y.advance(rowStride)
		}
		for t := range tokens {
			VMOVSS(s.total32(acc[r][t]), y.at(t, 0))
		}
	}
	VZEROUPPER()
	RET()
}

// total32 adds up 16 lanes: halves onto each other until one is left.
func (s isa) total32(a sum) Register {
	half, upper := a[0].AsY(), YMM()
	if s.parts == 1 {
		VEXTRACTF64X4(U8(1), a[0], upper)
		VADDPS(upper, half, half)
	} else {
		VADDPS(a[1], half, half)
	}
	x, rest := a[0].AsX(), XMM()
	if s.parts == 1 { // registers from 16 on have EVEX instructions only
		VEXTRACTF32X4(U8(1), half, rest)
	} else {
		VEXTRACTF128(U8(1), half, rest)
	}
	VADDPS(rest, x, x)
	VMOVHLPS(x, x, rest)
	VADDPS(rest, x, x)
	VMOVSHDUP(x, rest)
	VADDSS(rest, x, x)
	return x
}

// total64 adds up 8 lanes as kernel.Lanes does.
func (s isa) total64(a sum) Register {
	half, upper := a[0].AsY(), YMM()
	if s.parts == 1 {
		VEXTRACTF64X4(U8(1), a[0], upper)
		VADDPD(upper, half, half)
	} else {
		VADDPD(a[1], half, half)
	}
	x, rest := a[0].AsX(), XMM()
	VEXTRACTF128(U8(1), half, rest) // lanes 2 and 3
	VHADDPD(x, x, x)
	VHADDPD(rest, rest, rest)
	VADDSD(rest, x, x)
	return x
}

// mxfp4 prepares the decoding of MXFP4: a table of values is looked up by the codes,
// so that each weight comes out exact. A zmm register holds the sixteen values of a
// code, and package kernel has a table for every scale: to multiply one would cost a
// seventh of the time. A ymm register holds the eight magnitudes, which are
// multiplied by the scale; bit 3 of a code is the sign.
func (s isa) mxfp4() decoder {
	tableAt := GP64()
	if s.parts == 1 {
		LEAQ(NewDataAddr(Symbol{Name: "·scaledCodes"}, 0), tableAt)
	} else {
		LEAQ(scaleTable, tableAt)
	}
	values, sign := VecVirtual(nil), VecVirtual(nil)
	if s.parts == 2 {
		values, sign = s.reg(), s.reg()
		VMOVUPS(magnitudes, values)
		VBROADCASTSS(signBit, sign)
	}
	return func(w, scale Mem, next func(half int, weights sum)) {
		index, scaled := GP32(), s.reg()
		MOVBLZX(scale, index)
		if s.parts == 1 {
			SHLL(U8(6), index) // a table has 64 bytes
			VMOVUPS(Mem{Base: tableAt, Index: index.As64(), Scale: 1}, scaled)
		} else {
			VBROADCASTSS(Mem{Base: tableAt, Index: index.As64(), Scale: 4}, scaled)
			VMULPS(values, scaled, scaled)
		}
		for p := range s.parts {
			bytes := s.reg()
			VPMOVZXBD(w.Offset(8*p), bytes)
			for half := range 2 {
				if half == 1 {
					VPSRLD(U8(4), bytes, bytes)
				}
				value, weights := s.reg(), make(sum, s.parts)
				VPERMPS(scaled, bytes, value)
				if s.parts == 2 {
					negative := s.reg()
					VPSLLD(U8(28), bytes, negative)
					VPAND(sign, negative, negative)
					VPOR(negative, value, value)
				}
				weights[p] = value
				next(half, weights)
			}
		}
	}
}

// bf16 prepares the decoding of bfloat16, the upper half of a float32.
func (s isa) bf16() decoder {
	mask := s.reg()
	if s.parts == 1 {
		VPBROADCASTD(upperHalf, mask)
	} else {
		VBROADCASTSS(upperHalf, mask)
	}
	return func(w, _ Mem, next func(half int, weights sum)) {
		for p := range s.parts {
			odd, even := s.reg(), s.reg()
			VMOVUPS(w.Offset(s.width*p), odd)
			VPSLLD(U8(16), odd, even)
			if s.parts == 1 {
				VPANDD(mask, odd, odd)
			} else {
				VPAND(mask, odd, odd)
			}
			for half, value := range []VecVirtual{even, odd} {
				weights := make(sum, s.parts)
				weights[p] = value
				next(half, weights)
			}
		}
	}
}

func streamMXFP4(s isa, count, tokens int) { stream(s, "MXFP4", count, tokens, 16, s.mxfp4) }

func streamBF16(s isa, count, tokens int) { stream(s, "BF16", count, tokens, 64, s.bf16) }

// decode emits a kernel that decodes groups of 32 columns to float32, in split
// order.
func decode(s isa, format string, groupBytes int, prepare func() decoder) {
	TEXT("decode"+format+s.name, NOSPLIT, "func(groups int, w, scales *byte, dst *float32)")
	Doc("decode" + format + s.name + " decodes groups of 32 weights to float32 in split order.")
	groups := Load(Param("groups"), GP64())
	w, scales, dst := Load(Param("w"), GP64()), Load(Param("scales"), GP64()), Load(Param("dst"), GP64())
	emit := prepare()
	Label("group")
	emit(Mem{Base: w}, Mem{Base: scales}, func(half int, weights sum) {
		for p, value := range weights {
			if value != nil {
				VMOVUPS(value, Mem{Base: dst, Disp: 64*half + s.width*p})
			}
		}
	})
	ADDQ(I32(groupBytes), w)
	INCQ(scales)
	ADDQ(I32(128), dst)
	DECQ(groups)
	JNZ(LabelRef("group"))
	VZEROUPPER()
	RET()
}

func decodeMXFP4(s isa) { decode(s, "MXFP4", 16, s.mxfp4) }

func decodeBF16(s isa) { decode(s, "BF16", 64, s.bf16) }

// decode64 emits a kernel that decodes groups to float64, in their own order.
func decode64(s isa, format string, groupBytes int, prepare func() decoder) {
	TEXT("decode64"+format+s.name, NOSPLIT, "func(groups int, w, scales *byte, dst *float64)")
	Doc("decode64" + format + s.name + " decodes groups of 32 weights to float64.")
	groups := Load(Param("groups"), GP64())
	w, scales, dst := Load(Param("w"), GP64()), Load(Param("scales"), GP64()), Load(Param("dst"), GP64())
	emit := prepare()
	low, high := ZMM(), ZMM()
	VMOVUPS(interleaveLow, low)
	VMOVUPS(interleaveHigh, high)
	Label("group")
	var even VecVirtual
	emit(Mem{Base: w}, Mem{Base: scales}, func(half int, weights sum) {
		if half == 0 {
			even = weights[0]
			return
		}
		odd := weights[0]
		for i, order := range []VecVirtual{low, high} {
			natural, upper, wide := ZMM(), YMM(), ZMM()
			VMOVAPS(order, natural)
			VPERMI2PS(odd, even, natural)
			VCVTPS2PD(natural.AsY(), wide)
			VMOVUPD(wide, Mem{Base: dst, Disp: 128 * i})
			VEXTRACTF64X4(U8(1), natural, upper)
			VCVTPS2PD(upper, wide)
			VMOVUPD(wide, Mem{Base: dst, Disp: 128*i + 64})
		}
	})
	ADDQ(I32(groupBytes), w)
	INCQ(scales)
	ADDQ(I32(256), dst)
	DECQ(groups)
	JNZ(LabelRef("group"))
	VZEROUPPER()
	RET()
}

// block emits a kernel that adds the products of `count` rows of a decoded tile
// with `tokens` rows of x to running sums, 32 columns at a time:
//
//	func(groups int, x *F, xStride int, w *F, wStride int, acc *F)
//
// acc holds the lanes of [rows, tokens] sums. Strides are in bytes.
func block(s isa, count, tokens, bits int) {
	const signature = "func(groups int, x *float%[1]d, xStride int, w *float%[1]d, wStride int, acc *float%[1]d)"
	name := fmt.Sprintf("block%d%sx%d", bits, s.name, tokens)
	TEXT(name, NOSPLIT, fmt.Sprintf(signature, bits))
	Doc(fmt.Sprintf("%s multiplies %d rows of a tile with %d tokens.", name, count, tokens))
	groups := Load(Param("groups"), GP64())
	x := addressRows(Load(Param("x"), GP64()), Load(Param("xStride"), GP64()), tokens)
	w := addressRows(Load(Param("w"), GP64()), Load(Param("wStride"), GP64()), count)
	sums := Load(Param("acc"), GP64())
	acc := make([][]sum, count)
	each := func(visit func(register VecVirtual, at Mem)) {
		for r := range acc {
			for t := range acc[r] {
				for p, register := range acc[r][t] {
					visit(register, Mem{Base: sums, Disp: 64*(r*tokens+t) + s.width*p})
				}
			}
		}
	}
	for r := range acc {
		for range tokens {
			acc[r] = append(acc[r], s.sum())
		}
	}
	each(func(register VecVirtual, at Mem) { VMOVUPS(at, register) })

	Label("group")
	groupBytes := 32 * bits / 8
	for offset := 0; offset < groupBytes; offset += 64 {
		for p := range s.parts {
			at := offset + s.width*p
			inputs := make([]VecVirtual, tokens)
			for t := range inputs {
				inputs[t] = s.reg()
				VMOVUPS(x.at(t, at), inputs[t])
			}
			for r := range count {
				weights := s.reg()
				VMOVUPS(w.at(r, at), weights)
				for t := range tokens {
					s.multiplyAdd(bits, inputs[t], weights, acc[r][t][p])
				}
			}
		}
	}
	x.advance(I32(groupBytes))
	w.advance(I32(groupBytes))
	DECQ(groups)
	JNZ(LabelRef("group"))
	each(func(register VecVirtual, at Mem) { VMOVUPS(register, at) })
	VZEROUPPER()
	RET()
}

func block32(s isa, count, tokens int) { block(s, count, tokens, 32) }

func block64(s isa, count, tokens int) { block(s, count, tokens, 64) }

// reduce emits a kernel that adds up the lanes of n sums.
func reduce(s isa, bits int) {
	TEXT(fmt.Sprintf("reduce%d%s", bits, s.name), NOSPLIT, fmt.Sprintf("func(n int, acc, y *float%d)", bits))
	Doc(fmt.Sprintf("reduce%d%s adds up the lanes of n sums.", bits, s.name))
	n, acc, y := Load(Param("n"), GP64()), Load(Param("acc"), GP64()), Load(Param("y"), GP64())
	Label("sum")
	lanes := s.sum()
	for p, register := range lanes {
		VMOVUPS(Mem{Base: acc, Disp: s.width * p}, register)
	}
	if bits == 32 {
		VMOVSS(s.total32(lanes), Mem{Base: y})
	} else {
		VMOVSD(s.total64(lanes), Mem{Base: y})
	}
	ADDQ(I32(64), acc)
	ADDQ(I32(bits/8), y)
	DECQ(n)
	JNZ(LabelRef("sum"))
	VZEROUPPER()
	RET()
}

// multiplyAdd adds a product to a running sum: fused in float32; in float64 not,
// so that every machine, and kernel.Lanes, has the same results.
func (s isa) multiplyAdd(bits int, x Op, y, sum VecVirtual) {
	if bits == 32 {
		VFMADD231PS(x, y, sum)
		return
	}
	product := s.reg()
	VMULPD(x, y, product)
	VADDPD(product, sum, sum)
}

// innerProducts emits a kernel that multiplies a vector with n rows that lie
// stride bytes apart:
//
//	func(n, chunks int, x, rows *F, stride int, dst *F)
//
// A chunk is 64 bytes of a row.
func innerProducts(s isa, bits int) {
	name := fmt.Sprintf("innerProducts%d%s", bits, s.name)
	TEXT(name, NOSPLIT, fmt.Sprintf("func(n, chunks int, x, rows *float%[1]d, stride int, dst *float%[1]d)", bits))
	Doc(name + " multiplies a vector with n rows.")
	const together = 4
	n, chunks, x := Load(Param("n"), GP64()), Load(Param("chunks"), GP64()), Load(Param("x"), GP64())
	first, stride, dst := Load(Param("rows"), GP64()), Load(Param("stride"), GP64()), Load(Param("dst"), GP64())
	row := addressRows(GP64(), stride, together)
	input, left := GP64(), GP64()
	size := bits / 8
	for _, count := range []int{together, 1} { // four rows at a time, then one
		label := fmt.Sprintf("rows%d", count)
		Label(label)
		CMPQ(n, U32(count))
		JLT(LabelRef(fmt.Sprintf("below%d", count)))
		MOVQ(first, row.base)
		MOVQ(x, input)
		MOVQ(chunks, left)
		acc := make([]sum, count)
		for r := range acc {
			acc[r] = s.sum()
			s.zero(acc[r])
		}
		Label(fmt.Sprintf("chunk%d", count))
		for p := range s.parts {
			value := s.reg()
			VMOVUPS(Mem{Base: input, Disp: s.width * p}, value)
			for r := range acc {
				s.multiplyAdd(bits, row.at(r, s.width*p), value, acc[r][p])
			}
		}
		ADDQ(I32(64), input)
		row.advance(I32(64))
		DECQ(left)
		JNZ(LabelRef(fmt.Sprintf("chunk%d", count)))
		switch {
		case count == together:
			VMOVUPS(s.totals(bits, [4]sum(acc)), Mem{Base: dst})
		case bits == 32:
			VMOVSS(s.totals(bits, [4]sum{acc[0], acc[0], acc[0], acc[0]}).AsX(), Mem{Base: dst})
		default:
			VMOVSD(s.totals(bits, [4]sum{acc[0], acc[0], acc[0], acc[0]}).AsX(), Mem{Base: dst})
		}
		LEAQ(Mem{Base: first, Index: stride, Scale: uint8(count)}, first)
		ADDQ(I32(count*size), dst)
		SUBQ(I32(count), n)
		JMP(LabelRef(label))
		Label(fmt.Sprintf("below%d", count))
	}
	VZEROUPPER()
	RET()
}

// totals adds up the lanes of four sums each: four float32 in an xmm register or
// four float64, as kernel.Lanes adds them, in a ymm register.
func (s isa) totals(bits int, sums [4]sum) VecVirtual {
	var halves [4]VecVirtual // lanes i and i + half, added
	for i, a := range sums {
		halves[i] = YMM()
		low, high := a[0].AsY(), Register(nil)
		if s.parts == 1 {
			upper := YMM()
			VEXTRACTF64X4(U8(1), a[0], upper)
			high = upper
		} else {
			high = a[1]
		}
		if bits == 32 {
			VADDPS(high, low, halves[i])
		} else {
			VADDPD(high, low, halves[i])
		}
	}
	a, b, c, d := halves[0], halves[1], halves[2], halves[3]
	if bits == 32 {
		// Neighbours twice, then the two halves.
		VHADDPS(b, a, a)
		VHADDPS(d, c, c)
		VHADDPS(c, a, a)
		upper := XMM()
		VEXTRACTF128(U8(1), a, upper)
		VADDPS(a.AsX(), upper, upper)
		return upper
	}
	VHADDPD(b, a, a) // a0+a1, b0+b1, a2+a3, b2+b3
	VHADDPD(d, c, c)
	low, high := YMM(), YMM()
	VPERM2F128(U8(0x20), c, a, low)
	VPERM2F128(U8(0x31), c, a, high)
	VADDPD(high, low, low)
	return low
}

// weightedSum emits a kernel that adds up n rows, stride bytes apart, times their
// weights, blocks of columns at a time:
//
//	func(n, blocks int, weights, rows *F, stride int, dst *F)
//
// A block is 128 bytes of a row with AVX-512, 32 with AVX2. Every column is
// summed as kernel.Lanes would sum it (but fused in float32): row i goes to
// running sum i%8, and those that remain after the last eight join the total.
func weightedSum(s isa, bits int) {
	name := fmt.Sprintf("weightedSum%d%s", bits, s.name)
	TEXT(name, NOSPLIT, fmt.Sprintf("func(n, blocks int, weights, rows *float%[1]d, stride int, dst *float%[1]d)", bits))
	Doc(name + " adds up n rows times their weights.")
	const lanes = 8
	n, blocks, weights := Load(Param("n"), GP64()), Load(Param("blocks"), GP64()), Load(Param("weights"), GP64())
	rows, stride, dst := Load(Param("rows"), GP64()), Load(Param("stride"), GP64()), Load(Param("dst"), GP64())
	columns := 1
	if s.parts == 1 {
		columns = 2
	}
	weight, row, left := GP64(), GP64(), GP64()
	var acc [lanes]sum
	for i := range acc {
		for range columns {
			acc[i] = append(acc[i], s.reg())
		}
	}
	factor := s.reg()
	step := func(lane int, to sum) {
		if bits == 32 {
			VBROADCASTSS(Mem{Base: weight, Disp: 4 * lane}, factor)
		} else {
			VBROADCASTSD(Mem{Base: weight, Disp: 8 * lane}, factor)
		}
		for p, register := range to {
			s.multiplyAdd(bits, Mem{Base: row, Disp: s.width * p}, factor, register)
		}
		ADDQ(stride, row)
	}
	add := VADDPD
	if bits == 32 {
		add = VADDPS
	}

	Label("block")
	MOVQ(weights, weight)
	MOVQ(rows, row)
	MOVQ(n, left)
	for _, a := range acc {
		s.zero(a)
	}
	Label("eight")
	SUBQ(I32(lanes), left)
	JLT(LabelRef("total"))
	for lane, to := range acc {
		step(lane, to)
	}
	ADDQ(I32(lanes*bits/8), weight)
	JMP(LabelRef("eight"))
	Label("total")
	for p := range columns { // ((0 + 4) + (1 + 5)) + ((2 + 6) + (3 + 7))
		for i := range 4 {
			add(acc[i+4][p], acc[i][p], acc[i][p])
		}
		add(acc[1][p], acc[0][p], acc[0][p])
		add(acc[3][p], acc[2][p], acc[2][p])
		add(acc[2][p], acc[0][p], acc[0][p])
	}
	ADDQ(I32(lanes), left)
	JZ(LabelRef("store"))
	Label("one")
	step(0, acc[0])
	ADDQ(I32(bits/8), weight)
	DECQ(left)
	JNZ(LabelRef("one"))
	Label("store")
	for p, register := range acc[0] {
		VMOVUPS(register, Mem{Base: dst, Disp: s.width * p})
	}
	ADDQ(I32(s.width*columns), rows)
	ADDQ(I32(s.width*columns), dst)
	DECQ(blocks)
	JNZ(LabelRef("block"))
	VZEROUPPER()
	RET()
}

// exponentialConstants are the numbers of exponential.
var exponentialConstants = []struct {
	name  string
	value float32
}{
	// Below -104 e^x is less than half of the smallest float32 (2^-150 = e^-103.97),
	// above 89 more than the largest (e^88.72).
	{"expLowest", -104}, {"expHighest", 89},
	{"expLog2e", math.Log2E},
	{"expRound", 3 << 22}, // adding 1.5·2^23 rounds to a whole number and leaves it in the low bits
	// -ln 2 in two parts; the first has 10 bits, so that its products with whole
	// numbers up to 150 are exact.
	{"expLn2High", -355.0 / 512}, {"expLn2Low", 355.0/512 - math.Ln2},
	{"expTerm2", 1. / 2}, {"expTerm3", 1. / 6}, {"expTerm4", 1. / 24}, // 1/n!
	{"expTerm5", 1. / 120}, {"expTerm6", 1. / 720}, {"expTerm7", 1. / 5040},
	{"expOne", 1},
}

// exponential emits a kernel that replaces float32 values by their exponentials,
// 16 at a time:
//
//	func(chunks int, x *float32)
//
// e^x = 2^k·e^r with k = round(x/ln 2) and |r| ≤ ln 2/2, and e^r by its Taylor
// series up to r^7: the rest, r^8/8!, is below 6e-9. 2^k goes on in two halves,
// so that subnormal results are rounded once and overflow gives an infinity.
func exponential(s isa) {
	name := "exp32" + s.name
	TEXT(name, NOSPLIT, "func(chunks int, x *float32)")
	Doc(name + " replaces 16 values per chunk by their exponentials.")
	chunks, at := Load(Param("chunks"), GP64()), Load(Param("x"), GP64())
	constant := map[string]VecVirtual{}
	broadcast := func(name string) Op {
		if s.parts == 2 { // too few registers
			r := YMM()
			VBROADCASTSS(constants[name], r)
			return r
		}
		return constant[name]
	}
	if s.parts == 1 {
		for _, c := range exponentialConstants {
			constant[c.name] = ZMM()
			VBROADCASTSS(constants[c.name], constant[c.name])
		}
	}
	Label("chunk")
	for p := range s.parts {
		x, k, r, e := s.reg(), s.reg(), s.reg(), s.reg()
		m := Mem{Base: at, Disp: s.width * p}
		VMOVUPS(m, x)
		// Of a NaN and a limit both instructions return the first operand here.
		VMAXPS(x, broadcast("expLowest"), x)
		VMINPS(x, broadcast("expHighest"), x)
		VMOVUPS(x, k)
		VMOVUPS(broadcast("expRound"), r)
		VFMADD132PS(broadcast("expLog2e"), r, k)
		VSUBPS(r, k, r) // k as a number
		high, low := s.reg(), broadcast("expLn2Low")
		VFMADD231PS(broadcast("expLn2High"), r, x)
		VMOVUPS(x, high)
		VFMADD231PS(low, r, x) // x - k·ln 2
		VSUBPS(x, high, high)  // and what rounding has taken from that
		VFMADD231PS(low, r, high)
		VMOVUPS(broadcast("expTerm7"), e)
		for _, term := range []string{"expTerm6", "expTerm5", "expTerm4", "expTerm3", "expTerm2"} {
			VFMADD213PS(broadcast(term), x, e) // e·x + term
		}
		VMULPS(x, x, r)
		VFMADD213PS(high, r, e)
		VADDPS(x, e, e) // e·x² + x
		VADDPS(broadcast("expOne"), e, e)
		VPSUBD(broadcast("expRound"), k, k) // k as an integer
		half := s.reg()
		VPSRAD(U8(1), k, half)
		VPSUBD(half, k, k)
		for _, half := range []VecVirtual{half, k} {
			VPSLLD(U8(23), half, half)
			VPADDD(broadcast("expOne"), half, half) // 2^half: its exponent on top of one's
			VMULPS(half, e, e)
		}
		VMOVUPS(e, m)
	}
	ADDQ(I32(64), at)
	DECQ(chunks)
	JNZ(LabelRef("chunk"))
	VZEROUPPER()
	RET()
}
