package checkpoint

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// firstNonFinite returns the first element of dense storage that is NaN or
// infinite, or −1. A float is neither unless all bits of its exponent are set,
// and then adding one to the exponent's lowest bit carries into the sign's
// place: eight bytes are tested at once.
func firstNonFinite(d tensor.DType, data []byte) int {
	var exponent, one, sign uint64
	switch d {
	case tensor.BF16:
		exponent, one, sign = 0x7f807f807f807f80, 0x0080008000800080, 0x8000800080008000
	case tensor.F16:
		exponent, one, sign = 0x7c007c007c007c00, 0x0400040004000400, 0x8000800080008000
	case tensor.F32:
		exponent, one, sign = 0x7f8000007f800000, 0x0080000000800000, 0x8000000080000000
	default:
		panic(fmt.Sprintf("checkpoint: %s is no storage type of weights", d))
	}
	size := d.Size()
	at := 0
	for ; at+8 <= len(data); at += 8 {
		if (binary.LittleEndian.Uint64(data[at:])&exponent+one)&sign != 0 {
			break
		}
	}
	var v [1]float32
	for ; at+size <= len(data); at += size {
		widen(d, v[:], data[at:])
		if math.IsNaN(float64(v[0])) || math.IsInf(float64(v[0]), 0) {
			return at / size
		}
	}
	return -1
}

// checkFinite describes the first value of a matrix that is not finite.
func checkFinite(m Matrix) error {
	switch m := m.(type) {
	case BF16:
		return nonFinite(m.ColCount, firstNonFinite(tensor.BF16, m.Data))
	case F16:
		return nonFinite(m.ColCount, firstNonFinite(tensor.F16, m.Data))
	case F32:
		return nonFinite(m.ColCount, firstNonFinite(tensor.F32, m.Data))
	case Transposed:
		if at := firstNonFinite(m.DType, m.Data); at >= 0 {
			return fmt.Errorf("is not finite at row %d, column %d", at%m.RowCount, at/m.RowCount)
		}
	case Chunked:
		return m.checkFinite()
	case MXFP4:
		if at := m.firstOverflow(); at >= 0 {
			groups := m.ColCount / groupValues
			return fmt.Errorf("overflows bfloat16 in row %d, group %d (scale byte %d)", at/groups, at%groups, m.Scales[at])
		}
	case Stack:
		for _, p := range m.Parts {
			if err := checkFinite(p); err != nil {
				return err
			}
		}
	case Dense:
		for at, v := range m.Data {
			if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
				return nonFinite(m.ColCount, at)
			}
		}
	default:
		rows, cols := m.Dims()
		row := make([]float32, cols)
		for r := range rows {
			m.Rows(row, r, 1)
			if err := checkFinite(Dense{1, cols, row}); err != nil {
				return fmt.Errorf("row %d %w", r, err)
			}
		}
	}
	return nil
}

// checkFinite scans the matrix in storage order, which the chunks don't follow.
func (m Chunked) checkFinite() error {
	size := m.DType.Size()
	each := len(m.Chunks[0]) / size
	for at, end := m.Start, m.Start+m.RowCount*m.ColCount; at < end; {
		n := min(each-at%each, end-at)
		data := m.Chunks[at/each][at%each*size : (at%each+n)*size]
		if bad := firstNonFinite(m.DType, data); bad >= 0 {
			bad += at - m.Start
			if m.Transposed {
				return fmt.Errorf("is not finite at row %d, column %d", bad%m.RowCount, bad/m.RowCount)
			}
			return nonFinite(m.ColCount, bad)
		}
		at += n
	}
	return nil
}

func nonFinite(cols, at int) error {
	if at < 0 {
		return nil
	}
	return fmt.Errorf("is not finite at row %d, column %d", at/cols, at%cols)
}
