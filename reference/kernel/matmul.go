package kernel

// Rows is a weight matrix [rows, cols] that decodes itself, exactly, a few rows
// at a time; checkpoint.Matrix is one.
type Rows interface {
	Dims() (rows, cols int)
	Rows(dst []float32, from, n int)
}

// tileRows is how many weight rows are decoded at once. A tile of 16 rows at
// the real width (2880) in float64 is 360 KiB and stays in a core's L2 cache
// while all tokens pass over it.
const tileRows = 16

// MatMul computes y = x·Wᵀ: x [tokens, cols] with W [rows, cols] gives y
// [tokens, rows]. Every row is decoded once for all tokens.
func MatMul[F Float](x []F, w Rows, dot Dot[F]) []F {
	rows, cols := w.Dims()
	tokens := len(x) / cols
	y := make([]F, tokens*rows)
	Parallel(rows, tileRows, func(from, to int) {
		narrow := make([]float32, tileRows*cols)
		tile := make([]F, tileRows*cols)
		for first := from; first < to; first += tileRows {
			n := min(tileRows, to-first)
			w.Rows(narrow, first, n)
			for i, v := range narrow[:n*cols] {
				tile[i] = F(v)
			}
			for t := range tokens {
				in := x[t*cols : (t+1)*cols]
				out := y[t*rows+first : t*rows+first+n]
				for r := range out {
					out[r] = dot(in, tile[r*cols:(r+1)*cols])
				}
			}
		}
	})
	return y
}
