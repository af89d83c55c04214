package checkpoint

// Pack returns a matrix in MXFP4 with the same values: as the checkpoint has
// it if it is packed there, else canonically encoded (see encodeMXFP4). It reports false if its
// values or its width don't allow that.
func Pack(m Matrix) (MXFP4, bool) {
	switch m := m.(type) {
	case MXFP4:
		return m, true
	case unpacked:
		return m.packed, true
	}
	rows, cols := m.Dims()
	if cols%groupValues != 0 {
		return MXFP4{}, false
	}
	groups := cols / groupValues
	packed := MXFP4{
		RowCount: rows, ColCount: cols,
		Blocks: make([]byte, rows*groups*groupBytes), Scales: make([]byte, rows*groups),
	}
	row := make([]float32, cols)
	for g := range packed.Scales {
		if g%groups == 0 {
			m.Rows(row, g/groups, 1)
		}
		scale, ok := encodeMXFP4((*[groupBytes]byte)(packed.Blocks[g*groupBytes:]), (*[groupValues]float32)(row[g%groups*groupValues:]))
		if !ok {
			return MXFP4{}, false
		}
		packed.Scales[g] = scale
	}
	return packed, true
}
