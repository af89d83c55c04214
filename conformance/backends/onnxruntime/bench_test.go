package onnxruntime

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// fullWidth opens the two layers of 20b's width that `gptoss synthesize` leaves in
// the cache, or the checkpoint that GPTOSS_CHECKPOINT names, cut to two layers.
func fullWidth(b *testing.B) *checkpoint.Model {
	b.Helper()
	path := os.Getenv("GPTOSS_CHECKPOINT")
	if path == "" {
		cache, err := library.CacheDir()
		if err != nil {
			b.Fatal(err)
		}
		found, err := filepath.Glob(filepath.Join(cache, "checkpoints", "20b-2-layers-*"))
		if err != nil || len(found) == 0 {
			b.Skip("no checkpoint of full width in the cache: `make twolayer` makes one")
		}
		path = found[0]
	}
	m, err := checkpoint.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	if m, err = m.Cut(min(2, m.Config.Layers)); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { m.Close() })
	return m
}

var operatorSets = []exporter.Operators{exporter.OperatorsPortable, exporter.OperatorsONNXRuntime}

// BenchmarkExport says how many bytes of weights per second are written.
func BenchmarkExport(b *testing.B) {
	m := fullWidth(b)
	for _, operators := range operatorSets {
		b.Run(string(operators), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "m.onnx")
			for b.Loop() {
				if err := exporter.Export(b.Context(), m, path, exporter.Options{Operators: operators}); err != nil {
					b.Fatal(err)
				}
			}
			info, err := os.Stat(path + ".data")
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(info.Size())
		})
	}
}

// BenchmarkLoad and BenchmarkRun are the cost of each operator set.
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
		if err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		for _, n := range []int{1, 16, 128} {
			b.Run(fmt.Sprintf("tokens=%d", n), func(b *testing.B) {
				tokens := make([]int32, n)
				for i := range tokens {
					tokens[i] = int32((i*7919 + 13) % vocabulary)
				}
				for b.Loop() {
					if _, err := s.Run(b.Context(), tokens); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	})
}

// eachGraph exports the model in both operator sets, with the last token's logits
// alone: those of all tokens would be most of the work of two layers.
func eachGraph(b *testing.B, run func(b *testing.B, path string, vocabulary int)) {
	m := fullWidth(b)
	for _, operators := range operatorSets {
		b.Run(string(operators), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "m.onnx")
			if err := exporter.Export(b.Context(), m, path, exporter.Options{Operators: operators, LastLogitsOnly: true}); err != nil {
				b.Fatal(err)
			}
			run(b, path, m.Config.VocabSize)
		})
	}
}
