package exporter

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// BenchmarkExport says how many bytes of graph and weights are written per second.
// toy128 is small, so that what an export does but for copying counts most here;
// `make bench-export` measures full width.
func BenchmarkExport(b *testing.B) {
	m, err := checkpoint.Open(fixtures.Dir("toy128"))
	require.NoError(b, err)
	b.Cleanup(func() { m.Close() })
	for _, operators := range []Operators{OperatorsPortable, OperatorsONNXRuntime} {
		b.Run(string(operators), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "m.onnx")
			for b.Loop() {
				if err := Export(b.Context(), m, path, Options{Operators: operators}); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(sizeOf(b, path) + sizeOf(b, path+".data"))
		})
	}
}

// BenchmarkCopy is what BenchmarkExport is compared with: the same files, copied.
func BenchmarkCopy(b *testing.B) {
	m, err := checkpoint.Open(fixtures.Dir("toy128"))
	require.NoError(b, err)
	b.Cleanup(func() { m.Close() })
	for _, operators := range []Operators{OperatorsPortable, OperatorsONNXRuntime} {
		b.Run(string(operators), func(b *testing.B) {
			path, _ := export(b, m, Options{Operators: operators})
			copied := filepath.Join(b.TempDir(), "copy")
			for b.Loop() {
				copyFile(b, path, copied)
				copyFile(b, path+".data", copied+".data")
			}
			b.SetBytes(sizeOf(b, path) + sizeOf(b, path+".data"))
		})
	}
}

func copyFile(b *testing.B, from, to string) {
	b.Helper()
	source, err := os.Open(from)
	require.NoError(b, err)
	defer source.Close()
	target, err := os.Create(to)
	require.NoError(b, err)
	_, err = io.Copy(target, source)
	require.NoError(b, err)
	require.NoError(b, target.Close())
}

func sizeOf(b *testing.B, path string) int64 {
	b.Helper()
	info, err := os.Stat(path)
	require.NoError(b, err)
	return info.Size()
}
