package exporter

import (
	"slices"

	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// blockInput is everything that a block reads besides its weights.
type blockInput struct {
	x            Value // the stream, [tokens, hidden]
	cos, sin     Value // [tokens, head_dim/2]
	pastK, pastV Value // the cache that goes in, if there is one
	keys         keys
}

// blockOutput is what a block gives: the stream, and the cache that goes on.
type blockOutput struct {
	x                  Value
	presentK, presentV Value
}

// block adds one transformer block to the stream x [tokens, hidden].
func (m *model) block(index int, x Value, common shared) (Value, error) {
	l := m.layer(index)
	var err error
	if l.Weights, err = m.layerWeights(index, common); err != nil {
		return x, err
	}
	in := blockInput{
		x: x, cos: common.cos, sin: common.sin, keys: common.keys[l.Config.Window(index)],
		pastK: m.past[taps.Block(index, PastK)], pastV: m.past[taps.Block(index, PastV)],
	}
	m.inside = nil
	results := l.Call("Block", "A transformer block: attention, then experts, each added to the stream.",
		append(in.parameters(), l.Weights.parameters()...), func(s *Scope) []Value {
			l := l.In(s)
			l.Weights.MLP2Packed.Codes, l.Weights.MLP2Packed.Powers = l.Weights.MLP1Packed.Codes, l.Weights.MLP1Packed.Powers
			out := m.blockStages(l, in)
			results := []Value{out.x}
			if m.options.KVCache {
				results = append(results, out.presentK, out.presentV)
			}
			for _, t := range m.inside {
				if !slices.Contains(results, t.value) {
					results = append(results, t.value)
				}
			}
			m.inside = positionsOf(m.inside, results)
			return results
		})
	for _, t := range m.inside {
		m.outputs[t.name] = l.Rename(results[t.position], t.name)
	}
	if x = results[0]; !x.named {
		x = l.Rename(x, taps.Block(index, taps.Output))
	}
	if m.options.KVCache {
		m.present = append(m.present,
			l.Rename(results[1], taps.Block(index, PresentK)), l.Rename(results[2], taps.Block(index, PresentV)))
	}
	return x, l.graph.Err()
}

// tapped is a tap inside a function, which the function must put out.
type tapped struct {
	name     string
	value    Value
	position int // among the function's outputs
}

// tapInside names a tap inside a function without its block, which the function
// does not know.
func (m *model) tapInside(s *Scope, full string, v Value) Value {
	_, name := taps.Split(full)
	if m.wanted[full] || !v.named {
		v = s.Rename(v, name)
	}
	if m.wanted[full] {
		m.inside = append(m.inside, tapped{name: full, value: v})
	}
	return v
}

func positionsOf(list []tapped, results []Value) []tapped {
	for i := range list {
		list[i].position = slices.Index(results, list[i].value)
	}
	return list
}

// blockStages adds the stages of a block.
func (m *model) blockStages(l Layer, in blockInput) (out blockOutput) {
	stage := func(name string) Layer { return l.In(l.Sub(name)) }
	st := l.Stages
	norm := func(l Layer, run func(l Layer, x, scale Value) Value, x, scale Value) Value {
		return l.Call("RMSNorm", "Each row divided by the root of its mean square, times scale.",
			[]parameter{{"x", &x}, {"scale", &scale}}, func(s *Scope) []Value { return []Value{run(l.In(s), x, scale)} })[0]
	}
	rotate := func(l Layer, run func(l Layer, x, cos, sin Value) Value, x Value) Value {
		cos, sin := in.cos, in.sin
		return l.Call("RotaryEmbedding", "The two halves of each head turned by an angle.",
			[]parameter{{"x", &x}, {"cos", &cos}, {"sin", &sin}}, func(s *Scope) []Value { return []Value{run(l.In(s), x, cos, sin)} })[0]
	}

	x := in.x
	if l.Wants(taps.Input) {
		x = l.Tap(taps.Input, x)
	}
	normed := l.Tap(taps.AttnNormed, norm(stage("attn_norm"), st.AttnNorm, x, l.Weights.AttnNorm))
	q, k, v := st.QKV(stage("qkv"), normed)
	q, k, v = l.Tap(taps.Q, q), l.Tap(taps.K, k), l.Tap(taps.V, v)
	q = l.Tap(taps.QRot, rotate(stage("rope_q"), st.RopeQuery, q))
	k = l.Tap(taps.KRot, rotate(stage("rope_k"), st.RopeKey, k))
	core, presentK, presentV := m.attention(l, in, q, k, v)
	core = l.Tap(taps.AttnCore, core)
	attended := st.AttnOut(stage("attn_out"), core)
	x = l.Tap(taps.PostAttention, st.AttnResidual(l, x, normed, attended))

	normed = l.Tap(taps.MLPNormed, norm(stage("mlp_norm"), st.MLPNorm, x, l.Weights.MLPNorm))
	gating := stage("gating")
	logits := l.Tap(taps.GateLogits, st.GateLogits(gating, normed))
	indices, chosen := st.Choose(gating, logits)
	weights := l.Tap(taps.ExpertWeights, st.Weigh(gating, logits, indices, chosen))
	if l.Wants(taps.ExpertIndices) {
		l.Tap(taps.ExpertIndices, gating.Cast(indices, Int32))
	}
	if l.Wants(taps.DenseGateWeights) {
		l.Tap(taps.DenseGateWeights, DenseGateWeights(gating, indices, weights))
	}
	fused := l.Tap(taps.Fused, m.experts(l, normed, indices, weights))
	x = l.Tap(taps.Output, st.MLPResidual(l, x, normed, fused))
	return blockOutput{x, presentK, presentV}
}

// attention adds a block's attention, whichever operators it is made of, and the
// cache that comes out of it.
func (m *model) attention(l Layer, in blockInput, q, k, v Value) (core, presentK, presentV Value) {
	if fused := l.Stages.FusedAttention; fused != nil {
		return m.fusedAttention(fused, l.In(l.Sub("attention")), in, q, k, v)
	}
	keys, presentK := m.cached(l, in, in.pastK, k)
	values, presentV := m.cached(l, in, in.pastV, v)
	a := AttentionInput{Queries: q, Keys: keys, Values: values, Visible: in.keys.visible, Sinks: l.Weights.Sinks}
	core = l.Sub("attention").Call("SinkAttention", "Softmax attention with one more logit per head, the sink, that takes part in the sum alone.",
		[]parameter{{"q", &a.Queries}, {"k", &a.Keys}, {"v", &a.Values}, {"visible", &a.Visible}, {"sinks", &a.Sinks}},
		func(s *Scope) []Value { return []Value{l.Stages.Attention(l.In(s), a)} })[0]
	return core, presentK, presentV
}

// experts adds a block's experts and their weighted sum.
func (m *model) experts(l Layer, x, indices, weights Value) Value {
	in, run := l.In(l.Sub("experts")), l.Stages.DenseExperts
	if m.options.Experts == ExpertsPacked {
		if fused := l.Stages.FusedExperts; fused != nil {
			return fused(in, x, indices, weights)
		}
		run = l.Stages.PackedExperts
	}
	result := run(in, x, indices)
	if result.Prelinear.edge != nil {
		l.Tap(taps.Prelinear, result.Prelinear)
		l.Tap(taps.Activated, result.Activated)
	}
	outputs := l.Tap(taps.ExpertOutputs, result.Outputs)
	return l.Stages.Fuse(l.In(l.Sub("fuse")), outputs, indices, weights)
}

func (in *blockInput) parameters() []parameter {
	return []parameter{
		{"x", &in.x}, {"cos", &in.cos}, {"sin", &in.sin}, {"visible", &in.keys.visible},
		{PastK, &in.pastK}, {PastV, &in.pastV},
	}
}

func (w *LayerWeights) parameters() []parameter {
	return []parameter{
		{"attn.norm.scale", &w.AttnNorm}, {"attn.qkv.weight", &w.QKV}, {"attn.qkv.bias", &w.QKVBias},
		{"attn.sinks", &w.Sinks}, {"attn.out.weight", &w.Out}, {"attn.out.bias", &w.OutBias},
		{"mlp.norm.scale", &w.MLPNorm}, {"mlp.gate.weight", &w.Gate}, {"mlp.gate.bias", &w.GateBias},
		{"mlp.mlp1_weight", &w.MLP1}, {"mlp.mlp1_weight.blocks", &w.MLP1Packed.Blocks}, {"mlp.mlp1_weight.scales", &w.MLP1Packed.Scales},
		{"mlp.mlp1_bias", &w.MLP1Bias},
		{"mlp.mlp2_weight", &w.MLP2}, {"mlp.mlp2_weight.blocks", &w.MLP2Packed.Blocks}, {"mlp.mlp2_weight.scales", &w.MLP2Packed.Scales},
		{"mlp.mlp2_bias", &w.MLP2Bias},
		{"mxfp4.codes", &w.MLP1Packed.Codes}, {"mxfp4.powers", &w.MLP1Packed.Powers},
	}
}
