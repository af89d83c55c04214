package faults

import (
	"slices"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// In returns the fault in some layers only, as where one code path of several
// has it. The exporter has no such form.
func (f Fault) In(layers ...int) Fault {
	f.Layers, f.Graph, f.Variants = layers, nil, nil
	return f
}

// ByLayer reports whether the fault can be in one layer and not in another. What
// acts before the first block, after the last or on the cache can't; nor can
// window-on-odd-layers, which speaks of all layers together.
func (f Fault) ByLayer() bool {
	return !f.Cached && !f.AllLayers && f.Tap != taps.Embedding && f.Tap != taps.FinalNorm && f.Tap != taps.Logits
}

// Confine returns a model that is the changed one in some layers, and the right
// one in all others and outside of the blocks. Both must have the same shapes. A
// stage of those layers calls the changed model's stages, so that a fault which is
// applied to the result doesn't reach what they call.
func Confine[F reference.Float](right, changed reference.Model[F], layers []int) reference.Model[F] {
	r, c := right.Stages, &changed.Stages
	// at returns the layer as its stages have to see it, and whose stages those are.
	at := func(l reference.Layer[F]) (reference.Layer[F], *reference.Stages[F]) {
		if !slices.Contains(layers, l.Index) {
			return l, &r
		}
		l.Config, l.Weights, l.Stages = changed.Weights.Config, &changed.Weights.Blocks[l.Index], c
		return l, c
	}
	m := right // Embed, Frequencies, FinalNorm and Unembed stay
	m.Stages.AttnNorm = func(l reference.Layer[F], x []F, scale []float32) []F {
		l, s := at(l)
		return s.AttnNorm(l, x, l.Weights.AttnNorm)
	}
	m.Stages.QKV = func(l reference.Layer[F], x []F) (q, k, v []F) {
		l, s := at(l)
		return s.QKV(l, x)
	}
	m.Stages.RopeQuery = func(l reference.Layer[F], q []F, positions []int) []F {
		l, s := at(l)
		return s.RopeQuery(l, q, positions)
	}
	m.Stages.RopeKey = func(l reference.Layer[F], k []F, positions []int) []F {
		l, s := at(l)
		return s.RopeKey(l, k, positions)
	}
	m.Stages.KeyRange = func(l reference.Layer[F], query int) (from, to int) {
		l, s := at(l)
		return s.KeyRange(l, query)
	}
	m.Stages.KVHead = func(l reference.Layer[F], head int) int {
		l, s := at(l)
		return s.KVHead(l, head)
	}
	m.Stages.Scale = func(l reference.Layer[F]) F {
		l, s := at(l)
		return s.Scale(l)
	}
	m.Stages.Softmax = func(l reference.Layer[F], scores []F, sink F) {
		l, s := at(l)
		s.Softmax(l, scores, sink)
	}
	m.Stages.Attention = func(l reference.Layer[F], in reference.AttentionInput[F]) []F {
		l, s := at(l)
		return s.Attention(l, in)
	}
	m.Stages.KeepFrom = func(l reference.Layer[F], next int) int {
		l, s := at(l)
		return s.KeepFrom(l, next)
	}
	m.Stages.AttnOut = func(l reference.Layer[F], x []F) []F {
		l, s := at(l)
		return s.AttnOut(l, x)
	}
	m.Stages.AttnResidual = func(l reference.Layer[F], stream, normed, delta []F) []F {
		l, s := at(l)
		return s.AttnResidual(l, stream, normed, delta)
	}
	confineExperts(&m.Stages, at)
	return m
}

// confineExperts does the same to the second half of a block.
func confineExperts[F reference.Float](m *reference.Stages[F], at func(reference.Layer[F]) (reference.Layer[F], *reference.Stages[F])) {
	m.MLPNorm = func(l reference.Layer[F], x []F, scale []float32) []F {
		l, s := at(l)
		return s.MLPNorm(l, x, l.Weights.MLPNorm)
	}
	m.GateLogits = func(l reference.Layer[F], x []F) []F {
		l, s := at(l)
		return s.GateLogits(l, x)
	}
	m.Choose = func(l reference.Layer[F], logits []F) []int32 {
		l, s := at(l)
		return s.Choose(l, logits)
	}
	m.Weigh = func(l reference.Layer[F], logits []F, indices []int32) []F {
		l, s := at(l)
		return s.Weigh(l, logits, indices)
	}
	m.Prelinear = func(l reference.Layer[F], x []F, indices []int32) []F {
		l, s := at(l)
		return s.Prelinear(l, x, indices)
	}
	m.Activate = func(l reference.Layer[F], x []F) []F {
		l, s := at(l)
		return s.Activate(l, x)
	}
	m.SwiGLU = func(l reference.Layer[F], glu, linear []F) {
		l, s := at(l)
		s.SwiGLU(l, glu, linear)
	}
	m.ClampGlu = func(l reference.Layer[F], glu []F) {
		l, s := at(l)
		s.ClampGlu(l, glu)
	}
	m.ClampLinear = func(l reference.Layer[F], linear []F) {
		l, s := at(l)
		s.ClampLinear(l, linear)
	}
	m.Gate = func(l reference.Layer[F], glu, linear []F) {
		l, s := at(l)
		s.Gate(l, glu, linear)
	}
	m.ExpertOutputs = func(l reference.Layer[F], x []F, indices []int32) []F {
		l, s := at(l)
		return s.ExpertOutputs(l, x, indices)
	}
	m.Fuse = func(l reference.Layer[F], outputs []F, indices []int32, weights []F) []F {
		l, s := at(l)
		return s.Fuse(l, outputs, indices, weights)
	}
	m.MLPResidual = func(l reference.Layer[F], stream, normed, delta []F) []F {
		l, s := at(l)
		return s.MLPResidual(l, stream, normed, delta)
	}
}
