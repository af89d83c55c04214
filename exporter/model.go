package exporter

import (
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Stages is the forward pass as a value: one function per stage, each of which
// adds its nodes to the graph. The names are those of reference.Stages. The
// fault catalogue swaps single functions; [Portable] has the right ones.
type Stages struct {
	Embed         func(l Layer, table, tokens Value) Value
	Frequencies   func(c config.Config) Rotary
	RotaryTables  func(s *Scope, r Rotary, positions Value, limit int) (cos, sin Value)
	Visible       func(s *Scope, queries, keys Value, window int) Value
	AttnNorm      func(l Layer, x, scale Value) Value
	QKV           func(l Layer, x Value) (q, k, v Value)
	RopeQuery     func(l Layer, q, cos, sin Value) Value
	RopeKey       func(l Layer, k, cos, sin Value) Value
	GroupHeads    func(l Layer, x Value) Value
	MergeHeads    func(l Layer, x Value) Value
	Scale         func(l Layer) float64
	Softmax       func(l Layer, scores, sinks Value) Value
	Attention     func(l Layer, in AttentionInput) Value
	Kept          func(c config.Config, layer int) int
	AttnOut       func(l Layer, x Value) Value
	AttnResidual  func(l Layer, stream, normed, delta Value) Value
	MLPNorm       func(l Layer, x, scale Value) Value
	GateLogits    func(l Layer, x Value) Value
	Choose        func(l Layer, logits Value) (indices, chosen Value)
	Weigh         func(l Layer, logits, indices, chosen Value) Value
	Decode        func(s *Scope, w MXFP4, expert Value) Value
	Activate      func(l Layer, x Value) Value
	PackedExperts func(l Layer, x, indices Value) ExpertsOutput
	DenseExperts  func(l Layer, x, indices Value) ExpertsOutput
	Fuse          func(l Layer, outputs, indices, weights Value) Value
	MLPResidual   func(l Layer, stream, normed, delta Value) Value
	FinalNorm     func(l Layer, x, scale Value) Value
	Unembed       func(l Layer, x, table Value) Value

	// Operators of a runtime's own that do several stages at once; nil where the
	// stages are run one by one.

	// FusedAttention stands for GroupHeads to MergeHeads and for the cache. It
	// returns attn_core, and the keys and values that are cached.
	FusedAttention func(l Layer, in FusedAttentionInput) (core, presentK, presentV Value)
	// FusedExperts stands for PackedExperts and Fuse: it returns mlp_fused.
	FusedExperts func(l Layer, x, indices, weights Value) Value
}

// Portable is the model as OpenAI defines it, in ONNX's standard operators.
func Portable() Stages {
	return Stages{
		Embed: Embed, Frequencies: Frequencies, RotaryTables: RotaryTables, Visible: Visible,
		AttnNorm: RMSNorm, QKV: QKV, RopeQuery: RotateQueries, RopeKey: RotateKeys,
		GroupHeads: GroupHeads, MergeHeads: MergeHeads, Scale: Scale, Softmax: Softmax, Attention: Attention, Kept: Kept,
		AttnOut: AttentionOut, AttnResidual: Residual,
		MLPNorm: RMSNorm, GateLogits: GateLogits, Choose: Choose, Weigh: Weigh,
		Decode: Decode, Activate: Activate, PackedExperts: PackedExperts, DenseExperts: DenseExperts,
		Fuse: Fuse, MLPResidual: Residual, FinalNorm: RMSNorm, Unembed: Unembed,
	}
}

// Layer is what a stage is given besides its inputs: where in the graph it is,
// and with which weights. Outside the blocks Index is -1.
type Layer struct {
	*Scope
	Config  config.Config
	Index   int
	Stages  *Stages
	Weights LayerWeights
	model   *model
}

// In returns the layer in another scope: the body of a loop.
func (l Layer) In(s *Scope) Layer {
	l.Scope = s
	return l
}

// Wants reports whether the layer's tap of that name is an output of the graph.
func (l Layer) Wants(name string) bool { return l.model.wanted[taps.Block(l.Index, name)] }

// Tap names a value as the registry does, and makes it an output if it is wanted.
func (l Layer) Tap(name string, v Value) Value {
	full := name
	if l.Index >= 0 {
		full = taps.Block(l.Index, name)
	}
	return l.model.tap(l.Scope, full, v)
}

// LayerWeights is a block's weights as values of the graph, in the storage types
// of the checkpoint.
type LayerWeights struct {
	AttnNorm     Value // [hidden]
	QKV, QKVBias Value // [heads·d + 2·kv_heads·d, hidden]
	Sinks        Value // [heads]
	Out, OutBias Value // [hidden, heads·d]

	MLPNorm        Value // [hidden]
	Gate, GateBias Value // [experts, hidden]

	// Either the packed or the dense weights of the experts are there.
	MLP1Packed, MLP2Packed MXFP4
	MLP1, MLP2             Value // [experts, 2·intermediate, hidden] and [experts, hidden, intermediate]
	MLP1Bias, MLP2Bias     Value // [experts, 2·intermediate] and [experts, hidden]
}

// Embed looks up the tokens' rows of the table [vocab, hidden]: [tokens, hidden].
func Embed(l Layer, table, tokens Value) Value { return Widen(l.Scope, l.Gather(table, 0, tokens)) }

// Widen casts a weight to float32, which is exact for every storage type.
func Widen(s *Scope, weight Value) Value { return s.Cast(weight, Float32) }

// Linear is x·wᵀ + bias for x [tokens, in], weight [out, in] and bias [out],
// rounded once. The bias may be absent.
func Linear(s *Scope, x, weight, bias Value) Value {
	return s.Round(s.Gemm(x, Widen(s, weight), bias))
}

// Residual adds a block's result to the stream, both [tokens, hidden]. It is
// given the normed stream too, which it does not need: a well-known way to get a
// block wrong adds that one.
func Residual(l Layer, stream, normed, delta Value) Value { return l.Round(l.Add(stream, delta)) }

// Unembed computes logits [tokens, vocab] with the table [vocab, hidden].
func Unembed(l Layer, x, table Value) Value { return Linear(l.Scope, x, table, Value{}) }

// model is one export while its graph is built.
type model struct {
	graph   *Graph
	weights *checkpoint.Model
	config  config.Config
	options Options
	stages  Stages
	wanted  map[string]bool
	outputs map[string]Value
	past    map[string]Value // the cache that goes in, by name
	present []Value          // and the one that comes out
	inside  []tapped         // taps of the function that is being built
	partial bool             // weights that the checkpoint lacks are left out: a stage alone
}

func newModel(weights *checkpoint.Model, o Options) *model {
	graph := NewGraph(opset, irVersion)
	graph.modular = o.Functions
	return &model{
		graph:   graph,
		weights: weights,
		config:  weights.Config,
		options: o,
		stages:  *o.Stages,
		wanted:  map[string]bool{},
		outputs: map[string]Value{},
		past:    map[string]Value{},
	}
}

// build makes the whole graph.
func build(weights *checkpoint.Model, o Options) (*Graph, error) {
	m := newModel(weights, o)
	m.wanted[taps.Logits] = true
	for _, name := range taps.All(m.config) {
		if emitted(name, o) {
			m.wanted[name] = true
		}
	}
	if err := m.forward(); err != nil {
		return nil, err
	}
	// Logits first, as everybody expects; then the cache, and the taps in
	// execution order.
	m.graph.Output(m.outputs[taps.Logits])
	for _, v := range m.present {
		m.graph.Output(v)
	}
	for _, name := range taps.All(m.config) {
		if v, ok := m.outputs[name]; ok && name != taps.Logits {
			m.graph.Output(v)
		}
	}
	return m.graph, m.graph.Err()
}

// emitted reports whether the options ask for a tap as an output.
func emitted(full string, o Options) bool {
	_, name := taps.Split(full)
	if name == taps.Embedding || name == taps.FinalNorm || slices.Contains(taps.HiddenStates, name) {
		return o.HiddenStates
	}
	return name == taps.Logits || o.BlockDebug
}

func (m *model) tap(s *Scope, full string, v Value) Value {
	if s.body.function {
		return m.tapInside(s, full, v)
	}
	if !m.wanted[full] {
		if !v.named {
			v = s.Rename(v, full)
		}
		return v
	}
	v = s.Rename(v, full)
	m.outputs[full] = v
	return v
}

// layer returns what the stages of one block are given; -1 is outside the blocks.
func (m *model) layer(index int) Layer {
	l := Layer{Scope: m.graph.Scope(), Config: m.config, Index: index, Stages: &m.stages, model: m}
	l.precision = m.options.Precision
	if index >= 0 {
		l.Scope = l.Sub(fmt.Sprintf("block_%d", index))
	}
	return l
}

// shared is what the blocks have in common: positions, rotary tables, masks and
// tables of the decoding.
type shared struct {
	tokens        Dim
	cos, sin      Value
	keys          map[int]keys // by window
	codes, powers Value
}

// keys is what the layers of one window have in common.
type keys struct {
	past    Dim   // rows of the cache that goes in
	count   Dim   // rows that are attended to: the cache's and the new ones
	visible Value // [tokens, count]
}

func (m *model) forward() error {
	g := m.graph
	top := m.layer(-1)
	common := shared{tokens: Symbol("sequence"), keys: map[int]keys{}}
	limit := nearRows * farRows
	if m.options.SequenceLength > 0 {
		limit = m.options.SequenceLength
		if !m.options.KVCache {
			common.tokens = N(m.options.SequenceLength)
		}
	}
	ids := g.Input("input_ids", Int64, Shape{common.tokens}, "Token ids of one sequence, without padding.")

	s := top.Sub("positions")
	positions := s.Range(s.Int64(0), s.Squeeze(s.SizeOf(ids, 0), 0), common.tokens)
	var past Value
	if m.options.KVCache {
		past = g.Input(PastLength, Int64, Ns(1), "Tokens that the cache has seen before these.")
		positions = s.Add(past, positions)
	}
	common.cos, common.sin = m.stages.RotaryTables(top.Sub("rope"), m.stages.Frequencies(m.config), positions, limit)
	m.decoding(&common)
	m.cacheInputs(&common)
	for layer := range m.config.Layers {
		window := m.config.Window(layer)
		k := common.keys[window]
		if k.visible.edge != nil || m.stages.FusedAttention != nil {
			continue
		}
		s := top.Sub("visible")
		if window > 0 {
			s = top.Sub(fmt.Sprintf("visible_%d", window))
		}
		k.visible = m.stages.Visible(s, positions, m.keyPositions(s, layer, past, positions, k), window)
		common.keys[window] = k
	}

	table, err := m.matrix("embedding.weight", m.weights.Embedding)
	if err != nil {
		return err
	}
	embed := top
	embed.Scope = top.Sub(taps.Embedding)
	x := top.Tap(taps.Embedding, m.stages.Embed(embed, table, ids))
	for layer := range m.config.Layers {
		if x, err = m.block(layer, x, common); err != nil {
			return err
		}
	}
	scale := m.vector("norm.scale", m.weights.FinalNorm)
	normed := top
	normed.Scope = top.Sub(taps.FinalNorm)
	x = top.Tap(taps.FinalNorm, m.stages.FinalNorm(normed, x, scale))
	if m.options.LastLogitsOnly {
		x = normed.Slice(x, 0, -1, math.MaxInt64, 1, N(1))
	}
	if table, err = m.matrix("unembedding.weight", m.weights.Unembedding); err != nil {
		return err
	}
	logits := top
	logits.Scope = top.Sub("unembedding")
	top.Tap(taps.Logits, m.stages.Unembed(logits, x, table))
	return g.Err()
}

// decoding adds the tables that packed experts are decoded with in the graph.
func (m *model) decoding(common *shared) {
	if m.options.Experts == ExpertsPacked && m.stages.FusedExperts == nil {
		s := m.layer(-1).Sub("mxfp4")
		common.codes, common.powers = CodeTable(s), ScaleTable(s)
	}
}

// layerWeights declares a block's weights, named as OpenAI's checkpoint names them.
func (m *model) layerWeights(index int, common shared) (w LayerWeights, err error) {
	b := m.weights.Blocks[index]
	name := func(rest string) string { return fmt.Sprintf("block.%d.%s", index, rest) }
	matrix := func(rest string, weight checkpoint.Matrix) Value {
		v, e := m.matrix(name(rest), weight)
		if err == nil {
			err = e
		}
		return v
	}
	w.AttnNorm = m.vector(name("attn.norm.scale"), b.AttnNorm)
	w.QKV = matrix("attn.qkv.weight", b.QKV)
	w.QKVBias = m.vector(name("attn.qkv.bias"), b.QKVBias)
	w.Sinks = m.vector(name("attn.sinks"), b.Sinks)
	w.Out = matrix("attn.out.weight", b.Out)
	w.OutBias = m.vector(name("attn.out.bias"), b.OutBias)
	w.MLPNorm = m.vector(name("mlp.norm.scale"), b.MLPNorm)
	w.Gate = matrix("mlp.gate.weight", b.Gate)
	w.GateBias = m.vector(name("mlp.gate.bias"), b.GateBias)
	experts := func(rest string, weights []checkpoint.Matrix) (packed MXFP4, dense Value) {
		var e error
		if m.partial && len(weights) == 0 {
			return packed, dense
		}
		if m.options.Experts == ExpertsPacked {
			packed, e = m.packed(name(rest), weights)
			packed.Codes, packed.Powers = common.codes, common.powers
		} else {
			dense, e = m.dense(name(rest), weights)
		}
		if err == nil {
			err = e
		}
		return packed, dense
	}
	w.MLP1Packed, w.MLP1 = experts("mlp.mlp1_weight", b.MLP1)
	w.MLP1Bias = m.vectors(name("mlp.mlp1_bias"), b.MLP1Bias)
	w.MLP2Packed, w.MLP2 = experts("mlp.mlp2_weight", b.MLP2)
	w.MLP2Bias = m.vectors(name("mlp.mlp2_bias"), b.MLP2Bias)
	return w, err
}
