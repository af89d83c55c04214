package reference

import (
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// Prelinear applies the chosen experts' first layer: x [tokens, hidden] and
// indices [tokens, k] give [tokens, k, 2·intermediate], bias included, glu and
// linear interleaved.
//
// In a short format torch rounds the product, then the sum with the bias.
//
// Source: openai/gpt-oss gpt_oss/torch/model.py MLPBlock (mlp1).
func Prelinear[F Float](l Layer[F], x []F, indices []int32) []F {
	k := l.Config.ExpertsPerToken
	return perExpert(l, x, indices, l.Weights.MLP1, l.Weights.MLP1Bias, func(slot int) int { return slot / k })
}

// Activate applies the clamped SwiGLU to x [tokens, k, 2·intermediate]: [tokens,
// k, intermediate]. Even columns are glu, clamped from above only; odd columns
// are linear, clamped on both sides:
//
//	y = glu · sigmoid(alpha·glu) · (linear + 1)
//
// In a short format torch rounds after each of the five operations.
//
// Source: openai/gpt-oss gpt_oss/torch/model.py swiglu.
func Activate[F Float](l Layer[F], x []F) []F {
	out := make([]F, len(x)/2)
	kernel.Parallel(len(out), 1<<11, func(from, to int) {
		glu, linear := out[from:to], make([]F, to-from)
		for i := range glu {
			glu[i], linear[i] = x[2*(from+i)], x[2*(from+i)+1]
		}
		l.Stages.SwiGLU(l, glu, linear)
	})
	return out
}

// SwiGLU is the gpt-oss activation of n pairs. Like its parts, it works in place:
// glu [n] becomes the result, and linear [n] is used up.
func SwiGLU[F Float](l Layer[F], glu, linear []F) {
	l.Stages.ClampGlu(l, glu)
	l.Stages.ClampLinear(l, linear)
	l.Stages.Gate(l, glu, linear)
}

// ClampGlu clamps from above only.
func ClampGlu[F Float](l Layer[F], glu []F) {
	limit := F(l.Config.SwiGLULimit)
	for i, g := range glu {
		glu[i] = min(g, limit)
	}
}

// ClampLinear clamps on both sides.
func ClampLinear[F Float](l Layer[F], linear []F) {
	limit := F(l.Config.SwiGLULimit)
	for i, v := range linear {
		linear[i] = min(max(v, -limit), limit)
	}
}

// Gate is the activation of clamped pairs: [Gated] glu times linear + 1.
func Gate[F Float](l Layer[F], glu, linear []F) {
	Gated(l, glu)
	for i := range linear {
		linear[i]++
	}
	l.rounded(linear)
	for i, v := range linear {
		glu[i] *= v
	}
	l.rounded(glu)
}

// Gated multiplies glu with its own sigmoid, rounding where torch does.
func Gated[F Float](l Layer[F], glu []F) {
	alpha := F(l.Config.SwiGLUAlpha)
	sigmoid := make([]F, len(glu))
	for i, g := range glu {
		sigmoid[i] = alpha * g
	}
	l.rounded(sigmoid)
	for i := range sigmoid {
		sigmoid[i] = -sigmoid[i]
	}
	kernel.Exp(sigmoid)
	for i, e := range sigmoid {
		sigmoid[i] = 1 / (1 + e)
	}
	l.rounded(sigmoid)
	for i, s := range sigmoid {
		glu[i] *= s
	}
	l.rounded(glu)
}

// ExpertOutputs applies the chosen experts' second layer: x [tokens, k,
// intermediate] gives [tokens, k, hidden], bias included, not weighted.
func ExpertOutputs[F Float](l Layer[F], x []F, indices []int32) []F {
	return perExpert(l, x, indices, l.Weights.MLP2, l.Weights.MLP2Bias, func(slot int) int { return slot })
}

// perExpert runs one linear layer per expert over the slots [tokens·k] that
// chose it; row says which row of x a slot reads. Each expert's weights are
// decoded once, whatever the number of its tokens, and several experts with few
// tokens are computed together, so that all cores have work.
func perExpert[F Float](l Layer[F], x []F, indices []int32, weights []checkpoint.Matrix, biases [][]float32, row func(slot int) int) []F {
	out, in := weights[0].Dims()
	result := make([]F, len(indices)*out)
	var products []kernel.Product[F]
	var pending [][]int // the slots of each product
	flush := func() {
		kernel.MatMuls(products, l.Dot)
		for p, slots := range pending {
			addBiases(l, result, products[p].Y, slots, biases[indices[slots[0]]])
		}
		products, pending = products[:0], pending[:0]
	}
	rows := 0
	for expert, slots := range slotsByExpert(indices, len(weights)) {
		if len(slots) == 0 || l.cancelled() {
			continue
		}
		gathered := make([]F, len(slots)*in)
		kernel.Parallel(len(slots), 16, func(from, to int) {
			for i, slot := range slots[from:to] {
				copy(gathered[(from+i)*in:][:in], x[row(slot)*in:])
			}
		})
		product := kernel.NewProduct(gathered, weights[expert])
		product.Stop = l.cancelled
		products = append(products, product)
		pending = append(pending, slots)
		if rows += len(slots); rows >= rowsTogether {
			flush()
			rows = 0
		}
	}
	flush()
	return l.rounded(result)
}

// rowsTogether is how many slots' products are computed at a time: enough to
// occupy the cores, few enough for Ctrl-C to be heard within a second.
const rowsTogether = 128

// addBiases rounds products [slots, out], adds an expert's bias and stores the
// sums in the slots' rows of result.
func addBiases[F Float](l Layer[F], result, products []F, slots []int, bias []float32) {
	out := len(bias)
	l.rounded(products)
	kernel.Parallel(len(slots), 16, func(from, to int) {
		for i := from; i < to; i++ {
			y, product := result[slots[i]*out:][:out], products[i*out:][:out]
			for j, b := range bias {
				y[j] = product[j] + F(b)
			}
		}
	})
}

// slotsByExpert lists, for every expert, the positions in indices that name it.
func slotsByExpert(indices []int32, experts int) [][]int {
	slots := make([][]int, experts)
	for slot, e := range indices {
		slots[e] = append(slots[e], slot)
	}
	return slots
}

// Fuse adds up the experts' outputs [tokens, k, hidden] by their weights
// [tokens, k]: [tokens, hidden], without the residual.
func Fuse[F Float](l Layer[F], outputs []F, _ []int32, weights []F) []F {
	k, width := l.Config.ExpertsPerToken, l.Config.HiddenSize
	fused := make([]F, len(weights)/k*width)
	kernel.Parallel(len(weights)/k, 8, func(from, to int) {
		for slot := from * k; slot < to*k; slot++ {
			sum := fused[slot/k*width:][:width]
			for i, v := range outputs[slot*width:][:width] {
				sum[i] += F(weights[slot] * v) // converted, so that no machine fuses
			}
		}
	})
	return l.rounded(fused)
}
