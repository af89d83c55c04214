package exporter

// RMSNorm divides every row of x [tokens, hidden] by the root of its mean square
// and multiplies with scale [hidden]:
//
//	y = x · 1/sqrt(mean(x²) + eps) · scale
//
// It is float32 inside in every precision, and only its result is rounded.
//
// Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467;
// openai/gpt-oss gpt_oss/torch/model.py RMSNorm.
func RMSNorm(l Layer, x, scale Value) Value {
	meanSquare := l.ReduceMean(l.Mul(x, x), -1, true)
	inverse := l.Reciprocal(l.Sqrt(l.Add(meanSquare, l.Float(l.Config.NormEpsilon))))
	return l.Round(l.Mul(l.Mul(x, inverse), scale))
}
