// Command asm writes the loops that measure the machine's limits: Go assembly for
// AVX2 and AVX-512, through avo. `go generate ./tools/bench` runs it. It shares
// nothing with the reference's kernels, which are measured against these limits.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// isa is an instruction set and the width of its registers in bytes.
type isa struct {
	name  string
	width int
	reg   func() VecVirtual
}

func main() {
	ConstraintExpr("amd64")
	for _, set := range []isa{
		{"AVX512", 64, func() VecVirtual { return ZMM() }},
		{"AVX2", 32, func() VecVirtual { return YMM() }},
	} {
		read(set, "", 0)
		read(set, "Ahead", 4096)
		multiplyAdd(set)
	}
	Generate()
}

// block is what one turn of the reading loop reads.
const block = 512

// read loads every byte once and does nothing with it. The hardware's own
// prefetchers stop at the end of every page of 4 KiB, so that on some processors it
// helps to ask for lines some bytes ahead of their use.
func read(s isa, suffix string, ahead int) {
	name := "read" + suffix + s.name
	TEXT(name, NOSPLIT, "func(p *byte, blocks int)")
	Pragma("noescape")
	Doc(name + " reads blocks of 512 bytes.")
	p := Load(Param("p"), GP64())
	blocks := Load(Param("blocks"), GP64())
	to := s.reg()
	Label("loop")
	for at := 0; at < block && ahead > 0; at += 64 {
		PREFETCHT0(Mem{Base: p, Disp: at + ahead})
	}
	for at := 0; at < block; at += s.width {
		VMOVUPS(Mem{Base: p, Disp: at}, to)
	}
	ADDQ(U32(block), p)
	DECQ(blocks)
	JNZ(LabelRef("loop"))
	VZEROUPPER()
	RET()
}

// sums is how many independent multiply-adds are under way: two units with a
// latency of four or five cycles want ten. AVX2 has 16 registers.
const sums = 12

// multiplyAdd multiplies and adds in registers alone.
func multiplyAdd(s isa) {
	TEXT("multiplyAdd"+s.name, NOSPLIT, "func(turns int, factors *float32)")
	Pragma("noescape")
	Doc("multiplyAdd" + s.name + " does 12 multiply-adds of whole registers per turn.")
	turns := Load(Param("turns"), GP64())
	factors := Load(Param("factors"), GP64())
	// Sums converge to addend / (1 - factor): no overflow, no subnormal number.
	factor, addend := s.reg(), s.reg()
	VBROADCASTSS(Mem{Base: factors}, factor)
	VBROADCASTSS(Mem{Base: factors, Disp: 4}, addend)
	var sum [sums]VecVirtual
	for i := range sum {
		sum[i] = s.reg()
		VBROADCASTSS(Mem{Base: factors, Disp: 4}, sum[i])
	}
	Label("loop")
	for i := range sum {
		VFMADD213PS(addend, factor, sum[i])
	}
	DECQ(turns)
	JNZ(LabelRef("loop"))
	VZEROUPPER()
	RET()
}
