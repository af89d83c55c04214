package checkpoint

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// Canonical encodings of values, the same whatever layout they came from.

// isBF16 reports whether every value is a bfloat16.
func isBF16(values []float32) bool {
	var low uint32
	for _, v := range values {
		low |= math.Float32bits(v)
	}
	return low<<16 == 0
}

// putBF16 stores values that are bfloat16, and reports whether all were, and
// whether all were finite.
func putBF16(dst []byte, values []float32) (exact, finite bool) {
	dst = dst[:2*len(values)]
	var low, largest uint32
	for len(values) >= 4 {
		a, b := math.Float32bits(values[0]), math.Float32bits(values[1])
		c, d := math.Float32bits(values[2]), math.Float32bits(values[3])
		low |= a | b | c | d
		largest = max(largest, a&^signBit, b&^signBit, c&^signBit, d&^signBit)
		binary.LittleEndian.PutUint64(dst, uint64(a>>16)|uint64(b&0xffff0000)|uint64(c&0xffff0000)<<16|uint64(d&0xffff0000)<<32)
		dst, values = dst[8:], values[4:]
	}
	for i, v := range values {
		b := math.Float32bits(v)
		low |= b
		largest = max(largest, b&^signBit)
		binary.LittleEndian.PutUint16(dst[2*i:], uint16(b>>16))
	}
	return low<<16 == 0, largest < infinityBits
}

// encodeMXFP4 encodes a group of 32 values canonically, or reports that MXFP4
// can't hold them. Canonical is, of several encodings of
// the same values the one whose largest code is 4 or 6, or that has scale 0;
// 32 zeros have scale 0. Signs of zeros are kept.
func encodeMXFP4(block *[groupBytes]byte, values *[groupValues]float32) (scale byte, ok bool) {
	var largest uint32 // of the magnitudes' bits, which are ordered like the magnitudes
	for _, v := range values {
		largest = max(largest, math.Float32bits(v)&^signBit)
	}
	scale, ok = canonicalScale(largest)
	if !ok {
		return 0, false
	}
	if scale >= 2 {
		return scale, encodeNormal(block, values, scale)
	}
	for i := range block {
		low, okLow := codeOf(math.Float32bits(values[2*i]), scale)
		high, okHigh := codeOf(math.Float32bits(values[2*i+1]), scale)
		if !okLow || !okHigh {
			return 0, false
		}
		block[i] = low | high<<4
	}
	return scale, true
}

// noCode marks what is no code in normalCodes.
const noCode = 0x80

// normalCodes maps the exponent and the first bit of the mantissa of a normal
// float32, counted from those of 2^-1 at the group's scale, to the code: 0.5
// first, then nothing at 0.75, then 1, 1.5, 2, 3, 4, 6.
var normalCodes = [16]byte{1, noCode, 2, 3, 4, 5, 6, 7, noCode, noCode, noCode, noCode, noCode, noCode, noCode, noCode}

// encodeNormal encodes a group at a scale where all magnitudes but zero are
// normal floats.
func encodeNormal(block *[groupBytes]byte, values *[groupValues]float32, scale byte) bool {
	base := 2 * (uint32(scale) - 1)
	var rest uint32 // all magnitudes' bits, of which no code has the lower 22
	var bad byte
	for i := range block {
		low, high := math.Float32bits(values[2*i]), math.Float32bits(values[2*i+1])
		m, n := low&^signBit, high&^signBit
		rest |= m | n
		c, d := normalCodes[min(m>>22-base, 15)], normalCodes[min(n>>22-base, 15)]
		if m == 0 {
			c = 0
		}
		if n == 0 {
			d = 0
		}
		bad |= c | d
		block[i] = c&7 | byte(low>>28)&8 | d&7<<4 | byte(high>>24)&0x80
	}
	return rest&0x3fffff == 0 && bad < noCode
}

const (
	signBit      = 1 << 31
	infinityBits = 0x7f800000 // and NaN is above
)

// canonicalScale returns the scale byte at which the largest magnitude of a
// group, given by its bits, has code 4 or 6.
func canonicalScale(largest uint32) (byte, bool) {
	if largest == 0 {
		return 0, true
	}
	exponent, _, ok := split12(largest)
	if !ok {
		return 0, false
	}
	// 4 = 1·2^2 and 6 = 1.5·2^2: the value is 2^exponent·(1 or 1.5).
	scale := exponent - 2 + scaleBias
	if scale > 252 { // 6·2^(253−127) overflows
		return 0, false
	}
	return byte(max(scale, 0)), true
}

// split12 takes a positive finite float32 apart as 2^exponent·1 (half false) or
// 2^exponent·1.5 (half true), if it is one.
func split12(b uint32) (exponent int, half, ok bool) {
	mantissa := b & 0x7fffff
	e := int(b >> 23)
	if e == 0xff {
		return 0, false, false
	}
	if e == 0 { // subnormal: value = mantissa·2^-149
		top := bits.Len32(mantissa) - 1
		rest := mantissa &^ (1 << top)
		if rest == 0 {
			return top - 149, false, true
		}
		return top - 149, true, top > 0 && rest == 1<<(top-1)
	}
	switch mantissa {
	case 0:
		return e - 127, false, true
	case 0x400000:
		return e - 127, true, true
	}
	return 0, false, false
}

// codeOf returns the code of a value at a scale, or false if there is none. It
// knows subnormal floats too.
func codeOf(b uint32, scale byte) (byte, bool) {
	sign := byte(b >> 31 << 3)
	b &^= signBit
	if b == 0 {
		return sign, true
	}
	exponent, half, ok := split12(b)
	// Codes 1 to 7 are 2^-1·1, 2^0·1, 2^0·1.5, 2^1·1, 2^1·1.5, 2^2·1, 2^2·1.5.
	power := exponent - (int(scale) - scaleBias)
	if !ok || power < -1 || power > 2 || power == -1 && half {
		return 0, false
	}
	code := byte(2*power + 2)
	if power == -1 {
		code = 1
	}
	if half {
		code++
	}
	return sign | code, true
}

// canonicalMXFP4 does to an encoded group what decoding and [encodeMXFP4] would.
// It reports groups that overflow.
func canonicalMXFP4(block *[groupBytes]byte, scale byte) (byte, bool) {
	low := binary.LittleEndian.Uint64(block[:8])
	high := binary.LittleEndian.Uint64(block[8:])
	// A code of 4 or 6 has the two bits 2 and 1 of its nibble set.
	if both := (low & (low << 1)) | (high & (high << 1)); both&0x4444444444444444 != 0 && scale <= 252 {
		return scale, true
	}
	var values [groupValues]float32
	for i, b := range block {
		values[2*i], values[2*i+1] = mxfp4[scale][b&15], mxfp4[scale][b>>4]
	}
	return encodeMXFP4(block, &values)
}

// quantizeMXFP4 rounds 32 finite values to MXFP4 as the OCP Microscaling
// Formats specification (1.0, section 6.3) has it: the scale is the power of
// two of the largest magnitude, less 2 (the power of the largest code, 6 =
// 1.5·2^2); values go to the nearest code, ties to even, and to 6 when they are
// larger.
func quantizeMXFP4(block *[groupBytes]byte, values *[groupValues]float32) byte {
	var largest float64
	for _, v := range values {
		largest = max(largest, math.Abs(float64(v)))
	}
	scale := 0
	if largest > 0 {
		scale = min(max(math.Ilogb(largest)-2+scaleBias, 0), 252) // 6·2^(253−127) overflows
	}
	for i := range block {
		block[i] = nearestCode(values[2*i], scale) | nearestCode(values[2*i+1], scale)<<4
	}
	// The encoding may not be canonical at the low end; it decodes to the same.
	canonical, _ := canonicalMXFP4(block, byte(scale))
	return canonical
}

// nearestCode rounds a value at a scale to a code, ties to the even one.
func nearestCode(v float32, scale int) byte {
	sign := byte(math.Float32bits(v) >> 31 << 3)
	x := math.Abs(math.Ldexp(float64(v), scaleBias-scale))
	// Midpoints between neighbours; at a tie the even code wins.
	for code, middle := range [...]float64{0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5} {
		if x < middle || x == middle && code%2 == 0 {
			return sign | byte(code)
		}
	}
	return sign | 7
}
