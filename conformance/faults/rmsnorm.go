package faults

import (
	"math"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// rmsnorm lists the faults of the norms: all three of them (before attention,
// before the experts, at the end) are wrong in the same way.
func rmsnorm() []Fault {
	all := []Fault{
		{
			ID:          "rmsnorm-eps-1e-6",
			Explanation: "The norm's eps is 1e-6 instead of 1e-5.",
			Thread:      "https://github.com/apache/tvm/pull/15856",
			Related:     true,
			Checkpoint:  configured(func(c *config.Config) { c.NormEpsilon = 1e-6 }),
		},
		{
			ID:          "rmsnorm-no-scale",
			Explanation: "The norm's learned scale is not applied.",
			Checkpoint:  rescaled(func(float32) float32 { return 1 }),
		},
		{
			ID:          "rmsnorm-plus-one",
			Explanation: "The norm multiplies with 1 + scale, as Gemma's does.",
			Thread:      "https://github.com/Blaizzy/mlx-vlm/pull/1552",
			Related:     true,
			Checkpoint:  rescaled(func(scale float32) float32 { return 1 + scale }),
		},
		{
			ID:          "rmsnorm-eps-outside-root",
			Explanation: "The norm's eps is added to the root instead of under it.",
			Thread:      "https://github.com/allenai/OLMo/issues/281",
			Related:     true,
			Stages:      Swap{Wide: rmsnormEpsOutsideRoot[float64], Single: rmsnormEpsOutsideRoot[float32]},
			Graph:       rmsnormEpsOutsideRootGraph,
		},
		{
			ID:          "rmsnorm-mean-subtracted",
			Explanation: "LayerNorm instead of RMSNorm: the mean is subtracted first.",
			Stages:      Swap{Wide: rmsnormMeanSubtracted[float64], Single: rmsnormMeanSubtracted[float32]},
			Graph:       rmsnormMeanSubtractedGraph,
		},
		{
			ID:          "norm-scales-swapped",
			Explanation: "The scales of a block's two norms are exchanged.",
			Thread:      "https://github.com/mattn/tensai/pull/83",
			Related:     true,
			Checkpoint: reweighted(func(_ config.Config, b *checkpoint.Block) {
				b.AttnNorm, b.MLPNorm = b.MLPNorm, b.AttnNorm
			}),
		},
	}
	for i := range all {
		all[i].Stage, all[i].Tap = stageRMSNorm, taps.AttnNormed
	}
	return all
}

// rescaled changes the scale of every norm.
func rescaled(change func(scale float32) float32) func(*checkpoint.Model) *checkpoint.Model {
	element := func(_ int, scale float32) float32 { return change(scale) }
	blocks := reweighted(func(_ config.Config, b *checkpoint.Block) {
		b.AttnNorm, b.MLPNorm = mapped(b.AttnNorm, element), mapped(b.MLPNorm, element)
	})
	return func(m *checkpoint.Model) *checkpoint.Model {
		changed := blocks(m)
		changed.FinalNorm = mapped(m.FinalNorm, element)
		return changed
	}
}

// norm is the type of the stages that norm.
type norm[F reference.Float] = func(l reference.Layer[F], x []F, scale []float32) []F

// eachNorm changes all three.
func eachNorm[F reference.Float](s *reference.Stages[F], change func(norm[F]) norm[F]) {
	s.AttnNorm, s.MLPNorm, s.FinalNorm = change(s.AttnNorm), change(s.MLPNorm), change(s.FinalNorm)
}

// graphNorm is the type of the exporter's stages that norm.
type graphNorm = func(l exporter.Layer, x, scale exporter.Value) exporter.Value

// eachGraphNorm changes all three of a graph.
func eachGraphNorm(s *exporter.Stages, change func(graphNorm) graphNorm) {
	s.AttnNorm, s.MLPNorm, s.FinalNorm = change(s.AttnNorm), change(s.MLPNorm), change(s.FinalNorm)
}

func rmsnormEpsOutsideRoot[F reference.Float](s *reference.Stages[F]) {
	eachNorm(s, func(norm[F]) norm[F] {
		return func(l reference.Layer[F], x []F, scale []float32) []F {
			out := make([]F, len(x))
			for at := 0; at < len(x); at += len(scale) {
				row := x[at:][:len(scale)]
				root := F(math.Sqrt(float64(l.Inner(row, row) / F(len(row)))))
				inverse := 1 / (root + F(l.Config.NormEpsilon))
				for i, v := range row {
					out[at+i] = v * inverse * F(scale[i])
				}
			}
			return round(l, out)
		}
	})
}

func rmsnormEpsOutsideRootGraph(s *exporter.Stages) {
	eachGraphNorm(s, func(graphNorm) graphNorm {
		return func(l exporter.Layer, x, scale exporter.Value) exporter.Value {
			root := l.Sqrt(l.ReduceMean(l.Mul(x, x), -1, true))
			inverse := l.Reciprocal(l.Add(root, l.Float(l.Config.NormEpsilon)))
			return l.Round(l.Mul(l.Mul(x, inverse), scale))
		}
	})
}

func rmsnormMeanSubtracted[F reference.Float](s *reference.Stages[F]) {
	eachNorm(s, func(right norm[F]) norm[F] {
		return func(l reference.Layer[F], x []F, scale []float32) []F {
			centred := make([]F, len(x))
			for at := 0; at < len(x); at += len(scale) {
				row := x[at:][:len(scale)]
				var mean F
				for _, v := range row {
					mean += v / F(len(row))
				}
				for i, v := range row {
					centred[at+i] = v - mean
				}
			}
			return right(l, centred, scale)
		}
	})
}

func rmsnormMeanSubtractedGraph(s *exporter.Stages) {
	eachGraphNorm(s, func(right graphNorm) graphNorm {
		return func(l exporter.Layer, x, scale exporter.Value) exporter.Value {
			return right(l, l.Subtract(x, l.ReduceMean(x, -1, true)), scale)
		}
	})
}
