package conformance

import (
	"context"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// evaluation computes taps of a model on demand from whatever is known: asked
// for a tap that is not known, it applies the stage that makes it to the taps
// that the stage reads, and so on backwards, at worst to the tokens.
//
// With a subject's own taps as what is known, one stage (or, where taps are
// missing, the few stages between two of them) is judged at a time.
type evaluation[F reference.Float] struct {
	ctx      context.Context
	model    *reference.Model[F]
	tokens   []int32
	reals    map[string][]F
	integers map[string][]int32
	// places are the tokens' positions; nil means 0, 1, 2, …
	places []int
}

func newEvaluation[F reference.Float](ctx context.Context, m *reference.Model[F], tokens []int32) *evaluation[F] {
	return &evaluation[F]{ctx: ctx, model: m, tokens: tokens, reals: map[string][]F{}, integers: map[string][]int32{}}
}

// real returns a tap of reals, and remembers it.
func (e *evaluation[F]) real(full string) []F {
	if known, ok := e.reals[full]; ok {
		return known
	}
	value := e.compute(full)
	e.reals[full] = value
	return value
}

// indices returns a layer's chosen experts, and remembers them.
func (e *evaluation[F]) indices(layer int) []int32 {
	full := taps.Block(layer, taps.ExpertIndices)
	if known, ok := e.integers[full]; ok {
		return known
	}
	logits := e.real(taps.Block(layer, taps.GateLogits))
	value := e.model.Stages.Choose(e.model.Layer(e.ctx, layer), logits)
	e.integers[full] = value
	return value
}

// compute applies the stage that makes a tap.
func (e *evaluation[F]) compute(full string) []F {
	layer, name := taps.Split(full)
	l, s := e.model.Layer(e.ctx, layer), &e.model.Stages
	if e.ctx.Err() != nil { // nobody looks at the result any more; don't start another stage
		return make([]F, elements(l.Config, full, len(e.tokens)))
	}
	at := func(name string) []F { return e.real(taps.Block(layer, name)) }
	switch name {
	case taps.Embedding:
		return s.Embed(l, e.model.Weights.Embedding, e.tokens)
	case taps.Input:
		return e.real(outputBefore(l.Config, layer))
	case taps.AttnNormed:
		return s.AttnNorm(l, at(taps.Input), l.Weights.AttnNorm)
	case taps.Q, taps.K, taps.V:
		q, k, v := s.QKV(l, at(taps.AttnNormed))
		return map[string][]F{taps.Q: q, taps.K: k, taps.V: v}[name]
	case taps.QRot:
		return s.RopeQuery(l, at(taps.Q), e.positions())
	case taps.KRot:
		return s.RopeKey(l, at(taps.K), e.positions())
	case taps.AttnCore:
		return s.Attention(l, reference.AttentionInput[F]{
			Queries: at(taps.QRot), QueryCount: len(e.tokens),
			Keys: at(taps.KRot), Values: at(taps.V), KeyCount: len(e.tokens),
		})
	case taps.PostAttention:
		return s.AttnResidual(l, at(taps.Input), at(taps.AttnNormed), s.AttnOut(l, at(taps.AttnCore)))
	case taps.MLPNormed:
		return s.MLPNorm(l, at(taps.PostAttention), l.Weights.MLPNorm)
	case taps.GateLogits:
		return s.GateLogits(l, at(taps.MLPNormed))
	case taps.ExpertWeights:
		return s.Weigh(l, at(taps.GateLogits), e.indices(layer))
	case taps.DenseGateWeights:
		return reference.DenseGateWeights(l, e.indices(layer), at(taps.ExpertWeights))
	case taps.Prelinear:
		return s.Prelinear(l, at(taps.MLPNormed), e.indices(layer))
	case taps.Activated:
		return s.Activate(l, at(taps.Prelinear))
	case taps.ExpertOutputs:
		return s.ExpertOutputs(l, at(taps.Activated), e.indices(layer))
	case taps.Fused:
		return s.Fuse(l, at(taps.ExpertOutputs), e.indices(layer), at(taps.ExpertWeights))
	case taps.Output:
		value := s.MLPResidual(l, at(taps.PostAttention), at(taps.MLPNormed), at(taps.Fused))
		if progress, ok := e.ctx.Value(progressKey{}).(func()); ok {
			progress()
		}
		return value
	case taps.FinalNorm:
		return s.FinalNorm(l, e.real(outputBefore(l.Config, -1)), e.model.Weights.FinalNorm)
	default: // taps.Logits: callers ask for registered taps of reals only
		return s.Unembed(l, e.real(taps.FinalNorm), e.model.Weights.Unembedding)
	}
}

// WithProgress returns a context in which judgements call progress after every
// block that they evaluate, of whichever run, perhaps from several goroutines. A run
// of the model has one such call for each layer.
func WithProgress(ctx context.Context, progress func()) context.Context {
	return context.WithValue(ctx, progressKey{}, progress)
}

type progressKey struct{}

// positions are the tokens' positions.
func (e *evaluation[F]) positions() []int {
	if e.places != nil {
		return e.places
	}
	return positions(len(e.tokens))
}

// positions counts 0, 1, … n-1.
func positions(n int) []int {
	p := make([]int, n)
	for i := range p {
		p[i] = i
	}
	return p
}

// elements is the size of a tap.
func elements(c config.Config, full string, tokens int) int {
	shape, err := taps.Shape(c, full, tokens)
	if err != nil {
		return 0
	}
	n := 1
	for _, d := range shape {
		n *= d
	}
	return n
}
