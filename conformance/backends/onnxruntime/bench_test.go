package onnxruntime

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// BenchmarkLoad and BenchmarkRun are the cost of each operator set: on a fixture,
// and on two layers of 20b's width if the cache has them. `make bench-export`
// measures full width in a process of its own, with its memory.

func BenchmarkLoad(b *testing.B) {
	eachGraph(b, func(b *testing.B, path string, _ int) {
		for b.Loop() {
			s, err := Open(path, Options{KeepWeightsMapped: true})
			if err != nil {
				b.Fatal(err)
			}
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkRun(b *testing.B) {
	eachGraph(b, func(b *testing.B, path string, vocabulary int) {
		s, err := Open(path, Options{})
		require.NoError(b, err)
		defer s.Close()
		for _, n := range []int{1, 16, 128} {
			b.Run(fmt.Sprintf("tokens=%d", n), func(b *testing.B) {
				tokens := fixtures.Draw(1, "prompt.full", n, vocabulary)
				for b.Loop() {
					if _, err := s.Run(b.Context(), tokens); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "tokens/s")
			})
		}
	})
}

// eachGraph exports each model in both operator sets, with the last token's logits
// alone: those of all tokens would be most of the work of two layers.
func eachGraph(b *testing.B, run func(b *testing.B, path string, vocabulary int)) {
	models := []struct{ name, path string }{{"toy128", fixtures.Dir("toy128")}}
	if path := fullWidth(b); path != "" {
		models = append(models, struct{ name, path string }{"fullwidth", path})
	}
	for _, model := range models {
		m, err := checkpoint.Open(model.path)
		require.NoError(b, err)
		b.Cleanup(func() { m.Close() })
		if model.name == "fullwidth" {
			m, err = m.Cut(min(2, m.Config.Layers))
			require.NoError(b, err)
		}
		for _, operators := range []exporter.Operators{exporter.OperatorsPortable, exporter.OperatorsONNXRuntime} {
			b.Run(fmt.Sprintf("%s/%s", model.name, operators), func(b *testing.B) {
				path := filepath.Join(b.TempDir(), "m.onnx")
				require.NoError(b, exporter.Export(b.Context(), m, path, exporter.Options{Operators: operators, LastLogitsOnly: true}))
				run(b, path, m.Config.VocabSize)
			})
		}
	}
}

// fullWidth finds the checkpoint that GPTOSS_CHECKPOINT names, or the two layers
// that `gptoss synthesize` leaves in the cache; "" if there is none.
func fullWidth(b *testing.B) string {
	if path := os.Getenv("GPTOSS_CHECKPOINT"); path != "" {
		return path
	}
	cache, err := library.CacheDir()
	require.NoError(b, err)
	path := filepath.Join(cache, "checkpoints", fixtures.CacheName("20b", 2, 1))
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}
