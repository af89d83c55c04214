package atomicfile

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func names(t *testing.T, directory string) []string {
	entries, err := os.ReadDir(directory)
	require.NoError(t, err)
	out := []string{}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestCommit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	require.NoError(t, Write(t.Context(), path, []byte("old")))
	f, err := Create(t.Context(), path)
	require.NoError(t, err)
	defer f.Close()
	_, err = f.Write([]byte("new"))
	require.NoError(t, err)
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, "old", string(got), "the old file stays until the new one is complete")
	require.NoError(t, f.Commit())
	got, err = os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, "new", string(got))
	assert.Equal(t, []string{"a"}, names(t, filepath.Dir(path)))
	info, err := os.Stat(path)
	require.NoError(t, err)
	plain := filepath.Join(t.TempDir(), "plain")
	require.NoError(t, os.WriteFile(plain, nil, 0o666))
	want, err := os.Stat(plain)
	require.NoError(t, err)
	assert.Equal(t, want.Mode(), info.Mode(), "the mode that the umask gives")
}

func TestCloseLeavesNothing(t *testing.T) {
	directory := t.TempDir()
	f, err := Create(t.Context(), filepath.Join(directory, "a"))
	require.NoError(t, err)
	f.Close()
	f.Close()
	assert.Empty(t, names(t, directory))
}

func TestCancelledContext(t *testing.T) {
	directory := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	f, err := Create(ctx, filepath.Join(directory, "a"))
	require.NoError(t, err)
	cancel()
	_, err = f.Write([]byte("x"))
	require.ErrorIs(t, err, context.Canceled)
	_, err = f.WriteAt([]byte("x"), 3)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, f.Commit(), context.Canceled)
	f.Close()
	assert.Empty(t, names(t, directory))
	require.ErrorIs(t, Write(ctx, filepath.Join(directory, "a"), nil), context.Canceled)
}

func TestMissingDirectory(t *testing.T) {
	require.Error(t, Write(t.Context(), filepath.Join(t.TempDir(), "no", "a"), nil))
}
