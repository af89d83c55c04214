package exporter

// microsoft is the domain of ONNX Runtime's own operators.
const microsoft = "com.microsoft"

// ONNXRuntime is the model in ONNX Runtime's operators where they are exactly
// right: GroupQueryAttention with sinks and window, and QMoE over the
// checkpoint's MXFP4 bytes, which needs version 1.32. All else is portable, and
// so are dense experts.
//
// In 16 bits the two compute in float32 inside and round their result alone, as
// fused kernels do: fewer roundings than torch's, so within the same bounds.
func ONNXRuntime() Stages {
	stages := Portable()
	stages.FusedAttention = GroupQueryAttention
	stages.FusedExperts = QMoE
	return stages
}

// FusedAttentionInput is what attention as one operator sees.
type FusedAttentionInput struct {
	Queries      Value // [tokens, heads, head_dim], rotated
	Keys, Values Value // [tokens, kv_heads, head_dim], rotated, of the new tokens
	PastK, PastV Value // [1, kv_heads, rows, head_dim], or absent
	Sinks        Value // [heads]
	Total        Value // rows and tokens together, int32 scalar
	Window       int   // 0: none
	// Sizes of the caches that come out: before and after rows that no later
	// token sees are dropped.
	All, Kept Dim
}

// GroupQueryAttention computes attn_core [tokens, heads·head_dim] with the
// operator of that name, and returns the cache that goes on.
//
// local_window_size W lets a query see 0 ≤ q − k < W, and head_sink is the sink's
// logit. Positions count from the first row of the cache, wherever in the
// sequence that is: only differences matter, and rotation is done before.
func GroupQueryAttention(l Layer, in FusedAttentionInput) (core, presentK, presentV Value) {
	c := l.Config
	tokens := in.Queries.shape[0]
	batch := func(v Value, width int) Value { return l.Reshape(v, N(1), tokens, N(width)) }
	window := int64(-1)
	if in.Window > 0 {
		window = int64(in.Window)
	}
	cache := Shape{N(1), N(c.KVHeads), in.All, N(c.HeadDim)}
	if in.All == (Dim{}) {
		cache[2] = tokens
	}
	last := l.Reshape(l.Subtract(in.Total, l.Int32(1)), N(1))
	l.graph.Import(microsoft, 1)
	out := l.Node(microsoft, "GroupQueryAttention",
		[]Value{
			batch(in.Queries, c.QueryWidth()), batch(in.Keys, c.KVWidth()), batch(in.Values, c.KVWidth()),
			in.PastK, in.PastV, last, in.Total,
			{}, {}, {}, {}, in.Sinks,
		},
		[]attribute{
			{"num_heads", int64(c.Heads)}, {"kv_num_heads", int64(c.KVHeads)},
			{"local_window_size", window}, {"scale", float32(l.Stages.Scale(l))},
		},
		output(Float32, Shape{N(1), tokens, N(c.QueryWidth())}), output(Float32, cache), output(Float32, cache))
	core = l.Round(l.Reshape(out[0], tokens, N(c.QueryWidth())))
	if in.PastK.edge == nil {
		return core, Value{}, Value{}
	}
	presentK, presentV = out[1], out[2]
	if in.Window > 0 {
		presentK = l.SliceFrom(presentK, 2, l.Int64s(-in.Window), in.Kept)
		presentV = l.SliceFrom(presentV, 2, l.Int64s(-in.Window), in.Kept)
	}
	return core, presentK, presentV
}

// fusedAttention adds attention as one operator with its cache.
func (m *model) fusedAttention(fused func(Layer, FusedAttentionInput) (core, presentK, presentV Value), l Layer, in blockInput, q, k, v Value) (core, presentK, presentV Value) {
	window := l.Config.Window(l.Index)
	rows := l.SizeOf(q, 0)
	if m.options.KVCache {
		rows = l.Add(rows, l.SizeOf(in.pastK, 2))
	}
	return fused(l, FusedAttentionInput{
		Queries: q, Keys: k, Values: v, PastK: in.pastK, PastV: in.pastV,
		Sinks: l.Weights.Sinks, Total: l.Cast(l.Squeeze(rows, 0), Int32), Window: window,
		All: in.keys.count, Kept: Symbol(windowed("kept", window)),
	})
}

// QMoE runs the experts on x [tokens, hidden] and adds them up by weights
// [tokens, k]: mlp_fused. The operator keeps to itself what is in between.
//
// It would choose and weigh experts itself, from logits. It is given the weights
// of the chosen ones, zero elsewhere, as both the numbers to choose by and the
// ones to weigh with, so that the graph's own gating decides.
func QMoE(l Layer, x, indices, weights Value) Value {
	c := l.Config
	routing := DenseGateWeights(l, indices, weights)
	ones := make([]float32, c.Experts)
	for i := range ones {
		ones[i] = 1
	}
	global := l.Floats("mxfp4.global_scale", Ns(c.Experts), ones)
	w := l.Weights
	l.graph.Import(microsoft, 1)
	return l.Round(l.Node(microsoft, "QMoE",
		[]Value{
			x, routing,
			w.MLP1Packed.Blocks, w.MLP1Packed.Scales, w.MLP1Bias,
			w.MLP2Packed.Blocks, w.MLP2Packed.Scales, w.MLP2Bias,
			{}, {}, {}, {}, {}, {}, routing, global, global,
		},
		[]attribute{
			{"k", int64(c.ExpertsPerToken)},
			{"activation_type", "swiglu"}, {"swiglu_fusion", int64(1)},
			{"activation_alpha", float32(c.SwiGLUAlpha)}, {"activation_beta", float32(1)}, {"swiglu_limit", float32(c.SwiGLULimit)},
			{"quant_type", "fp4"}, {"expert_weight_bits", int64(4)}, {"block_size", int64(32)}, {"weights_prepacked", int64(1)},
			{"normalize_routing_weights", int64(0)},
		},
		output(Float32, x.shape))[0])
}
