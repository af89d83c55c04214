package library

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPathPrefersTheEnvironment(t *testing.T) {
	own := filepath.Join(t.TempDir(), "own.so")
	require.NoError(t, os.WriteFile(own, []byte("library"), 0o644))
	t.Setenv(EnvLibrary, own)
	got, err := Path()
	require.NoError(t, err)
	require.Equal(t, own, got)

	t.Setenv(EnvLibrary, own+".missing")
	_, err = Path()
	require.ErrorContains(t, err, EnvLibrary)
	require.ErrorIs(t, err, os.ErrNotExist)

	t.Setenv(EnvLibrary, filepath.Dir(own))
	_, err = Path()
	require.ErrorContains(t, err, "is not a file")
}

func TestMissingLibrarySaysWhatToRun(t *testing.T) {
	t.Setenv(EnvLibrary, "")
	t.Setenv(EnvCache, t.TempDir())
	_, err := Path()
	require.ErrorContains(t, err, "make onnxruntime")
	require.NotContains(t, err.Error(), "\n")
}

func TestCachedPathHoldsTheVersion(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(EnvCache, dir)
	path, err := CachedPath()
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(path, dir), path)
	require.Contains(t, filepath.Dir(path), Version)
}

func TestEveryPinIsComplete(t *testing.T) {
	require.NotEmpty(t, pins)
	for platform, pin := range pins {
		require.Len(t, pin.SHA256, 64, platform)
		require.Len(t, pin.WheelSHA256, 64, platform)
		require.Contains(t, pin.Member, Version, platform)
	}
	_, err := PinFor("plan9", "mips")
	require.ErrorContains(t, err, "plan9/mips")
}

func TestVerify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "abc")
	require.NoError(t, os.WriteFile(path, []byte("abc"), 0o644))
	// FIPS 180-2, appendix B.1: the digest of "abc".
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	require.NoError(t, Verify(path, abc))
	require.NoError(t, os.WriteFile(path, []byte("abd"), 0o644))
	require.ErrorContains(t, Verify(path, abc), "want "+abc)
}
