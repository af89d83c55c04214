package kernel

// Rows is a weight matrix [rows, cols] that decodes itself, exactly, a few rows
// at a time; checkpoint.Matrix is one.
//
// A matrix may also be a [PackedMXFP4], a [PackedBF16] or a [Stacked]: the vector
// kernels then decode its bytes in registers.
type Rows interface {
	Dims() (rows, cols int)
	Rows(dst []float32, from, n int)
}

// PackedMXFP4 is a matrix in MXFP4.
type PackedMXFP4 interface {
	// PackedMXFP4 returns the codes [rows, cols/32, 16] and the scales [rows,
	// cols/32].
	PackedMXFP4() (blocks, scales []byte)
}

// PackedBF16 is a matrix in bfloat16.
type PackedBF16 interface {
	// PackedBF16 returns the values [rows, cols], little-endian.
	PackedBF16() []byte
}

// Stacked is the rows of several matrices one after another.
type Stacked interface {
	Stacked() []Rows
}

// Magnitudes is a matrix of another one's absolute values, as error bounds need
// them; the vector kernels then decode the other's bytes.
type Magnitudes interface {
	Magnitudes() Rows
}

// Product is one matrix product y = x·Wᵀ: x [tokens, cols] with W [rows, cols]
// gives y [tokens, rows].
type Product[F Float] struct {
	X []F
	W Rows
	Y []F
	// Stop, if it is not nil, is asked from time to time by all cores: once it is
	// true, the rest of Y is left as it is.
	Stop func() bool
}

func (p Product[F]) stopped() bool { return p.Stop != nil && p.Stop() }

// NewProduct returns a product with room for its result.
func NewProduct[F Float](x []F, w Rows) Product[F] {
	rows, cols := w.Dims()
	return Product[F]{X: x, W: w, Y: make([]F, len(x)/cols*rows)}
}

// MatMul computes y = x·Wᵀ: x [tokens, cols] with W [rows, cols] gives y
// [tokens, rows]. It sums by dot; nil means the fastest way, see [MatMuls].
func MatMul[F Float](x []F, w Rows, dot Dot[F]) []F {
	p := NewProduct(x, w)
	MatMuls([]Product[F]{p}, dot)
	return p.Y
}

// MatMuls computes several products at once, on all cores. Every weight is read
// from memory once for all tokens.
//
// With dot nil the vector kernels sum, if the processor has any and the columns
// are whole groups of 32; else [Lanes]. In float64 the results are those of
// Lanes, bit for bit. In float32 each sum has 16 running lanes and fused
// multiply-adds: AVX2 and AVX-512 agree bit for bit, portable Go differs within
// the bound λ·√n·u·Σ|ab| of any order. Neither the number of cores, nor that of
// the tokens, nor how the weights are stored changes a bit.
func MatMuls[F Float](products []Product[F], dot Dot[F]) {
	if dot == nil {
		if v := vectorsFor[F](chosen); v != nil {
			products = v.multiply(products)
		}
		dot = Lanes[F]
	}
	for _, p := range products {
		portable(p, dot)
	}
}

// tileRows is how many weight rows portable decodes at once. A tile of 16 rows
// at the real width (2880) in float64 is 360 KiB and stays in a core's L2 cache
// while all tokens pass over it.
const tileRows = 16

// portable computes a product with an inner product in plain Go.
func portable[F Float](p Product[F], dot Dot[F]) {
	rows, cols := p.W.Dims()
	tokens := len(p.X) / cols
	Parallel(rows, tileRows, func(from, to int) {
		if p.stopped() {
			return
		}
		n := to - from
		narrow := make([]float32, n*cols)
		tile := make([]F, n*cols)
		p.W.Rows(narrow, from, n)
		for i, v := range narrow {
			tile[i] = F(v)
		}
		for t := range tokens {
			in := p.X[t*cols : (t+1)*cols]
			out := p.Y[t*rows+from : t*rows+to]
			for r := range out {
				out[r] = dot(in, tile[r*cols:(r+1)*cols])
			}
		}
	})
}
