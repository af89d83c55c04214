package checkpoint

import "slices"

// Densify returns a model whose matrices are decoded to float32 in memory, if
// all of them together take at most maxBytes, else the model itself. It is
// worth it for small models that run often. The result takes the place of m:
// close one of the two. What m has decoded already they share: a hundred models that
// differ in one matrix each take little more than one.
func (m *Model) Densify(maxBytes int64) *Model {
	var total int64
	for _, t := range m.canonical() {
		rows, cols := t.matrix.Dims()
		total += 4 * int64(rows) * int64(cols)
	}
	if total > maxBytes {
		return m
	}
	d := *m
	d.Embedding, d.Unembedding = decoded(m.Embedding), decoded(m.Unembedding)
	d.Blocks = slices.Clone(m.Blocks)
	for i := range d.Blocks {
		b := &d.Blocks[i]
		b.QKV, b.Out, b.Gate = decoded(b.QKV), decoded(b.Out), decoded(b.Gate)
		b.MLP1, b.MLP2 = decodeAll(b.MLP1), decodeAll(b.MLP2)
	}
	return &d
}

// decoded is a matrix in memory.
func decoded(m Matrix) Matrix {
	switch m.(type) {
	case Dense, unpacked:
		return m
	}
	return decode(m)
}

func decode(m Matrix) Matrix {
	rows, cols := m.Dims()
	d := Dense{rows, cols, make([]float32, rows*cols)}
	m.Rows(d.Data, 0, rows)
	return d
}

func decodeAll(all []Matrix) []Matrix {
	out := make([]Matrix, len(all))
	for i, m := range all {
		out[i] = decoded(m)
		if packed, ok := m.(MXFP4); ok {
			packed.Blocks, packed.Scales = slices.Clone(packed.Blocks), slices.Clone(packed.Scales)
			out[i] = unpacked{out[i], packed}
		}
	}
	return out
}

// unpacked is a decoded matrix with the bytes that it was decoded from. The same
// values may be packed in several ways, and whoever misreads bytes makes
// different mistakes with each.
type unpacked struct {
	Matrix
	packed MXFP4
}
