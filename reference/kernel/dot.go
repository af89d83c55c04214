package kernel

import "unsafe"

// Dot is an inner product of two vectors of the same length. Which order it
// sums in is its own affair: the judge's bounds hold for any order.
type Dot[F Float] func(a, b []F) F

// Lanes is the usual inner product: eight running sums, added as a tree. It is
// faster than one running sum and its error grows more slowly. (The conversions
// keep Go from fusing products and sums, which some machines would.)
func Lanes[F Float](a, b []F) F {
	var s0, s1, s2, s3, s4, s5, s6, s7 F
	b = b[:len(a)]
	i := 0
	for ; i+8 <= len(a); i += 8 {
		x, y := a[i:i+8:i+8], b[i:i+8:i+8]
		s0 += F(x[0] * y[0])
		s1 += F(x[1] * y[1])
		s2 += F(x[2] * y[2])
		s3 += F(x[3] * y[3])
		s4 += F(x[4] * y[4])
		s5 += F(x[5] * y[5])
		s6 += F(x[6] * y[6])
		s7 += F(x[7] * y[7])
	}
	sum := ((s0 + s4) + (s1 + s5)) + ((s2 + s6) + (s3 + s7))
	for ; i < len(a); i++ {
		sum += F(a[i] * b[i])
	}
	return sum
}

// Sequential sums from the first product to the last in one running sum, the
// least accurate order that real kernels use.
func Sequential[F Float](a, b []F) F {
	var sum F
	for i, v := range a {
		sum += F(v * b[i])
	}
	return sum
}

// Backward sums from the last product to the first.
func Backward[F Float](a, b []F) F {
	var sum F
	for i := len(a) - 1; i >= 0; i-- {
		sum += F(a[i] * b[i])
	}
	return sum
}

// Pairwise sums as a balanced tree down to blocks of 32 products.
func Pairwise[F Float](a, b []F) F {
	if len(a) <= 32 {
		return Sequential(a, b)
	}
	half := len(a) / 2
	return Pairwise(a[:half], b[:half]) + Pairwise(a[half:], b[half:])
}

// InnerProducts computes dst[i] = x·row i, the rows being stride apart in values.
// It sums by dot; nil means the fastest way, as in [MatMuls]: [Lanes], or, in
// float32 and for whole groups of 32 columns, the vector kernels' own order.
func InnerProducts[F Float](dst, x, values []F, stride int, dot Dot[F]) {
	if dot == nil {
		if v := vectorsFor[F](chosen); v != nil && len(x) > 0 && len(x)%groupColumns == 0 {
			if len(dst) > 0 {
				_ = values[(len(dst)-1)*stride+len(x)-1]
				size := int(unsafe.Sizeof(x[0]))
				v.innerProducts(len(dst), len(x)*size/chunkBytes, &x[0], &values[0], stride*size, &dst[0])
			}
			return
		}
		dot = Lanes[F]
	}
	for i := range dst {
		dst[i] = dot(x, values[i*stride:][:len(x)])
	}
}

// WeightedSum computes dst = Σ weights[i]·row i, the rows being stride apart in
// values: every column's inner product with weights. It sums by dot; nil means
// the order of [Lanes], which the vector kernels follow too (but with fused
// multiply-adds in float32).
func WeightedSum[F Float](dst, weights, values []F, stride int, dot Dot[F]) {
	if dot == nil {
		v := vectorsFor[F](chosen)
		if v == nil || len(weights) == 0 || len(dst) == 0 || len(dst)%groupColumns != 0 {
			lanesSum(dst, weights, values, stride)
			return
		}
		_ = values[(len(weights)-1)*stride+len(dst)-1]
		size := int(unsafe.Sizeof(dst[0]))
		v.weightedSum(len(weights), len(dst)*size/v.blockBytes, &weights[0], &values[0], stride*size, &dst[0])
		return
	}
	column := make([]F, len(weights))
	for j := range dst {
		for i := range column {
			column[i] = values[i*stride+j]
		}
		dst[j] = dot(weights, column)
	}
}

// lanesSum takes whole rows at a time, which lie together in memory. Each column
// is summed as Lanes would sum it.
func lanesSum[F Float](dst, weights, values []F, stride int) {
	const width = 64 // head_dim: one pass for the real models
	for from := 0; from < len(dst); from += width {
		var lanes [8][width]F
		to := min(from+width, len(dst))
		whole := len(weights) &^ 7
		for i, w := range weights[:whole] {
			sums := lanes[i%8][:to-from]
			for j, v := range values[i*stride+from:][:len(sums)] {
				sums[j] += F(w * v) // converted, so that no machine fuses
			}
		}
		for j := range dst[from:to] {
			sum := ((lanes[0][j] + lanes[4][j]) + (lanes[1][j] + lanes[5][j])) + ((lanes[2][j] + lanes[6][j]) + (lanes[3][j] + lanes[7][j]))
			for i := whole; i < len(weights); i++ {
				sum += F(weights[i] * values[i*stride+from+j])
			}
			dst[from+j] = sum
		}
	}
}
