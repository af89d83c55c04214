package tensor

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// seed adds the files of the real libraries to a fuzz target.
func seed(f *testing.F, pattern string) {
	paths, err := filepath.Glob(filepath.Join("testdata", pattern))
	require.NoError(f, err)
	require.NotEmpty(f, paths)
	for _, path := range paths {
		data, err := os.ReadFile(path)
		require.NoError(f, err)
		f.Add(data)
	}
}

func FuzzSafetensors(f *testing.F) {
	seed(f, "*.safetensors")
	f.Fuzz(func(t *testing.T, data []byte) {
		names, tensors, _, err := parseSafetensors(data)
		if err != nil {
			return
		}
		require.Len(t, tensors, len(names))
		total := 0
		for name, tensor := range tensors {
			require.NoError(t, tensor.Check(), name)
			total += len(tensor.Data)
		}
		require.LessOrEqual(t, total, len(data))
	})
}

func FuzzNPZ(f *testing.F) {
	seed(f, "*.npz")
	f.Fuzz(func(t *testing.T, data []byte) {
		tensors, err := readNPZ(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		for name, tensor := range tensors {
			require.NoError(t, tensor.Check(), name)
		}
	})
}

func FuzzNPY(f *testing.F) {
	seed(f, "*.npy")
	f.Fuzz(func(t *testing.T, data []byte) {
		tensor, err := readNPY(bytes.NewReader(data), int64(len(data)))
		if err == nil {
			require.NoError(t, tensor.Check())
		}
	})
}
