package reference

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// RMSNorm divides every row of x [tokens, hidden] by the root of its mean
// square and multiplies with scale [hidden]:
//
//	y = x / sqrt(mean(x²) + eps) · scale
//
// The sum and the root are in F and only the result is rounded, also in a
// short format, as in torch, where the norm is float32 inside.
//
// Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467;
// openai/gpt-oss gpt_oss/torch/model.py RMSNorm.
func RMSNorm[F Float](l Layer[F], x []F, scale []float32) []F {
	width := len(scale)
	out := make([]F, len(x))
	kernel.Parallel(len(x)/width, 8, func(from, to int) {
		for t := from; t < to; t++ {
			row, normed := x[t*width:(t+1)*width], out[t*width:(t+1)*width]
			meanSquare := l.Inner(row, row) / F(width)
			inverse := 1 / F(math.Sqrt(float64(meanSquare+F(l.Config.NormEpsilon))))
			for i, v := range row {
				normed[i] = v * inverse * F(scale[i])
			}
			l.rounded(normed)
		}
	})
	return out
}
