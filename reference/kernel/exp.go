package kernel

// Exp replaces every value by its exponential: in float64 [Exponential]; in float32
// that rounded, or the vector kernels', which is off by less than one unit in the
// last place and the same whatever stands beside it.
func Exp[F Float](x []F) {
	v := vectorsFor[F](chosen)
	if v == nil || v.exp == nil {
		for i, value := range x {
			x[i] = F(Exponential(float64(value)))
		}
		return
	}
	if chunks := len(x) / v.lanes; chunks > 0 {
		v.exp(chunks, &x[0])
		x = x[chunks*v.lanes:]
	}
	if len(x) > 0 {
		var last [chunkBytes / 4]F // as long as a chunk of float32, or longer
		copy(last[:], x)
		v.exp(1, &last[0])
		copy(x, last[:])
	}
}
