package reference

import (
	"math"

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
	kernel.Parallel(len(out), 1<<12, func(from, to int) {
		for i := from; i < to; i++ {
			out[i] = l.Stages.SwiGLU(l, x[2*i], x[2*i+1])
		}
	})
	return out
}

// SwiGLU is the gpt-oss activation of one pair.
func SwiGLU[F Float](l Layer[F], glu, linear F) F {
	return l.Stages.Gate(l, l.Stages.ClampGlu(l, glu), l.Stages.ClampLinear(l, linear))
}

// ClampGlu clamps from above only.
func ClampGlu[F Float](l Layer[F], glu F) F { return min(glu, F(l.Config.SwiGLULimit)) }

// ClampLinear clamps on both sides.
func ClampLinear[F Float](l Layer[F], linear F) F {
	limit := F(l.Config.SwiGLULimit)
	return min(max(linear, -limit), limit)
}

// Gate is the activation of a clamped pair: [Gated] glu times linear + 1.
func Gate[F Float](l Layer[F], glu, linear F) F {
	return l.round1(Gated(l, glu) * l.round1(linear+1))
}

// Gated is glu times its own sigmoid, rounding where torch does.
func Gated[F Float](l Layer[F], glu F) F {
	scaled := l.round1(F(l.Config.SwiGLUAlpha) * glu)
	sigmoid := l.round1(F(1 / (1 + math.Exp(-float64(scaled)))))
	return l.round1(glu * sigmoid)
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
		gathered := make([]F, 0, len(slots)*in)
		for _, slot := range slots {
			gathered = append(gathered, x[row(slot)*in:][:in]...)
		}
		products = append(products, kernel.NewProduct(gathered, weights[expert]))
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
	for i, slot := range slots {
		y := result[slot*out:][:out]
		for j, b := range bias {
			y[j] = products[i*out+j] + F(b)
		}
	}
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
	for slot, weight := range weights {
		sum := fused[slot/k*width:][:width]
		for i, v := range outputs[slot*width:][:width] {
			sum[i] += weight * v
		}
	}
	return l.rounded(fused)
}
