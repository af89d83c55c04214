package faults

import (
	"math"

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
			Checkpoint:  rescaled(func(scale float32) float32 { return 1 + scale }),
		},
		{
			ID:          "rmsnorm-eps-outside-root",
			Explanation: "The norm's eps is added to the root instead of under it.",
			Thread:      "https://github.com/allenai/OLMo/issues/281",
			Stages:      Swap{Wide: rmsnormEpsOutsideRoot[float64], Single: rmsnormEpsOutsideRoot[float32]},
		},
		{
			ID:          "rmsnorm-mean-subtracted",
			Explanation: "LayerNorm instead of RMSNorm: the mean is subtracted first.",
			Stages:      Swap{Wide: rmsnormMeanSubtracted[float64], Single: rmsnormMeanSubtracted[float32]},
		},
		{
			ID:          "norm-scales-swapped",
			Explanation: "The scales of a block's two norms are exchanged.",
			Thread:      "https://github.com/mattn/tensai/pull/83",
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

func rmsnormEpsOutsideRoot[F reference.Float](s *reference.Stages[F]) {
	eachNorm(s, func(norm[F]) norm[F] {
		return func(l reference.Layer[F], x []F, scale []float32) []F {
			out := make([]F, len(x))
			for at := 0; at < len(x); at += len(scale) {
				row := x[at:][:len(scale)]
				root := F(math.Sqrt(float64(l.Dot(row, row) / F(len(row)))))
				inverse := 1 / (root + F(l.Config.NormEpsilon))
				for i, v := range row {
					out[at+i] = v * inverse * F(scale[i])
				}
			}
			return round(l, out)
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
