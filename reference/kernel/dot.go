package kernel

// Dot is an inner product of two vectors of the same length. Which order it
// sums in is its own affair: the judge's bounds hold for any order.
type Dot[F Float] func(a, b []F) F

// Lanes is the usual inner product: eight running sums, added as a tree. It is
// faster than one running sum and its error grows more slowly.
func Lanes[F Float](a, b []F) F {
	var s0, s1, s2, s3, s4, s5, s6, s7 F
	b = b[:len(a)]
	i := 0
	for ; i+8 <= len(a); i += 8 {
		x, y := a[i:i+8:i+8], b[i:i+8:i+8]
		s0 += x[0] * y[0]
		s1 += x[1] * y[1]
		s2 += x[2] * y[2]
		s3 += x[3] * y[3]
		s4 += x[4] * y[4]
		s5 += x[5] * y[5]
		s6 += x[6] * y[6]
		s7 += x[7] * y[7]
	}
	sum := ((s0 + s4) + (s1 + s5)) + ((s2 + s6) + (s3 + s7))
	for ; i < len(a); i++ {
		sum += a[i] * b[i]
	}
	return sum
}

// Sequential sums from the first product to the last in one running sum, the
// least accurate order that real kernels use.
func Sequential[F Float](a, b []F) F {
	var sum F
	for i, v := range a {
		sum += v * b[i]
	}
	return sum
}

// Backward sums from the last product to the first.
func Backward[F Float](a, b []F) F {
	var sum F
	for i := len(a) - 1; i >= 0; i-- {
		sum += a[i] * b[i]
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
