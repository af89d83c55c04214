package faults

import (
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// attention lists the faults of the projections, the mask, the sinks, the
// scores and the residual of the first half of a block.
func attention() []Fault {
	return slices.Concat(windows(), sinks(), scores(), projections())
}

// attentionCore is a fault that shows first in attn_core.
func attentionCore(f Fault) Fault {
	f.Stage, f.Tap = stageAttention, taps.AttnCore
	return f
}

// windows lists the faults of the mask: who sees whom.
func windows() []Fault {
	return []Fault{
		attentionCore(Fault{
			ID:          "window-one-too-many",
			Explanation: "A windowed layer's query sees window + 1 keys.",
			Thread:      "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/2656",
			Checkpoint:  configured(func(c *config.Config) { c.SlidingWindow = widened(c.SlidingWindow, +1) }),
		}),
		attentionCore(Fault{
			ID:          "window-one-too-few",
			Explanation: "A windowed layer's query sees window - 1 keys.",
			Checkpoint:  configured(func(c *config.Config) { c.SlidingWindow = widened(c.SlidingWindow, -1) }),
		}),
		attentionCore(Fault{
			ID:          "window-ignored",
			Special:     1, // the same as window-one-too-many at window + 1 tokens
			Explanation: "Windowed layers see the whole past.",
			Thread:      "https://github.com/NVIDIA/TensorRT-Model-Connect/issues/399",
			Checkpoint:  configured(func(c *config.Config) { slide(c, func(int) bool { return false }) }),
		}),
		attentionCore(Fault{
			ID:          "window-on-odd-layers",
			Special:     2, // the same as window-ignored in a model of one layer
			AllLayers:   true,
			Explanation: "The window is on layers 1, 3, … instead of 0, 2, …",
			Thread:      "https://github.com/huggingface/transformers/pull/31775",
			Related:     true,
			Checkpoint:  configured(func(c *config.Config) { slide(c, func(layer int) bool { return layer%2 == 1 }) }),
		}),
		attentionCore(Fault{
			ID:          "window-on-all-layers",
			Explanation: "Every layer has the window, those with full attention too.",
			Thread:      "https://github.com/vllm-project/vllm/pull/21863",
			Related:     true,
			Checkpoint:  configured(func(c *config.Config) { slide(c, func(int) bool { return true }) }),
		}),
		attentionCore(Fault{
			ID:          "window-hard-coded-128",
			Special:     2, // the same as window-ignored up to 128 tokens
			Explanation: "The window is 128 whatever the configuration says.",
			Thread:      "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/2656",
			Checkpoint:  configured(func(c *config.Config) { c.SlidingWindow = 128 }), // gpt-oss-20b's and -120b's
		}),
		attentionCore(Fault{
			ID:          "window-both-sides",
			Explanation: "A windowed layer's query also sees the window - 1 keys after it.",
			Thread:      "https://github.com/ModelTC/LightLLM/pull/1311",
			Related:     true,
			Stages:      Swap{Wide: windowBothSides[float64], Single: windowBothSides[float32]},
			Graph:       windowBothSidesGraph,
		}),
		attentionCore(Fault{
			ID:          "attention-sees-next",
			Explanation: "The causal mask is off by one: a query sees the key after it.",
			Stages:      Swap{Wide: attentionSeesNext[float64], Single: attentionSeesNext[float32]},
			Graph:       attentionSeesNextGraph,
		}),
		attentionCore(Fault{
			ID:          "attention-excludes-self",
			Explanation: "The causal mask is off by one the other way: a query does not see its own key.",
			Stages:      Swap{Wide: attentionExcludesSelf[float64], Single: attentionExcludesSelf[float32]},
			Graph:       attentionExcludesSelfGraph,
		}),
	}
}

// widened changes the size of a window. No window (0) stays none, and one key is
// the least that a window can have.
func widened(window, by int) int {
	if window == 0 {
		return 0
	}
	return max(1, window+by)
}

func slide(c *config.Config, slides func(layer int) bool) {
	for layer := range c.Sliding {
		c.Sliding[layer] = slides(layer)
	}
}

func windowBothSides[F reference.Float](s *reference.Stages[F]) {
	keyRange := s.KeyRange
	s.KeyRange = func(l reference.Layer[F], query int) (from, to int) {
		from, to = keyRange(l, query)
		if window := l.Config.Window(l.Index); window > 0 {
			to += window - 1 // Attention stops at the last key that there is
		}
		return from, to
	}
}

func attentionSeesNext[F reference.Float](s *reference.Stages[F]) {
	keyRange := s.KeyRange
	s.KeyRange = func(l reference.Layer[F], query int) (from, to int) {
		from, to = keyRange(l, query)
		return from, to + 1
	}
}

// attentionExcludesSelf leaves the first query the sink alone: it attends to
// nothing, and attn_core is 0 there.
func attentionExcludesSelf[F reference.Float](s *reference.Stages[F]) {
	keyRange := s.KeyRange
	s.KeyRange = func(l reference.Layer[F], query int) (from, to int) {
		from, to = keyRange(l, query)
		return from, max(from, to-1)
	}
}

func windowBothSidesGraph(s *exporter.Stages) {
	visible := s.Visible
	s.Visible = func(scope *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		right := visible(scope, queries, keys, window)
		if window == 0 {
			return right
		}
		distance := scope.Subtract(scope.Unsqueeze(keys, 0), scope.Unsqueeze(queries, 1)) // of the keys after
		after := scope.And(scope.GreaterOrEqual(distance, scope.Int64(0)), scope.Less(distance, scope.Int64(window)))
		return or(scope, right, after)
	}
}

func attentionSeesNextGraph(s *exporter.Stages) {
	visible := s.Visible
	s.Visible = func(scope *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		next := scope.Equal(scope.Unsqueeze(keys, 0), scope.Unsqueeze(scope.Add(queries, scope.Int64(1)), 1))
		return or(scope, visible(scope, queries, keys, window), next)
	}
}

func attentionExcludesSelfGraph(s *exporter.Stages) {
	visible := s.Visible
	s.Visible = func(scope *exporter.Scope, queries, keys exporter.Value, window int) exporter.Value {
		before := scope.Less(scope.Unsqueeze(keys, 0), scope.Unsqueeze(queries, 1))
		return scope.And(visible(scope, queries, keys, window), before)
	}
}

// or is true where either is.
func or(s *exporter.Scope, a, b exporter.Value) exporter.Value {
	one, zero := s.Float(1), s.Float(0)
	return s.Less(zero, s.Add(s.Where(a, one, zero), s.Where(b, one, zero)))
}

// noSink is the logit of a sink that takes no part in the softmax: the exponential
// is 0 in any format. It is finite, as weights must be.
const noSink = -math.MaxFloat32

// sinks lists the faults of the attention sinks.
func sinks() []Fault {
	return []Fault{
		attentionCore(Fault{
			ID:          "sinks-dropped",
			Explanation: "The sinks are left out of the softmax.",
			Thread:      "https://github.com/vllm-project/vllm/pull/52148",
			Checkpoint:  resunk(func(config.Config, int, []float32) float32 { return noSink }),
		}),
		attentionCore(Fault{
			ID:          "sinks-kept-in-values",
			Explanation: "The sink's probability is not dropped but weighs the last visible value.",
			Stages:      Swap{Wide: sinksKeptInValues[float64], Single: sinksKeptInValues[float32]},
			Graph:       sinksKeptInValuesGraph,
		}),
		attentionCore(Fault{
			ID:          "sinks-not-in-max",
			Explanation: "exp(sink) is added without the shift by the largest score that the other scores get.",
			Thread:      "https://github.com/NVIDIA/TensorRT-LLM/pull/19220",
			Related:     true,
			Stages:      Swap{Wide: sinksNotInMax[float64], Single: sinksNotInMax[float32]},
			Graph:       sinksNotInMaxGraph,
		}),
		attentionCore(Fault{
			ID:          "sinks-counted-twice",
			Explanation: "The sink is in the denominator twice, as where each of two splits of the keys adds it.",
			Thread:      "https://github.com/ROCm/rocm-libraries/issues/12227",
			Stages:      Swap{Wide: sinksCountedTwice[float64], Single: sinksCountedTwice[float32]},
			Graph:       sinksCountedTwiceGraph,
		}),
		attentionCore(Fault{
			ID:          "sinks-scaled",
			Explanation: "The sinks are divided by sqrt(head_dim), as the scores are.",
			Thread:      "https://github.com/ROCm/rocm-libraries/issues/12227",
			Related:     true,
			Stages:      Swap{Wide: sinksScaled[float64], Single: sinksScaled[float32]},
			Graph:       sinksScaledGraph,
		}),
		attentionCore(Fault{
			ID:          "sinks-first-group-only",
			Explanation: "Only the query heads of the first key/value head have a sink.",
			Thread:      "https://github.com/NVIDIA/TensorRT-LLM/pull/15739",
			Related:     true,
			Checkpoint: resunk(func(c config.Config, head int, sinks []float32) float32 {
				if head < c.Heads/c.KVHeads {
					return sinks[head]
				}
				return noSink
			}),
		}),
		attentionCore(Fault{
			ID:          "sinks-misgrouped",
			Explanation: "The sinks are repeated for grouped queries like key/value heads, though there is one for every query head.",
			Thread:      "https://github.com/pie-project/pie/pull/272",
			Related:     true,
			Checkpoint: resunk(func(c config.Config, head int, sinks []float32) float32 {
				return sinks[head/(c.Heads/c.KVHeads)]
			}),
		}),
		attentionCore(Fault{
			ID:          "sinks-zero",
			Explanation: "Every sink is 0 (\"softmax plus one\"), as where the learned ones are not loaded.",
			Checkpoint:  resunk(func(config.Config, int, []float32) float32 { return 0 }),
		}),
	}
}

// resunk gives every query head another sink.
func resunk(sink func(c config.Config, head int, sinks []float32) float32) func(*checkpoint.Model) *checkpoint.Model {
	return reweighted(func(c config.Config, b *checkpoint.Block) {
		b.Sinks = mapped(b.Sinks, func(head int, _ float32) float32 { return sink(c, head, b.Sinks) })
	})
}

// sinksKeptInValues makes the sink the last of the scores, and adds its
// probability to that of the key before it.
func sinksKeptInValues[F reference.Float](s *reference.Stages[F]) {
	softmax := s.Softmax
	s.Softmax = func(l reference.Layer[F], scores []F, sink F) {
		visible := len(scores)
		if visible == 0 {
			return
		}
		row := append(slices.Clone(scores), sink)
		softmax(l, row, F(noSink))
		copy(scores, row)
		scores[visible-1] += row[visible]
	}
}

// sinksKeptInValuesGraph gives the last visible key what is missing from 1.
func sinksKeptInValuesGraph(s *exporter.Stages) {
	softmax := s.Softmax
	s.Softmax = func(l exporter.Layer, scores, sinks exporter.Value) exporter.Value {
		keys := l.Range(l.Int64(0), l.Squeeze(l.SizeOf(scores, 3), 0), scores.Shape()[3])
		visible := l.Less(l.Float(noSink), scores) // masked ones are -Inf
		last := l.ReduceMax(l.Where(visible, keys, l.Int64(-1)), 3, true)
		probabilities := softmax(l, scores, sinks)
		sink := l.Subtract(l.Float(1), l.ReduceSum(probabilities, 3, true))
		return l.Add(probabilities, l.Where(l.Equal(keys, last), sink, l.Float(0)))
	}
}

// sinksNotInMax raises the sink by the shift that it does not get:
// exp(sink) = exp((sink + max) − max).
func sinksNotInMax[F reference.Float](s *reference.Stages[F]) {
	softmax := s.Softmax
	s.Softmax = func(l reference.Layer[F], scores []F, sink F) {
		if len(scores) > 0 {
			sink += slices.Max(scores)
		}
		softmax(l, scores, sink)
	}
}

func sinksNotInMaxGraph(s *exporter.Stages) {
	softmax := s.Softmax
	s.Softmax = func(l exporter.Layer, scores, sinks exporter.Value) exporter.Value {
		return softmax(l, scores, l.Add(sinks, l.ReduceMax(scores, 3, true)))
	}
}

// sinksCountedTwice: 2·exp(sink) = exp(sink + ln 2).
func sinksCountedTwice[F reference.Float](s *reference.Stages[F]) {
	softmax := s.Softmax
	s.Softmax = func(l reference.Layer[F], scores []F, sink F) { softmax(l, scores, sink+math.Ln2) }
}

func sinksCountedTwiceGraph(s *exporter.Stages) {
	softmax := s.Softmax
	s.Softmax = func(l exporter.Layer, scores, sinks exporter.Value) exporter.Value {
		return softmax(l, scores, l.Add(sinks, l.Float(math.Ln2)))
	}
}

func sinksScaled[F reference.Float](s *reference.Stages[F]) {
	softmax := s.Softmax
	s.Softmax = func(l reference.Layer[F], scores []F, sink F) { softmax(l, scores, sink*l.Stages.Scale(l)) }
}

func sinksScaledGraph(s *exporter.Stages) {
	softmax := s.Softmax
	s.Softmax = func(l exporter.Layer, scores, sinks exporter.Value) exporter.Value {
		return softmax(l, scores, l.Mul(sinks, l.Float(l.Stages.Scale(l))))
	}
}

// scores lists the faults of the scores' scale and of the heads.
func scores() []Fault {
	return []Fault{
		attentionCore(Fault{
			ID:          "attention-scale-missing",
			Explanation: "The scores are not divided by sqrt(head_dim).",
			Thread:      "https://github.com/mlc-ai/mlc-llm/pull/3426",
			Related:     true,
			Stages:      Swap{Wide: attentionScaleMissing[float64], Single: attentionScaleMissing[float32]},
			Graph:       attentionScaleMissingGraph,
		}),
		attentionCore(Fault{
			ID:          "attention-scale-from-hidden",
			Explanation: "The scores are divided by sqrt(hidden/heads), where head_dim is not that (45 and 64 in gpt-oss).",
			Thread:      "https://github.com/NVIDIA-NeMo/Automodel/pull/3091",
			Related:     true,
			Stages:      Swap{Wide: attentionScaleFromHidden[float64], Single: attentionScaleFromHidden[float32]},
			Graph:       attentionScaleFromHiddenGraph,
		}),
		attentionCore(Fault{
			ID:          "attention-scale-packed-qkv",
			Explanation: "The scale takes the width of q, k and v together, divided by the query heads, for head_dim.",
			Thread:      "https://github.com/ROCm/hip-ep/pull/621",
			Related:     true,
			Stages:      Swap{Wide: attentionScalePackedQKV[float64], Single: attentionScalePackedQKV[float32]},
			Graph:       attentionScalePackedQKVGraph,
		}),
		attentionCore(Fault{
			ID:          "attention-scale-twice",
			Explanation: "The scores are divided by sqrt(head_dim) twice.",
			Thread:      "https://github.com/huggingface/transformers/pull/38290",
			Related:     true,
			Stages:      Swap{Wide: attentionScaleTwice[float64], Single: attentionScaleTwice[float32]},
			Graph:       attentionScaleTwiceGraph,
		}),
		attentionCore(Fault{
			ID:          "gqa-heads-misgrouped",
			Explanation: "Query head h reads key/value head h mod kv_heads (tiled) instead of h / group (repeated).",
			Thread:      "https://github.com/onnx/onnx/pull/7274",
			Stages:      Swap{Wide: gqaHeadsMisgrouped[float64], Single: gqaHeadsMisgrouped[float32]},
			Graph:       gqaHeadsMisgroupedGraph,
		}),
	}
}

func attentionScaleMissingGraph(s *exporter.Stages) {
	s.Scale = func(exporter.Layer) float64 { return 1 }
}

func attentionScaleMissing[F reference.Float](s *reference.Stages[F]) {
	s.Scale = func(reference.Layer[F]) F { return 1 }
}

func attentionScaleFromHidden[F reference.Float](s *reference.Stages[F]) {
	s.Scale = func(l reference.Layer[F]) F { return F(scaleFromHidden(l.Config)) }
}

func attentionScaleFromHiddenGraph(s *exporter.Stages) {
	s.Scale = func(l exporter.Layer) float64 { return scaleFromHidden(l.Config) }
}

func scaleFromHidden(c config.Config) float64 {
	return 1 / math.Sqrt(float64(c.HiddenSize)/float64(c.Heads))
}

func attentionScalePackedQKV[F reference.Float](s *reference.Stages[F]) {
	s.Scale = func(l reference.Layer[F]) F { return F(scalePackedQKV(l.Config)) }
}

func attentionScalePackedQKVGraph(s *exporter.Stages) {
	s.Scale = func(l exporter.Layer) float64 { return scalePackedQKV(l.Config) }
}

func scalePackedQKV(c config.Config) float64 {
	return 1 / math.Sqrt(float64(c.QKVWidth())/float64(c.Heads))
}

func attentionScaleTwice[F reference.Float](s *reference.Stages[F]) {
	scale := s.Scale
	s.Scale = func(l reference.Layer[F]) F { return scale(l) * scale(l) }
}

func attentionScaleTwiceGraph(s *exporter.Stages) {
	scale := s.Scale
	s.Scale = func(l exporter.Layer) float64 { return scale(l) * scale(l) }
}

func gqaHeadsMisgrouped[F reference.Float](s *reference.Stages[F]) {
	s.KVHead = func(l reference.Layer[F], head int) int { return head % l.Config.KVHeads }
}

// gqaHeadsMisgroupedGraph makes a group of the query heads that are the same
// modulo kv_heads.
func gqaHeadsMisgroupedGraph(s *exporter.Stages) {
	s.GroupHeads = func(l exporter.Layer, x exporter.Value) exporter.Value {
		c, shape := l.Config, x.Shape()
		split := l.Reshape(x, shape[0], exporter.N(c.Heads/c.KVHeads), exporter.N(c.KVHeads), shape[2])
		return l.Transpose(split, 2, 1, 0, 3)
	}
	s.MergeHeads = func(l exporter.Layer, x exporter.Value) exporter.Value {
		shape := x.Shape() // [kv_heads, group, tokens, head_dim]
		return l.Reshape(l.Transpose(x, 2, 1, 0, 3), shape[2], exporter.N(l.Config.Heads*shape[3].Size))
	}
}

// projections lists the faults of the linear layers around attention, and of the
// residual.
func projections() []Fault {
	return []Fault{
		{
			ID: "qkv-order", Stage: stageAttention, Tap: taps.Q,
			Explanation: "The fused projection's rows are read as k, q, v.",
			Checkpoint: repacked(func(c config.Config) []int {
				q, kv := c.QueryWidth(), c.KVWidth()
				return slices.Concat(span(kv, q), span(0, kv), span(q+kv, kv))
			}),
		},
		{
			ID: "kv-swapped", Stage: stageAttention, Tap: taps.K,
			Explanation: "Keys and values are exchanged: RoPE turns the values, and raw keys are summed up.",
			Thread:      "https://github.com/tenstorrent/tt-mlir/issues/8958",
			Related:     true,
			Checkpoint: repacked(func(c config.Config) []int {
				q, kv := c.QueryWidth(), c.KVWidth()
				return slices.Concat(span(0, q), span(q+kv, kv), span(q, kv))
			}),
		},
		{
			ID: "qkv-grouped-layout", Stage: stageAttention, Tap: taps.Q,
			Explanation: "The fused projection's rows are read as Megatron stores them: a group's query heads, then its k, then its v.",
			Thread:      "https://github.com/NVIDIA-NeMo/RL/pull/2802",
			Related:     true,
			Checkpoint:  repacked(groupedLayout),
		},
		{
			ID: "qkv-bias-dropped", Stage: stageAttention, Tap: taps.Q,
			Explanation: "The bias of q, k and v is not added.",
			Thread:      "https://github.com/NVIDIA/TensorRT-LLM/pull/12190",
			Related:     true,
			Checkpoint:  reweighted(func(_ config.Config, b *checkpoint.Block) { b.QKVBias = dropped(b.QKVBias) }),
		},
		{
			ID: "out-bias-dropped", Stage: stageAttention, Tap: taps.PostAttention,
			Explanation: "The bias of the output projection is not added.",
			Checkpoint:  reweighted(func(_ config.Config, b *checkpoint.Block) { b.OutBias = dropped(b.OutBias) }),
		},
		{
			ID: "out-bias-per-rank", Stage: stageAttention, Tap: taps.PostAttention,
			Explanation: "Each of two tensor-parallel ranks adds the output projection's bias before they are summed.",
			Thread:      "https://github.com/huggingface/text-generation-inference/issues/1036",
			Related:     true,
			Checkpoint:  reweighted(func(_ config.Config, b *checkpoint.Block) { b.OutBias = doubled(b.OutBias) }),
		},
		{
			ID: "residual-before-norm", Stage: stageAttention, Tap: taps.PostAttention,
			Explanation: "The normed input is added instead of the input, in both halves of a block.",
			Thread:      "https://github.com/Howuhh/faster-trajectory-transformer/issues/3",
			Related:     true,
			Stages:      Swap{Wide: residualBeforeNorm[float64], Single: residualBeforeNorm[float32]},
			Graph:       residualBeforeNormGraph,
			Variants: []Fault{{
				Explanation: "The normed input is added instead of the input after attention.",
				Stages:      Swap{Wide: attnResidualBeforeNorm[float64], Single: attnResidualBeforeNorm[float32]},
				Graph:       attnResidualBeforeNormGraph,
			}, {
				Stage: stageExperts, Tap: taps.Output,
				Explanation: "The normed input is added instead of the input after the experts.",
				Stages:      Swap{Wide: mlpResidualBeforeNorm[float64], Single: mlpResidualBeforeNorm[float32]},
				Graph:       mlpResidualBeforeNormGraph,
			}},
		},
	}
}

// span counts n rows from the first.
func span(first, n int) []int {
	rows := make([]int, n)
	for i := range rows {
		rows[i] = first + i
	}
	return rows
}

// repacked reads the rows of the fused projection, weights and bias, in another
// order: row i of what the model takes for q, then k, then v is the checkpoint's
// row order(c)[i].
func repacked(order func(config.Config) []int) func(*checkpoint.Model) *checkpoint.Model {
	return reweighted(func(c config.Config, b *checkpoint.Block) {
		source := order(c)
		b.QKV = rowsOf{b.QKV, source}
		b.QKVBias = mapped(b.QKVBias, func(i int, _ float32) float32 { return b.QKVBias[source[i]] })
	})
}

// groupedLayout takes the rows for one group after another, each with the query
// heads of a key/value head, then that head's k, then its v.
func groupedLayout(c config.Config) []int {
	perGroup, d := c.Heads/c.KVHeads, c.HeadDim
	var q, k, v []int
	for g := range c.KVHeads {
		first := g * (perGroup + 2) * d
		q = append(q, span(first, perGroup*d)...)
		k = append(k, span(first+perGroup*d, d)...)
		v = append(v, span(first+(perGroup+1)*d, d)...)
	}
	return slices.Concat(q, k, v)
}

func residualBeforeNorm[F reference.Float](s *reference.Stages[F]) {
	attnResidualBeforeNorm(s)
	mlpResidualBeforeNorm(s)
}

func residualBeforeNormGraph(s *exporter.Stages) {
	attnResidualBeforeNormGraph(s)
	mlpResidualBeforeNormGraph(s)
}

func attnResidualBeforeNorm[F reference.Float](s *reference.Stages[F]) {
	residual := s.AttnResidual
	s.AttnResidual = func(l reference.Layer[F], _, normed, delta []F) []F { return residual(l, normed, normed, delta) }
}

func attnResidualBeforeNormGraph(s *exporter.Stages) { s.AttnResidual = addsNormed(s.AttnResidual) }

func mlpResidualBeforeNorm[F reference.Float](s *reference.Stages[F]) {
	residual := s.MLPResidual
	s.MLPResidual = func(l reference.Layer[F], _, normed, delta []F) []F { return residual(l, normed, normed, delta) }
}

func mlpResidualBeforeNormGraph(s *exporter.Stages) { s.MLPResidual = addsNormed(s.MLPResidual) }

// addsNormed is the wrong residual of a graph. The graph of a single stage has no
// normed input, and stays right.
func addsNormed(residual func(l exporter.Layer, stream, normed, delta exporter.Value) exporter.Value) func(l exporter.Layer, stream, normed, delta exporter.Value) exporter.Value {
	return func(l exporter.Layer, stream, normed, delta exporter.Value) exporter.Value {
		if normed != (exporter.Value{}) {
			stream = normed
		}
		return residual(l, stream, normed, delta)
	}
}
