// Package reference is gpt-oss in Go, written to be read: one file per stage,
// plain loops, and every intermediate result observable.
//
// In float64 it is the truth that the judge computes on the spot for any
// checkpoint; it is itself held to goldens that OpenAI's torch model made.
package reference

import (
	"context"
	"fmt"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Stages is the forward pass as a value: one function per stage. The fault
// catalogue swaps single functions; [DefaultStages] has the right ones.
type Stages[F Float] struct {
	Embed       func(l Layer[F], embedding checkpoint.Matrix, tokens []int32) []F
	AttnNorm    func(l Layer[F], x []F, scale []float32) []F
	QKV         func(l Layer[F], x []F) (q, k, v []F)
	Frequencies func(c config.Config) Rotary // what RopeQuery and RopeKey turn by
	RopeQuery   func(l Layer[F], q []F, positions []int) []F
	RopeKey     func(l Layer[F], k []F, positions []int) []F
	KeyRange    func(l Layer[F], query int) (from, to int)
	KVHead      func(l Layer[F], head int) int
	Scale       func(l Layer[F]) F
	Softmax     func(l Layer[F], scores []F, sink F)
	Attention   func(l Layer[F], in AttentionInput[F]) []F
	KeepFrom    func(l Layer[F], next int) (from int) // which keys a cache keeps
	AttnOut     func(l Layer[F], x []F) []F
	// Residuals get the normed input too, though the right ones ignore it: a
	// well-known way to get a block wrong adds that one.
	AttnResidual  func(l Layer[F], stream, normed, delta []F) []F
	MLPNorm       func(l Layer[F], x []F, scale []float32) []F
	GateLogits    func(l Layer[F], x []F) []F
	Choose        func(l Layer[F], logits []F) (indices []int32)
	Weigh         func(l Layer[F], logits []F, indices []int32) (weights []F)
	Prelinear     func(l Layer[F], x []F, indices []int32) []F
	Activate      func(l Layer[F], x []F) []F
	SwiGLU        func(l Layer[F], glu, linear []F) // what Activate does to pairs: glu becomes the result,
	ClampGlu      func(l Layer[F], glu []F)         // and the three parts of that, in place
	ClampLinear   func(l Layer[F], linear []F)
	Gate          func(l Layer[F], glu, linear []F)
	ExpertOutputs func(l Layer[F], x []F, indices []int32) []F
	Fuse          func(l Layer[F], outputs []F, indices []int32, weights []F) []F
	MLPResidual   func(l Layer[F], stream, normed, delta []F) []F
	FinalNorm     func(l Layer[F], x []F, scale []float32) []F
	Unembed       func(l Layer[F], x []F, unembedding checkpoint.Matrix) []F
}

// DefaultStages is the model as OpenAI defines it.
func DefaultStages[F Float]() Stages[F] {
	return Stages[F]{
		Embed: Embed[F], AttnNorm: RMSNorm[F], QKV: QKV[F],
		Frequencies: NewRotary, RopeQuery: RotateQueries[F], RopeKey: RotateKeys[F],
		KeyRange: KeyRange[F], KVHead: KVHead[F], Scale: Scale[F], Softmax: Softmax[F],
		Attention: Attention[F], KeepFrom: KeepFrom[F], AttnOut: AttentionOut[F], AttnResidual: Residual[F],
		MLPNorm: RMSNorm[F], GateLogits: GateLogits[F], Choose: Choose[F],
		Weigh: ChosenSoftmax[F], Prelinear: Prelinear[F], Activate: Activate[F],
		SwiGLU: SwiGLU[F], ClampGlu: ClampGlu[F], ClampLinear: ClampLinear[F], Gate: Gate[F],
		ExpertOutputs: ExpertOutputs[F],
		Fuse:          Fuse[F], MLPResidual: Residual[F], FinalNorm: RMSNorm[F], Unembed: Unembed[F],
	}
}

// Layer is what a stage is given besides its inputs: where it is, with which
// weights and which arithmetic. Outside the blocks Index is -1 and Weights nil.
type Layer[F Float] struct {
	Arithmetic[F]
	Config  config.Config
	Index   int
	Weights *checkpoint.Block
	Stages  *Stages[F]

	ctx context.Context
}

// cancelled lets a long stage stop early; the model then drops its result.
func (l Layer[F]) cancelled() bool { return l.ctx != nil && l.ctx.Err() != nil }

// Model is a checkpoint with a forward pass and an arithmetic.
type Model[F Float] struct {
	Weights    *checkpoint.Model
	Arithmetic Arithmetic[F]
	Stages     Stages[F]
}

// New returns the model that OpenAI defines, in the arithmetic given.
func New[F Float](weights *checkpoint.Model, a Arithmetic[F]) Model[F] {
	return Model[F]{Weights: weights, Arithmetic: a, Stages: DefaultStages[F]()}
}

// Layer returns what the stages of one block are given.
func (m *Model[F]) Layer(ctx context.Context, index int) Layer[F] {
	l := Layer[F]{Arithmetic: m.Arithmetic, Config: m.Weights.Config, Index: index, Stages: &m.Stages, ctx: ctx}
	if index >= 0 {
		l.Weights = &m.Weights.Blocks[index]
	}
	return l
}

// Observer is told of every tap in execution order. It may keep the slices but
// must not write to them. Its fields may be nil.
type Observer[F Float] struct {
	Reals    func(name string, values []F)
	Integers func(name string, values []int32)
}

func (o Observer[F]) reals(name string, values []F) {
	if o.Reals != nil {
		o.Reals(name, values)
	}
}

func (o Observer[F]) integers(name string, values []int32) {
	if o.Integers != nil {
		o.Integers(name, values)
	}
}

// Forward runs the model on tokens and returns their logits [tokens, vocab].
//
// With a cache, the tokens follow those that the cache has seen, and join them;
// without one (nil) they start at position 0. A token outside the vocabulary is
// an error, and so is the context's end.
func (m *Model[F]) Forward(ctx context.Context, tokens []int32, cache *Cache[F], o Observer[F]) ([]F, error) {
	if err := CheckTokens(m.Weights.Config, tokens); err != nil {
		return nil, err
	}
	if cache == nil {
		cache = new(Cache[F])
	}
	x := m.Embed(ctx, tokens, o)
	for layer := range m.Weights.Config.Layers {
		x = m.Block(ctx, layer, x, cache, o)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	cache.tokens += len(tokens)
	logits := m.Logits(ctx, x, o)
	return logits, ctx.Err()
}

// CheckTokens reports ids outside the vocabulary, and an empty prompt.
func CheckTokens(c config.Config, tokens []int32) error {
	if len(tokens) == 0 {
		return fmt.Errorf("no tokens: a run needs at least one")
	}
	for i, id := range tokens {
		if id < 0 || int(id) >= c.VocabSize {
			return fmt.Errorf("token %d has id %d, outside the vocabulary of %d", i, id, c.VocabSize)
		}
	}
	return nil
}

// Embed looks the tokens up: [tokens, hidden].
func (m *Model[F]) Embed(ctx context.Context, tokens []int32, o Observer[F]) []F {
	x := m.Stages.Embed(m.Layer(ctx, -1), m.Weights.Embedding, tokens)
	o.reals(taps.Embedding, x)
	return x
}

// Block runs one transformer block over x [tokens, hidden], whose first token
// follows those that the cache has seen.
func (m *Model[F]) Block(ctx context.Context, layer int, x []F, cache *Cache[F], o Observer[F]) []F {
	l := m.Layer(ctx, layer)
	o.reals(taps.Block(layer, taps.Input), x)
	x = m.attention(l, x, cache, o)
	o.reals(taps.Block(layer, taps.PostAttention), x)
	if l.cancelled() {
		return x
	}
	x = m.mixture(l, x, o)
	o.reals(taps.Block(layer, taps.Output), x)
	return x
}

// attention is the first half of a block: norm, projections, RoPE, sinks
// attention, output projection and residual.
func (m *Model[F]) attention(l Layer[F], x []F, cache *Cache[F], o Observer[F]) []F {
	tap := func(name string, values []F) { o.reals(taps.Block(l.Index, name), values) }
	tokens, first := len(x)/l.Config.HiddenSize, cache.tokens
	positions := make([]int, tokens)
	for i := range positions {
		positions[i] = first + i
	}

	normed := m.Stages.AttnNorm(l, x, l.Weights.AttnNorm)
	tap(taps.AttnNormed, normed)
	q, k, v := m.Stages.QKV(l, normed)
	tap(taps.Q, q)
	tap(taps.K, k)
	tap(taps.V, v)
	q, k = m.Stages.RopeQuery(l, q, positions), m.Stages.RopeKey(l, k, positions)
	tap(taps.QRot, q)
	tap(taps.KRot, k)

	keys, values, firstKey := cache.extend(l, k, v)
	core := m.Stages.Attention(l, AttentionInput[F]{
		Queries: q, FirstQuery: first, QueryCount: tokens,
		Keys: keys, Values: values, FirstKey: firstKey, KeyCount: len(keys) / l.Config.KVWidth(),
	})
	cache.trim(l, first+tokens)
	tap(taps.AttnCore, core)
	return m.Stages.AttnResidual(l, x, normed, m.Stages.AttnOut(l, core))
}

// mixture is the second half of a block: norm, router, experts and residual.
func (m *Model[F]) mixture(l Layer[F], x []F, o Observer[F]) []F {
	tap := func(name string, values []F) { o.reals(taps.Block(l.Index, name), values) }

	normed := m.Stages.MLPNorm(l, x, l.Weights.MLPNorm)
	tap(taps.MLPNormed, normed)
	logits := m.Stages.GateLogits(l, normed)
	tap(taps.GateLogits, logits)
	indices := m.Stages.Choose(l, logits)
	weights := m.Stages.Weigh(l, logits, indices)
	o.integers(taps.Block(l.Index, taps.ExpertIndices), indices)
	tap(taps.ExpertWeights, weights)
	if o.Reals != nil {
		tap(taps.DenseGateWeights, DenseGateWeights(l, indices, weights))
	}
	prelinear := m.Stages.Prelinear(l, normed, indices)
	tap(taps.Prelinear, prelinear)
	activated := m.Stages.Activate(l, prelinear)
	tap(taps.Activated, activated)
	outputs := m.Stages.ExpertOutputs(l, activated, indices)
	tap(taps.ExpertOutputs, outputs)
	fused := m.Stages.Fuse(l, outputs, indices, weights)
	tap(taps.Fused, fused)
	return m.Stages.MLPResidual(l, x, normed, fused)
}

// Logits norms x [tokens, hidden] and projects it to the vocabulary.
func (m *Model[F]) Logits(ctx context.Context, x []F, o Observer[F]) []F {
	l := m.Layer(ctx, -1)
	normed := m.Stages.FinalNorm(l, x, m.Weights.FinalNorm)
	o.reals(taps.FinalNorm, normed)
	logits := m.Stages.Unembed(l, normed, m.Weights.Unembedding)
	if l.cancelled() { // they are half done, and large
		return logits
	}
	o.reals(taps.Logits, logits)
	return logits
}

// Embed looks up rows of the embedding matrix, without scaling.
func Embed[F Float](l Layer[F], embedding checkpoint.Matrix, tokens []int32) []F {
	_, width := embedding.Dims()
	row := make([]float32, width)
	x := make([]F, 0, len(tokens)*width)
	for _, id := range tokens {
		embedding.Rows(row, int(id), 1)
		x = append(x, convert[F](row)...)
	}
	return l.rounded(x)
}

// Linear computes x·Wᵀ + bias; a short format rounds once, the bias inside.
func Linear[F Float](l Layer[F], x []F, w checkpoint.Matrix, bias []float32) []F {
	y := l.product(x, w)
	kernel.Parallel(len(y)/len(bias), 16, func(from, to int) {
		for t := from; t < to; t++ {
			row := y[t*len(bias):][:len(bias)]
			for i, b := range bias {
				row[i] += F(b)
			}
		}
	})
	return l.rounded(y)
}

// Unembed projects to the vocabulary, without bias.
func Unembed[F Float](l Layer[F], x []F, unembedding checkpoint.Matrix) []F {
	return l.rounded(l.product(x, unembedding))
}

// product is x·Wᵀ; a model that is cancelled meanwhile drops it half done.
func (l Layer[F]) product(x []F, w checkpoint.Matrix) []F {
	p := kernel.NewProduct(x, w)
	p.Stop = l.cancelled
	kernel.MatMuls([]kernel.Product[F]{p}, l.Dot)
	return p.Y
}

// Residual adds a half block's result to the residual stream.
func Residual[F Float](l Layer[F], stream, _, delta []F) []F {
	sum := make([]F, len(stream))
	kernel.Parallel(len(stream), 1<<14, func(from, to int) {
		for i := from; i < to; i++ {
			sum[i] = stream[i] + delta[i]
		}
	})
	return l.rounded(sum)
}
