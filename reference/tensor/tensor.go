// Package tensor holds named arrays as bytes with a dtype and a shape, the way
// that files hold them, and reads and writes the files: safetensors and .npz.
package tensor

import (
	"encoding/binary"
	"fmt"
	"math"

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

// Size returns the bytes of one element, or 0 for a type that is not known here.
func (d DType) Size() int {
	switch d {
	case F64, I64:
		return 8
	case F32, I32:
		return 4
	case F16, BF16:
		return 2
	case U8:
		return 1
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

// Int32s returns a tensor of integers. A value that int32 cannot hold is an error.
func (t Tensor) Int32s() ([]int32, error) {
	out := make([]int32, t.Elements())
	switch t.DType {
	case I32:
		for i := range out {
			out[i] = int32(binary.LittleEndian.Uint32(t.Data[4*i:]))
		}
	case I64:
		for i := range out {
			v := int64(binary.LittleEndian.Uint64(t.Data[8*i:]))
			if v != int64(int32(v)) {
				return nil, fmt.Errorf("element %d is %d, more than int32 can hold", i, v)
			}
			out[i] = int32(v)
		}
	default:
		return nil, fmt.Errorf("holds %s, not integers", t.DType)
	}
	return out, nil
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
func BFloat16(bits uint16) float32 { return math.Float32frombits(uint32(bits) << 16) }

// ToBFloat16 returns the bits of the bfloat16 nearest to v, ties to even. NaN
// stays NaN.
func ToBFloat16(v float32) uint16 {
	bits := math.Float32bits(v)
	if v != v {
		return uint16(bits>>16) | 0x40 // quiet, so that truncation cannot make it infinite
	}
	return uint16((bits + 0x7fff + bits>>16&1) >> 16)
}
