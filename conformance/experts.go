package conformance

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// boundPrelinear: each chosen expert's linear layer; the product is stored,
// then its sum with the bias.
func boundPrelinear(b bounding, want []float64) []float64 {
	w := b.weights()
	return b.perExpert(reference.Prelinear[float64], b.at(taps.MLPNormed), w.MLP1[0], w.MLP1Bias, want)
}

// boundExpertOutputs is the same for the second layer.
func boundExpertOutputs(b bounding, want []float64) []float64 {
	w := b.weights()
	return b.perExpert(reference.ExpertOutputs[float64], b.at(taps.Activated), w.MLP2[0], w.MLP2Bias, want)
}

// perExpert bounds W·x + bias for the chosen experts: accumulation(n+1)·(|W|·|x|
// + |bias|), and the two roundings of storing. The magnitudes come from running
// the stage itself on the magnitudes of weights, biases and inputs.
func (b bounding) perExpert(stage func(reference.Layer[float64], []float64, []int32) []float64, x []float64, first checkpoint.Matrix, bias [][]float32, want []float64) []float64 {
	indices := b.truth.indices(b.layer)
	l := b.truth.model.Layer(b.truth.ctx, b.layer)
	block := magnitudeBlock(b.weights())
	l.Weights = &block
	bound := stage(l, magnitudes(x), indices)
	rows, n := first.Dims()
	factor := b.accumulation(n + 1)
	for i := range bound {
		own := math.Abs(float64(bias[indices[i/rows]][i%rows]))
		bound[i] = factor*bound[i] + b.store*(math.Abs(want[i])+own)
	}
	return b.stored(bound, want, 1)
}

// magnitudeBlock replaces the experts' weights and biases by their magnitudes.
func magnitudeBlock(w *checkpoint.Block) checkpoint.Block {
	block := *w
	block.MLP1, block.MLP2 = absolutes(w.MLP1), absolutes(w.MLP2)
	block.MLP1Bias, block.MLP2Bias = absoluteVectors(w.MLP1Bias), absoluteVectors(w.MLP2Bias)
	return block
}

func absolutes(matrices []checkpoint.Matrix) []checkpoint.Matrix {
	out := make([]checkpoint.Matrix, len(matrices))
	for i, m := range matrices {
		out[i] = absolute{m}
	}
	return out
}

func absoluteVectors(vectors [][]float32) [][]float32 {
	out := make([][]float32, len(vectors))
	for i, v := range vectors {
		out[i] = make([]float32, len(v))
		for j, x := range v {
			out[i][j] = float32(math.Abs(float64(x)))
		}
	}
	return out
}

// boundActivated bounds y = g·σ(α·g)·(l + 1) with g and l clamped.
//
// Storing α·g moves it by store·α|g|, which moves σ by that times (1 − σ) of
// itself; σ, g·σ, l + 1 and y are stored as well: store·(4 + α|g|·(1 − σ)) of
// |y|, with the last of them added by stored. The sigmoid's relative error is
// 6u besides, and its absolute error u: engines that compute it as (1 + tanh)/2
// or clamp its argument lose the far negative tail. A limit that the subject's
// format cannot hold is itself rounded.
func boundActivated(b bounding, want []float64) []float64 {
	c := b.truth.model.Weights.Config
	x := b.at(taps.Prelinear)
	limitError := b.store * c.SwiGLULimit
	if c.SwiGLULimit == math.Trunc(c.SwiGLULimit) && c.SwiGLULimit <= 1/b.store {
		limitError = 0 // small whole numbers are exact in every format
	}
	bound := make([]float64, len(want))
	for i, y := range want {
		g, l := min(x[2*i], c.SwiGLULimit), min(max(x[2*i+1], -c.SwiGLULimit), c.SwiGLULimit)
		sigma := 1 / (1 + math.Exp(-c.SwiGLUAlpha*g))
		factor := math.Abs(l + 1)
		relative := (b.store+b.sum)*(3+c.SwiGLUAlpha*math.Abs(g)*(1-sigma)) + 6*b.sum
		bound[i] = relative*math.Abs(y) + 2*b.sum*math.Abs(g)*factor
		if x[2*i] > c.SwiGLULimit-limitError {
			slope := sigma * (1 + c.SwiGLUAlpha*math.Abs(g)*(1-sigma))
			bound[i] += slope * limitError * factor
		}
		if math.Abs(x[2*i+1]) > c.SwiGLULimit-limitError {
			bound[i] += math.Abs(g) * sigma * limitError
		}
	}
	return b.stored(bound, want, 1)
}

// boundFused bounds Σ w_i·y_i over the k chosen experts. torch stores the sum
// alone; engines that go expert by expert store each product (store·|w·y|) and
// each partial sum, none of which exceeds Σ|w·y|: (1 + k)·store·Σ|w·y|, of which
// float32 sums are a part.
func boundFused(b bounding, want []float64) []float64 {
	c := b.truth.model.Weights.Config
	outputs, weights := b.at(taps.ExpertOutputs), b.at(taps.ExpertWeights)
	k, width := c.ExpertsPerToken, c.HiddenSize
	bound := make([]float64, len(want))
	for slot, weight := range weights {
		for i, y := range outputs[slot*width:][:width] {
			bound[slot/k*width+i] += math.Abs(weight * y)
		}
	}
	for i := range bound {
		bound[i] *= float64(1+k) * (b.store + b.sum)
	}
	return b.stored(bound, want, 0)
}
