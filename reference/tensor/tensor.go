// Package tensor holds named arrays as bytes with a dtype and a shape, the way
// that files hold them, and reads and writes the files: safetensors and .npz.
package tensor

import (
	"encoding/binary"
	"fmt"
	"math"
	mathbits "math/bits"

	"github.com/x448/float16"
)

// DType is the storage type of a tensor, spelt as safetensors spells it.
type DType string

// Storage types that gpt-oss files use.
const (
	F64  DType = "F64"
	F32  DType = "F32"
	F16  DType = "F16"
	BF16 DType = "BF16"
	I64  DType = "I64"
	I32  DType = "I32"
	U8   DType = "U8"
)

// bits has the size of one element in bits, for every type of the safetensors
// format. Types that are not among the constants above are carried, never
// interpreted.
var bits = map[DType]int{
	F64: 64, I64: 64, "U64": 64, "C64": 64,
	F32: 32, I32: 32, "U32": 32,
	F16: 16, BF16: 16, "I16": 16, "U16": 16,
	U8: 8, "I8": 8, "BOOL": 8,
	"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
	"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}

// Size returns the bytes of one element, or 0 for a type that has no whole
// number of bytes or is not known.
func (d DType) Size() int {
	if n := bits[d]; n%8 == 0 {
		return n / 8
	}
	return 0
}

// Float reports whether the type holds reals.
func (d DType) Float() bool { return d == F64 || d == F32 || d == F16 || d == BF16 }

// Tensor is an array in C order, little-endian. Data may be mapped from a file
// and must not be written to.
type Tensor struct {
	DType DType
	Shape []int
	Data  []byte
}

// Elements returns the product of the shape.
func (t Tensor) Elements() int {
	n := 1
	for _, d := range t.Shape {
		n *= d
	}
	return n
}

// byteSize returns the bytes of an array, or an error if the type is not known,
// a dimension is negative or the product does not fit.
func byteSize(d DType, shape []int) (int, error) {
	width := bits[d]
	if width == 0 {
		return 0, fmt.Errorf("dtype %.20q is not known", d)
	}
	// In bits a product below 2^63 stands for less than 2^60 bytes: enough.
	total := uint64(width)
	for _, n := range shape {
		if n < 0 {
			return 0, fmt.Errorf("shape %v has a negative dimension", shape)
		}
		high, low := mathbits.Mul64(total, uint64(n))
		if high != 0 || low > math.MaxInt64 {
			// A zero further on would make the product zero; no real file has one.
			return 0, fmt.Errorf("shape %v is too large", shape)
		}
		total = low
	}
	if total%8 != 0 {
		return 0, fmt.Errorf("shape %v of %s is no whole number of bytes", shape, d)
	}
	return int(total / 8), nil
}

// Check reports a tensor whose data is not as long as its dtype and shape say.
func (t Tensor) Check() error { return t.CheckSize(len(t.Data)) }

// CheckSize is Check for data that is not in one piece.
func (t Tensor) CheckSize(size int) error {
	want, err := byteSize(t.DType, t.Shape)
	if err != nil {
		return err
	}
	if size != want {
		return fmt.Errorf("has %d bytes, but %s %v takes %d", size, t.DType, t.Shape, want)
	}
	return nil
}

// Float64s widens a tensor of reals. It is exact for every storage type.
func (t Tensor) Float64s() ([]float64, error) {
	out := make([]float64, t.Elements())
	switch t.DType {
	case F64:
		for i := range out {
			out[i] = math.Float64frombits(binary.LittleEndian.Uint64(t.Data[8*i:]))
		}
	case F32:
		for i := range out {
			out[i] = float64(math.Float32frombits(binary.LittleEndian.Uint32(t.Data[4*i:])))
		}
	case F16:
		for i := range out {
			out[i] = float64(float16.Frombits(binary.LittleEndian.Uint16(t.Data[2*i:])).Float32())
		}
	case BF16:
		for i := range out {
			out[i] = float64(BFloat16(binary.LittleEndian.Uint16(t.Data[2*i:])))
		}
	default:
		return nil, fmt.Errorf("holds %s, not reals", t.DType)
	}
	return out, nil
}

// Float32s converts a tensor of reals; only F64 can lose precision.
func (t Tensor) Float32s() ([]float32, error) {
	if t.DType == F32 {
		out := make([]float32, t.Elements())
		for i := range out {
			out[i] = math.Float32frombits(binary.LittleEndian.Uint32(t.Data[4*i:]))
		}
		return out, nil
	}
	wide, err := t.Float64s()
	if err != nil {
		return nil, err
	}
	out := make([]float32, len(wide))
	for i, v := range wide {
		out[i] = float32(v)
	}
	return out, nil
}

// Int32s returns a tensor of integers of any size, with or without a sign. A value
// that int32 cannot hold is an error.
func (t Tensor) Int32s() ([]int32, error) {
	integer, ok := integers[t.DType]
	if !ok {
		return nil, fmt.Errorf("holds %s, not integers (I32, I64, I16, I8, U64, U32, U16 or U8)", t.DType)
	}
	out := make([]int32, t.Elements())
	size := t.DType.Size()
	for i := range out {
		v := integer(t.Data[size*i:])
		if v != int64(int32(v)) {
			return nil, fmt.Errorf("element %d is %d, more than int32 can hold", i, v)
		}
		out[i] = int32(v)
	}
	return out, nil
}

// integers reads one element of every type of integers. What int64 cannot hold,
// int32 cannot either: the largest of them stands for it.
var integers = map[DType]func([]byte) int64{
	I64:   func(b []byte) int64 { return int64(binary.LittleEndian.Uint64(b)) },
	I32:   func(b []byte) int64 { return int64(int32(binary.LittleEndian.Uint32(b))) },
	"I16": func(b []byte) int64 { return int64(int16(binary.LittleEndian.Uint16(b))) },
	"I8":  func(b []byte) int64 { return int64(int8(b[0])) },
	"U64": func(b []byte) int64 { return int64(min(binary.LittleEndian.Uint64(b), math.MaxInt64)) },
	"U32": func(b []byte) int64 { return int64(binary.LittleEndian.Uint32(b)) },
	"U16": func(b []byte) int64 { return int64(binary.LittleEndian.Uint16(b)) },
	U8:    func(b []byte) int64 { return int64(b[0]) },
}

// FromFloat64s stores values as F64.
func FromFloat64s(shape []int, values []float64) Tensor {
	data := make([]byte, 8*len(values))
	for i, v := range values {
		binary.LittleEndian.PutUint64(data[8*i:], math.Float64bits(v))
	}
	return Tensor{DType: F64, Shape: shape, Data: data}
}

// FromFloat32s stores values as F32.
func FromFloat32s(shape []int, values []float32) Tensor {
	data := make([]byte, 4*len(values))
	for i, v := range values {
		binary.LittleEndian.PutUint32(data[4*i:], math.Float32bits(v))
	}
	return Tensor{DType: F32, Shape: shape, Data: data}
}

// FromInt32s stores values as I32.
func FromInt32s(shape []int, values []int32) Tensor {
	data := make([]byte, 4*len(values))
	for i, v := range values {
		binary.LittleEndian.PutUint32(data[4*i:], uint32(v))
	}
	return Tensor{DType: I32, Shape: shape, Data: data}
}

// FromBFloat16s stores float32 values as BF16, rounded to nearest even.
func FromBFloat16s(shape []int, values []float32) Tensor {
	data := make([]byte, 2*len(values))
	for i, v := range values {
		binary.LittleEndian.PutUint16(data[2*i:], ToBFloat16(v))
	}
	return Tensor{DType: BF16, Shape: shape, Data: data}
}

// FromFloat16s stores float32 values as F16, rounded to nearest even.
func FromFloat16s(shape []int, values []float32) Tensor {
	data := make([]byte, 2*len(values))
	for i, v := range values {
		binary.LittleEndian.PutUint16(data[2*i:], float16.Fromfloat32(v).Bits())
	}
	return Tensor{DType: F16, Shape: shape, Data: data}
}

// BFloat16 widens the bits of a bfloat16. It is exact.
func BFloat16(b uint16) float32 { return math.Float32frombits(uint32(b) << 16) }

// ToBFloat16 returns the bits of the bfloat16 nearest to v, ties to even. NaN
// stays NaN.
func ToBFloat16(v float32) uint16 {
	b := math.Float32bits(v)
	if v != v {
		return uint16(b>>16) | 0x40 // quiet, so that truncation cannot make it infinite
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}
