package faults

import (
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// logits lists the faults of what is before the first block and after the last.
func logits() []Fault {
	return []Fault{
		{
			ID: "embedding-scaled", Stage: stageEmbedding, Tap: taps.Embedding,
			Explanation: "Embeddings are multiplied by sqrt(hidden), as Gemma does.",
			Thread:      "https://github.com/TensorAuto/OpenTau/pull/179",
			Related:     true,
			Stages:      Swap{Wide: embeddingScaled[float64], Single: embeddingScaled[float32]},
			Graph:       embeddingScaledGraph,
		},
		{
			ID: "embedding-tied", Stage: stageEmbedding, Tap: taps.Embedding,
			Explanation: "Embeddings are read from the unembedding matrix.",
			Thread:      "https://github.com/microsoft/onnxruntime-genai/issues/2306",
			Checkpoint: func(m *checkpoint.Model) *checkpoint.Model {
				changed := *m
				changed.Embedding = m.Unembedding
				return &changed
			},
		},
		{
			ID: "unembedding-tied", Stage: stageLogits, Tap: taps.Logits,
			Explanation: "The logits are computed with the embedding matrix.",
			Thread:      "https://github.com/microsoft/onnxruntime-genai/issues/2306",
			Related:     true,
			Checkpoint: func(m *checkpoint.Model) *checkpoint.Model {
				changed := *m
				changed.Unembedding = m.Embedding
				return &changed
			},
		},
		{
			ID: "final-norm-missing", Stage: stageRMSNorm, Tap: taps.FinalNorm,
			Explanation: "The logits are computed from the residual stream without the final norm.",
			Thread:      "https://github.com/vllm-project/speculators/pull/313",
			Related:     true,
			Stages:      Swap{Wide: finalNormMissing[float64], Single: finalNormMissing[float32]},
			Graph:       finalNormMissingGraph,
		},
	}
}

func embeddingScaled[F reference.Float](s *reference.Stages[F]) {
	embed := s.Embed
	s.Embed = func(l reference.Layer[F], embedding checkpoint.Matrix, tokens []int32) []F {
		x := slices.Clone(embed(l, embedding, tokens))
		factor := F(math.Sqrt(float64(l.Config.HiddenSize)))
		for i := range x {
			x[i] *= factor
		}
		return round(l, x)
	}
}

func embeddingScaledGraph(s *exporter.Stages) {
	embed := s.Embed
	s.Embed = func(l exporter.Layer, table, tokens exporter.Value) exporter.Value {
		factor := l.Float(math.Sqrt(float64(l.Config.HiddenSize)))
		return l.Round(l.Mul(embed(l, table, tokens), factor))
	}
}

func finalNormMissing[F reference.Float](s *reference.Stages[F]) {
	s.FinalNorm = func(_ reference.Layer[F], x []F, _ []float32) []F { return x }
}

func finalNormMissingGraph(s *exporter.Stages) {
	s.FinalNorm = func(l exporter.Layer, x, _ exporter.Value) exporter.Value { return l.Identity(x) }
}
