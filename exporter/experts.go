package exporter

import (
	"math"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// ExpertsOutput is what the experts of every token give, by slot: the slots of a
// token are its experts in the order of [Choose]. Prelinear and Activated are
// absent where an operator keeps them to itself.
type ExpertsOutput struct {
	Prelinear Value // [tokens, k, 2·intermediate]
	Activated Value // [tokens, k, intermediate]
	Outputs   Value // [tokens, k, hidden], bias included, not weighted
}

// Activate is SwiGLU as gpt-oss has it, on x [..., 2·intermediate] whose even
// columns are the gated part and whose odd columns are the linear part:
//
//	g = min(glu, limit),  l = clamp(linear, ±limit),  y = g·σ(α·g)·(l + 1)
//
// The sigmoid is written as 1/(1+exp(−z)): runtimes' own Sigmoid may be an
// approximation that is only absolutely accurate (ONNX Runtime's stops at
// σ(−18) = 1.5e-8), and glu has no lower clamp.
//
// Source: Shazeer 2020, https://arxiv.org/abs/2002.05202;
// openai/gpt-oss gpt_oss/torch/model.py swiglu.
func Activate(l Layer, x Value) Value {
	c := l.Config
	last := len(x.shape) - 1
	glu := l.Slice(x, last, 0, math.MaxInt64, 2, N(c.IntermediateSize))
	linear := l.Slice(x, last, 1, math.MaxInt64, 2, N(c.IntermediateSize))
	limit := l.Float(c.SwiGLULimit)
	glu = l.Min(glu, limit)
	linear = l.Max(l.Min(linear, limit), l.Float(-c.SwiGLULimit))
	return l.Round(l.Mul(Gated(l, glu), l.Round(l.Add(linear, l.Float(1)))))
}

// Gated is g·σ(α·g), the gated half of SwiGLU.
func Gated(l Layer, glu Value) Value {
	z := l.Round(l.Mul(glu, l.Float(l.Config.SwiGLUAlpha)))
	sigmoid := l.Round(l.Reciprocal(l.Add(l.Float(1), l.Exp(l.Neg(z)))))
	return l.Round(l.Mul(glu, sigmoid))
}

// ExpertLinear is one expert's layer, x [rows, in] by weight [out, in], plus
// bias [out]. Unlike [Linear] it rounds before the bias too, as torch does.
func ExpertLinear(l Layer, x, weight, bias Value) Value {
	return l.Round(l.Add(l.Round(l.Gemm(x, weight, Value{})), bias))
}

// fp4Values holds the value of each code of E2M1; the upper half is negative.
//
// Source: OCP Microscaling Formats 1.0, section 5.3.3.
var fp4Values = [16]float32{0, 0.5, 1, 1.5, 2, 3, 4, 6, float32(math.Copysign(0, -1)), -0.5, -1, -1.5, -2, -3, -4, -6}

// scaleBias is the exponent bias of E8M0: a scale byte s stands for 2^(s−127).
const scaleBias = 127

// CodeTable returns the values of the four codes in every 16-bit word of MXFP4
// blocks, [65536, 4]: of a byte the low half comes first, and of a word the low
// byte. The graph makes it from the 16 values, once.
func CodeTable(s *Scope) Value {
	values := s.Floats("mxfp4.values", Ns(16), fp4Values[:])
	// bytes[b] = (value of b's low half, value of its high half)
	low := s.Expand(s.Reshape(values, N(1), N(16), N(1)), 16, 16, 1)
	high := s.Expand(s.Reshape(values, N(16), N(1), N(1)), 16, 16, 1)
	bytes := s.Reshape(s.Concat(2, N(2), low, high), N(256), N(2))
	low = s.Expand(s.Reshape(bytes, N(1), N(256), N(2)), 256, 256, 2)
	high = s.Expand(s.Reshape(bytes, N(256), N(1), N(2)), 256, 256, 2)
	return s.Reshape(s.Concat(2, N(4), low, high), N(65536), N(4))
}

// ScaleTable returns the value of every scale byte, [256]. Byte 255 is NaN in
// the specification, and no checkpoint that loads has a value there.
func ScaleTable(s *Scope) Value {
	scales := make([]float32, 256)
	for i := range scales {
		scales[i] = float32(math.Ldexp(1, i-scaleBias))
	}
	scales[255] = float32(math.NaN())
	return s.Floats("mxfp4.scales", Ns(256), scales)
}

// MXFP4 is the packed weights of all experts of a layer, and the tables.
type MXFP4 struct {
	Blocks Value // [experts, rows, groups, 8], uint16: the checkpoint's own bytes
	Scales Value // [experts, rows, groups], uint8
	Codes  Value // see CodeTable
	Powers Value // see ScaleTable
}

// Decode returns one expert's weights [rows, columns] in float32. Only its bytes
// are read: a runtime that maps the file leaves the other experts on disk.
func Decode(s *Scope, w MXFP4, expert Value) Value {
	rows, groups := w.Blocks.shape[1], w.Blocks.shape[2].Size
	blocks := s.Cast(s.Gather(w.Blocks, 0, expert), Int32)
	scales := s.Cast(s.Gather(w.Scales, 0, expert), Int32)
	values := s.Reshape(s.Gather(w.Codes, 0, blocks), rows, N(groups), N(32))
	powers := s.Unsqueeze(s.Gather(w.Powers, 0, scales), 2)
	return s.Reshape(s.Mul(values, powers), rows, N(32*groups))
}

// PackedExperts runs the experts on x [tokens, hidden] for indices [tokens, k]:
// a loop over the experts that any token chose, each of which decodes its weights
// once and applies them to its tokens.
func PackedExperts(l Layer, x, indices Value) ExpertsOutput {
	c := l.Config
	debug := l.Wants(taps.Prelinear)
	widths := []int{c.HiddenSize}
	if debug {
		widths = append(widths, 2*c.IntermediateSize, c.IntermediateSize)
	}
	results := EachExpert(l, indices, widths, func(l Layer, expert, slots Value) []Value {
		input := l.Gather(x, 0, l.Div(slots, l.Int64(c.ExpertsPerToken)))
		prelinear := PackedLinear(l, input, l.Weights.MLP1Packed, l.Weights.MLP1Bias, expert)
		activated := activate(l, prelinear)
		outputs := PackedLinear(l, activated, l.Weights.MLP2Packed, l.Weights.MLP2Bias, expert)
		return []Value{outputs, prelinear, activated}[:len(widths)]
	})
	if debug {
		return ExpertsOutput{Outputs: results[0], Prelinear: results[1], Activated: results[2]}
	}
	return ExpertsOutput{Outputs: results[0]}
}

// PackedLinear applies one expert's packed layer to x [rows, in].
func PackedLinear(l Layer, x Value, w MXFP4, bias, expert Value) Value {
	weight := l.Call("DecodeMXFP4", "The weights of one expert, from codes of four bits and a power of two for every 32.",
		[]parameter{{"blocks", &w.Blocks}, {"scales", &w.Scales}, {"codes", &w.Codes}, {"powers", &w.Powers}, {"expert", &expert}},
		func(s *Scope) []Value { return []Value{l.Stages.Decode(s, w, expert)} })[0]
	return ExpertLinear(l, x, weight, l.Gather(bias, 0, expert))
}

func activate(l Layer, x Value) Value {
	return l.Call("SwiGLU", "gpt-oss's activation of interleaved columns.",
		[]parameter{{"x", &x}}, func(s *Scope) []Value { return []Value{l.Stages.Activate(l.In(s), x)} })[0]
}

// EachExpert loops over the experts that indices [tokens, k] name. The body is
// given an expert (an int64 scalar) and the slots that chose it (an int64 vector;
// slot s is expert s mod k of token s div k), and returns rows of the given
// widths for those slots. The results are [tokens, k, width] each.
func EachExpert(l Layer, indices Value, widths []int, body func(l Layer, expert, slots Value) []Value) []Value {
	tokens, k := indices.shape[0], l.Config.ExpertsPerToken
	slots := Symbol("slots")
	if tokens.Symbol == "" {
		slots = N(tokens.Size * k)
	}
	flat := l.Reshape(indices, slots)
	active := l.Unique(flat, l.Symbol("active_experts"))
	states := make([]Value, len(widths))
	for i, width := range widths {
		shape := l.Concat(0, N(2), l.SizeOf(flat, 0), l.Int64s(width))
		states[i] = l.Zeros(shape, Shape{slots, N(width)})
	}
	states = l.Loop("each_expert", l.Squeeze(l.SizeOf(active, 0), 0), states, func(s *Scope, iteration Value, states []Value) []Value {
		l := l.In(s)
		expert := l.Gather(active, 0, iteration)
		chosen := l.Nonzero(l.Equal(flat, expert), l.Symbol("slots"))
		next := make([]Value, len(states))
		for i, rows := range body(l, expert, chosen) {
			next[i] = l.ScatterRows(states[i], chosen, rows)
		}
		return next
	})
	for i, width := range widths {
		states[i] = l.Reshape(states[i], tokens, N(k), N(width))
	}
	return states
}

// DenseExperts runs all experts on all tokens and picks the chosen ones. That is
// experts/k times the work, without Loop: for small models, and for runtimes
// that have no control flow.
func DenseExperts(l Layer, x, indices Value) ExpertsOutput {
	prelinear := DenseLinear(l, l.Unsqueeze(x, 0), l.Weights.MLP1, l.Weights.MLP1Bias)
	activated := activate(l, prelinear)
	out := ExpertsOutput{Outputs: ChosenExperts(l, DenseLinear(l, activated, l.Weights.MLP2, l.Weights.MLP2Bias), indices)}
	if l.Wants(taps.Prelinear) {
		out.Prelinear, out.Activated = ChosenExperts(l, prelinear, indices), ChosenExperts(l, activated, indices)
	}
	return out
}

// DenseLinear applies the layers of all experts, weight [experts, out, in] and
// bias [experts, out], to x [experts or 1, tokens, in]: [experts, tokens, out].
// The weights stay as they are stored; the smaller tensors are transposed.
func DenseLinear(l Layer, x, weight, bias Value) Value {
	product := l.Transpose(l.MatMul(Widen(l.Scope, weight), l.Transpose(x, 0, 2, 1)), 0, 2, 1)
	return l.Round(l.Add(l.Round(product), l.Unsqueeze(bias, 1)))
}

// ChosenExperts picks from x [experts, tokens, width] what each token chose by
// indices [tokens, k]: [tokens, k, width].
func ChosenExperts(l Layer, x, indices Value) Value {
	return l.GatherBatched(l.Transpose(x, 1, 0, 2), indices)
}

// Fuse adds up the outputs [tokens, k, hidden] of a token's experts, weighted by
// weights [tokens, k]: [tokens, hidden]. It is given their indices too, which it
// does not need: a well-known way to get the sum wrong looks biases up by them.
func Fuse(l Layer, outputs, _, weights Value) Value {
	return l.Round(l.Squeeze(l.MatMul(l.Unsqueeze(weights, 1), outputs), 1))
}
