package conformance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/gptoss-conformance/gptoss/golden"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// injectionsOf turns a golden stage case into inputs of stages. A case of an
// unknown kind is an error, so that none is left out unnoticed.
func injectionsOf(g golden.Case) ([]injection, error) {
	b := caseBuilder{golden: g, values: map[string][]float64{}, shapes: map[string][]int{}}
	for name := range g.Inputs {
		var err error
		if b.values[name], b.shapes[name], err = g.Input(name); err != nil {
			return nil, err
		}
	}
	truth, err := g.Truth()
	if err != nil {
		return nil, err
	}
	b.truth = truth
	kind, _, _ := strings.Cut(g.Name, ".")
	build := map[string]func(){
		"rope": b.rope, "rmsnorm": b.rmsnorm, "gating": b.gating, "logits": b.logits,
	}[g.Stage]
	switch {
	case g.Stage == StageAttention && strings.HasPrefix(kind, "projection"):
		build = b.projection
	case g.Stage == StageAttention:
		build = b.attention
	case g.Stage == StageExperts && strings.HasPrefix(kind, "activation"):
		build = b.activation
	case g.Stage == StageExperts && strings.HasPrefix(kind, "mlp1"):
		build = b.mlp1
	case g.Stage == StageExperts && strings.HasPrefix(kind, "mlp2"):
		build = b.mlp2
	case g.Stage == StageExperts && kind == "mxfp4":
		build = b.mxfp4
	}
	if build == nil {
		return nil, fmt.Errorf("golden/%s: the suite does not know how to run the case %s", g.Stage, g.Name)
	}
	build()
	if b.err == nil && len(b.made) == 0 {
		b.err = errors.New("nothing to run")
	}
	if b.err != nil {
		return nil, fmt.Errorf("golden/%s: case %s: %w", g.Stage, g.Name, b.err)
	}
	return b.made, nil
}

// caseBuilder makes the injections of one golden case. The first error is kept.
type caseBuilder struct {
	golden golden.Case
	values map[string][]float64
	shapes map[string][]int
	truth  map[string]tensor.Tensor
	made   []injection
	err    error
}

// config is a model of one layer and one expert, to be completed.
func (b *caseBuilder) config() config.Config {
	return config.Config{
		Layers: 1, Experts: 1, ExpertsPerToken: 1, VocabSize: 1,
		HiddenSize: 1, IntermediateSize: 1, HeadDim: 1, Heads: 1, KVHeads: 1,
		Sliding: []bool{false}, NormEpsilon: config.OpenAINormEpsilon, SwiGLUAlpha: config.OpenAISwiGLUAlpha, SwiGLULimit: 7,
	}
}

func (b *caseBuilder) parameter(name string, into any) {
	if err := b.golden.Parameter(name, into); err != nil && b.err == nil {
		b.err = err
	}
}

// input is one of the case's own inputs, as it was rounded.
func (b *caseBuilder) input(name string) tensor.Tensor {
	return tensor.FromFloat64s(b.shapes[name], b.values[name])
}

// vector is an input as float32; all of them are exact.
func (b *caseBuilder) vector(name string) []float32 { return singles(b.values[name]) }

func singles(values []float64) []float32 {
	out := make([]float32, len(values))
	for i, v := range values {
		out[i] = float32(v)
	}
	return out
}

// matrix is a weight; checkpoints hold theirs in bfloat16, and so do the cases.
func (b *caseBuilder) matrix(name string) checkpoint.Matrix {
	shape := b.shapes[name]
	data := make([]byte, 0, 2*len(b.values[name]))
	for _, v := range b.values[name] {
		data = binary.LittleEndian.AppendUint16(data, tensor.ToBFloat16(float32(v)))
	}
	return checkpoint.BF16{RowCount: shape[0], ColCount: shape[1], Data: data}
}

func (b *caseBuilder) packed() checkpoint.MXFP4 {
	bytes := func(name string) []byte {
		out := make([]byte, len(b.values[name]))
		for i, v := range b.values[name] {
			out[i] = byte(v)
		}
		return out
	}
	shape := b.shapes["blocks"]
	return checkpoint.MXFP4{RowCount: shape[0], ColCount: 32 * shape[1], Blocks: bytes("blocks"), Scales: bytes("scales")}
}

// output is one of the golden's float64 results.
func (b *caseBuilder) output(name string) []float64 {
	t, ok := b.truth[name]
	if !ok && b.err == nil {
		b.err = fmt.Errorf("the golden has no %q", name)
	}
	if !ok {
		return nil
	}
	values, err := numbers(t)
	if err != nil && b.err == nil {
		b.err = err
	}
	return values
}

func (b *caseBuilder) add(tap string, c config.Config, block checkpoint.Block, inputs map[string]tensor.Tensor, want []float64) *injection {
	b.made = append(b.made, injection{
		tap: tap, want: want, bounds: new(boundMemory),
		input: StageInput{Model: &checkpoint.Model{Config: c, Blocks: []checkpoint.Block{block}}, Inputs: inputs},
	})
	return &b.made[len(b.made)-1]
}

func (b *caseBuilder) rope() {
	c := b.config()
	var positions []int
	b.parameter("positions", &positions)
	b.parameter("head_dim", &c.HeadDim)
	b.parameter("initial_context_length", &c.InitialContextLength)
	b.parameter("rope_theta", &c.RopeTheta)
	b.parameter("rope_scaling_factor", &c.RopeScalingFactor)
	b.parameter("rope_ntk_alpha", &c.RopeNTKAlpha)
	b.parameter("rope_ntk_beta", &c.RopeNTKBeta)
	c.Heads, c.KVHeads = b.shapes["x"][1], b.shapes["x"][1]
	for _, tap := range []string{taps.QRot, taps.KRot} {
		made := b.add(tap, c, checkpoint.Block{}, map[string]tensor.Tensor{Reads(tap)[0]: b.input("x")}, b.output("rotated"))
		made.input.Positions = positions
	}
}

func (b *caseBuilder) rmsnorm() {
	c := b.config()
	b.parameter("epsilon", &c.NormEpsilon)
	c.HiddenSize = b.shapes["x"][1]
	scale, want := b.vector("weight"), b.output("normed")
	b.add(taps.AttnNormed, c, checkpoint.Block{AttnNorm: scale}, map[string]tensor.Tensor{taps.Input: b.input("x")}, want)
	b.add(taps.MLPNormed, c, checkpoint.Block{MLPNorm: scale}, map[string]tensor.Tensor{taps.PostAttention: b.input("x")}, want)
	b.add(taps.FinalNorm, c, checkpoint.Block{}, map[string]tensor.Tensor{taps.Output: b.input("x")}, want).input.Model.FinalNorm = scale
}

func (b *caseBuilder) attention() {
	c := b.config()
	var window int
	var rows []int
	b.parameter("heads", &c.Heads)
	b.parameter("kv_heads", &c.KVHeads)
	b.parameter("head_dim", &c.HeadDim)
	b.parameter("window", &window)
	b.parameter("rows", &rows)
	c.SlidingWindow, c.Sliding = window, []bool{window > 0}
	b.add(taps.AttnCore, c, checkpoint.Block{Sinks: b.vector("sinks")}, map[string]tensor.Tensor{
		taps.QRot: b.input("q"), taps.KRot: b.input("k"), taps.V: b.input("v"),
	}, b.output("attn_core")).rows = rows
}

// projection runs some rows of a fused projection of real width. The rows are a
// layer of their own: a third each for q, k and v, in heads of two.
func (b *caseBuilder) projection() {
	c := b.config()
	rows := b.shapes["weight"][0]
	c.HiddenSize, c.HeadDim, c.Heads, c.KVHeads = b.shapes["weight"][1], 2, rows/6, rows/6
	if c.QKVWidth() != rows {
		b.err = fmt.Errorf("%d rows cannot be divided among q, k and v", rows)
		return
	}
	block := checkpoint.Block{QKV: b.matrix("weight"), QKVBias: b.vector("bias")}
	want, tokens := b.output("qkv"), b.shapes["x"][0]
	for i, tap := range []string{taps.Q, taps.K, taps.V} {
		var part []float64
		for t := range tokens {
			part = append(part, want[t*rows+i*rows/3:][:rows/3]...)
		}
		b.add(tap, c, block, map[string]tensor.Tensor{taps.AttnNormed: b.input("x")}, part)
	}
}

// gating runs the router's parts one after the other, each on the golden output
// of the one before: of its logits as the case's type stores them.
func (b *caseBuilder) gating() {
	c := b.config()
	c.Experts, c.HiddenSize = b.shapes["weight"][0], b.shapes["weight"][1]
	b.parameter("experts_per_token", &c.ExpertsPerToken)
	block := checkpoint.Block{Gate: b.matrix("weight"), GateBias: b.vector("bias")}
	b.add(taps.GateLogits, c, block, map[string]tensor.Tensor{taps.MLPNormed: b.input("x")}, b.output("gate_logits"))

	tokens, k := b.shapes["x"][0], c.ExpertsPerToken
	exact := tensor.FromFloat64s([]int{tokens, c.Experts}, b.output("gate_logits"))
	logits := b.rounded(exact)
	choice := b.add(taps.ExpertIndices, c, block, map[string]tensor.Tensor{taps.GateLogits: logits}, nil)
	choice.exact = map[string]tensor.Tensor{taps.GateLogits: exact}

	indices := make([]int32, 0, tokens*k)
	for _, v := range b.output("expert_indices") {
		indices = append(indices, int32(v))
	}
	chosen := tensor.FromInt32s([]int{tokens, k}, indices)
	weights := b.add(taps.ExpertWeights, c, block, map[string]tensor.Tensor{taps.GateLogits: logits, taps.ExpertIndices: chosen}, b.output("expert_weights"))
	weights.exact = map[string]tensor.Tensor{taps.GateLogits: exact, taps.ExpertIndices: chosen}
}

// rounded stores a tensor in the case's type.
func (b *caseBuilder) rounded(t tensor.Tensor) tensor.Tensor {
	p := reference.Float32
	if b.golden.DType == tensor.BF16 {
		p = reference.BFloat16
	}
	stored, err := storedAs(p, t)
	if err != nil && b.err == nil {
		b.err = err
	}
	return stored
}

func (b *caseBuilder) swiglu(c *config.Config) {
	b.parameter("swiglu_limit", &c.SwiGLULimit)
	b.parameter("swiglu_alpha", &c.SwiGLUAlpha)
}

// oneExpert is a choice of the only expert by every token.
func oneExpert(tokens int) tensor.Tensor {
	return tensor.FromInt32s([]int{tokens, 1}, make([]int32, tokens))
}

// perSlotInput gives a tap [tokens, width] the axis of its only slot.
func perSlotInput(t tensor.Tensor) tensor.Tensor {
	t.Shape = []int{t.Shape[0], 1, t.Shape[1]}
	return t
}

func (b *caseBuilder) activation() {
	c := b.config()
	b.swiglu(&c)
	c.IntermediateSize = b.shapes["x"][1] / 2
	b.add(taps.Activated, c, checkpoint.Block{}, map[string]tensor.Tensor{taps.Prelinear: perSlotInput(b.input("x"))}, b.output("activated"))
}

func (b *caseBuilder) mlp1() {
	c := b.config()
	b.swiglu(&c)
	w, tokens := b.packed(), b.shapes["x"][0]
	c.HiddenSize, c.IntermediateSize = w.ColCount, w.RowCount/2
	block := checkpoint.Block{MLP1: []checkpoint.Matrix{w}, MLP1Bias: [][]float32{b.vector("bias")}}
	b.add(taps.Prelinear, c, block, map[string]tensor.Tensor{
		taps.MLPNormed: b.input("x"), taps.ExpertIndices: oneExpert(tokens),
	}, b.output("prelinear"))
	exact := tensor.FromFloat64s([]int{tokens, 1, w.RowCount}, b.output("prelinear"))
	b.add(taps.Activated, c, block, map[string]tensor.Tensor{taps.Prelinear: b.rounded(exact)}, b.output("activated")).
		exact = map[string]tensor.Tensor{taps.Prelinear: exact}
}

func (b *caseBuilder) mlp2() {
	c := b.config()
	w, tokens := b.packed(), b.shapes["x"][0]
	c.HiddenSize, c.IntermediateSize = w.RowCount, w.ColCount
	block := checkpoint.Block{MLP2: []checkpoint.Matrix{w}, MLP2Bias: [][]float32{b.vector("bias")}}
	b.add(taps.ExpertOutputs, c, block, map[string]tensor.Tensor{
		taps.Activated: perSlotInput(b.input("x")), taps.ExpertIndices: oneExpert(tokens),
	}, b.output("expert_output"))
}

// mxfp4 decodes every code under every scale by multiplying with the identity:
// token t picks column t out of the weights. All products but one are zero, so
// that the result is the weight itself in every arithmetic.
func (b *caseBuilder) mxfp4() {
	c := b.config()
	w := b.packed()
	n := w.ColCount
	c.HiddenSize, c.IntermediateSize = w.RowCount, n
	identity := make([]float64, n*n)
	for i := range n {
		identity[i*n+i] = 1
	}
	decoded := b.output("decoded")
	want := make([]float64, 0, len(decoded))
	for t := range n {
		for row := range w.RowCount {
			want = append(want, decoded[row*n+t])
		}
	}
	block := checkpoint.Block{MLP2: []checkpoint.Matrix{w}, MLP2Bias: [][]float32{make([]float32, w.RowCount)}}
	b.add(taps.ExpertOutputs, c, block, map[string]tensor.Tensor{
		taps.Activated: tensor.FromFloat64s([]int{n, 1, n}, identity), taps.ExpertIndices: oneExpert(n),
	}, want).bitwise = true
}

func (b *caseBuilder) logits() {
	c := b.config()
	b.parameter("epsilon", &c.NormEpsilon)
	c.HiddenSize, c.VocabSize = b.shapes["x"][1], b.shapes["unembedding"][0]
	scale := b.vector("scale")
	b.add(taps.FinalNorm, c, checkpoint.Block{}, map[string]tensor.Tensor{taps.Output: b.input("x")}, b.output("final_norm")).input.Model.FinalNorm = scale

	exact := tensor.FromFloat64s(b.shapes["x"], b.output("final_norm"))
	made := b.add(taps.Logits, c, checkpoint.Block{}, map[string]tensor.Tensor{taps.FinalNorm: b.rounded(exact)}, b.output("logits"))
	made.input.Model.Unembedding = b.matrix("unembedding")
	made.exact = map[string]tensor.Tensor{taps.FinalNorm: exact}
}
