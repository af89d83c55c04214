package tensor

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// requireArrays checks the arrays that testdata/make.py writes.
func requireArrays(t *testing.T, got map[string]Tensor) {
	t.Helper()
	require.Len(t, got, 11)
	eighths := []float64{-0.25, -0.125, 0, 0.125, 0.25, 0.375}
	for name, dtype := range map[string]DType{"float64": F64, "float32": F32, "float16": F16, "bfloat16": BF16, "fortran": F32} {
		require.Equal(t, dtype, got[name].DType, name)
		require.Equal(t, []int{2, 3}, got[name].Shape, name)
		values, err := got[name].Float64s()
		require.NoError(t, err)
		require.Equal(t, eighths, values, name)
	}
	for name, dtype := range map[string]DType{"int32": I32, "int64": I64} {
		require.Equal(t, dtype, got[name].DType, name)
		values, err := got[name].Int32s()
		require.NoError(t, err)
		require.Equal(t, []int32{-2, -1, 0, 1, 2, 3}, values, name)
	}
	require.Equal(t, []byte{0, 1, 2, 3, 4, 5}, got["uint8"].Data)
	require.Equal(t, U8, got["uint8"].DType)
	cube, err := got["cube"].Int32s()
	require.NoError(t, err)
	for i, v := range cube {
		require.Equal(t, int32(i), v)
	}
	require.Equal(t, []int{2, 3, 4}, got["cube"].Shape)
	scalar, err := got["scalar"].Float32s()
	require.NoError(t, err)
	require.Equal(t, []float32{-0.25}, scalar)
	require.Empty(t, got["scalar"].Shape)
	require.Equal(t, []int{0, 3}, got["empty"].Shape)
	require.Empty(t, got["empty"].Data)
}

func TestFilesOfTheRealLibraries(t *testing.T) {
	for _, name := range []string{"stored.npz", "deflated.npz"} {
		got, err := ReadNPZ(filepath.Join("testdata", name))
		require.NoError(t, err)
		requireArrays(t, got)
	}
	got, err := ReadSafetensors(filepath.Join("testdata", "torch.safetensors"))
	require.NoError(t, err)
	requireArrays(t, got)
	for _, name := range []string{"float32.npy", "fortran.npy"} {
		got, err := ReadNPY(filepath.Join("testdata", name))
		require.NoError(t, err)
		values, err := got.Float32s()
		require.NoError(t, err)
		require.Equal(t, []float32{-0.25, -0.125, 0, 0.125, 0.25, 0.375}, values)
	}
}

// npy puts an array together from its dictionary.
func npy(dictionary string, body int) []byte {
	data := append([]byte(npyMagic), 1, 0)
	data = binary.LittleEndian.AppendUint16(data, uint16(len(dictionary)))
	return append(append(data, dictionary...), make([]byte, body)...)
}

func TestNPYRefusals(t *testing.T) {
	dictionary := func(descr, order, shape string) string {
		return fmt.Sprintf("{'descr': %s, 'fortran_order': %s, 'shape': %s, }", descr, order, shape)
	}
	right := dictionary("'<f4'", "False", "(1,)")
	for _, test := range []struct {
		name string
		data []byte
		want string
	}{
		{"empty", nil, "magic"},
		{"text", []byte("hello, this is no array"), "magic"},
		{"version 9", append([]byte(npyMagic+"\x09\x00\x02\x00{}"), 0), "version 9"},
		{"cut in the header", npy(right, 4)[:20], "cut short"},
		{"version 2 cut", []byte(npyMagic + "\x02\x00\x01\x00\x00"), "cut short"},
		{"version 2 with a huge header", append([]byte(npyMagic+"\x02\x00\xff\xff\xff\xff"), 0, 0), "at most"},
		{"cut in the data", npy(right, 3), "takes"},
		{"too long", npy(right, 5), "takes"},
		{"no dictionary", npy("('<f4', False, (1,))", 4), "not a dictionary"},
		{"a key twice", npy("{'shape': (1,), 'shape': (1,), 'descr': '<f4', 'fortran_order': False}", 4), "not a dictionary"},
		{"another key", npy("{'x': 1}", 4), `key "x"`},
		{"a key missing", npy("{'descr': '<f4', 'shape': (1,)}", 4), "not a dictionary with the keys"},
		{"text after it", npy(right+"x", 4), "not a dictionary"},
		{"structured dtype", npy(dictionary("[('a', '<f4')]", "False", "(1,)"), 4), "plain dtype"},
		{"object dtype", npy(dictionary("'|O'", "False", "(1,)"), 8), `dtype "|O"`},
		{"big-endian", npy(dictionary("'>f4'", "False", "(1,)"), 4), "big-endian"},
		{"order is a number", npy(dictionary("'<f4'", "0", "(1,)"), 4), "neither True nor False"},
		{"negative size", npy(dictionary("'<f4'", "False", "(-1,)"), 4), "shape is not a tuple"},
		{"shape is a list", npy(dictionary("'<f4'", "False", "[1]"), 4), "shape is not a tuple"},
		{"open shape", npy("{'shape': (1,", 4), "shape is not a tuple"},
		{"overflow", npy(dictionary("'<f4'", "False", "(4294967296, 4294967296)"), 0), "too large"},
		{"nine dimensions", npy(dictionary("'<f4'", "False", "(1, 1, 1, 1, 1, 1, 1, 1, 1)"), 4), "shape is not a tuple"},
		{"petabytes", npy(dictionary("'<f4'", "False", "(1099511627776,)"), 4), "but there are"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a.npy")
			require.NoError(t, os.WriteFile(path, test.data, 0o666))
			_, err := ReadNPY(path)
			require.ErrorContains(t, err, test.want)
			assert.Contains(t, err.Error(), path)
		})
	}
}

// archive makes a zip file; a method of 0 stores.
func archive(t testing.TB, method uint16, entries ...any) []byte {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for i := 0; i < len(entries); i += 2 {
		f, err := w.CreateHeader(&zip.FileHeader{Name: entries[i].(string), Method: method})
		require.NoError(t, err)
		_, err = f.Write(entries[i+1].([]byte))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func TestNPZRefusals(t *testing.T) {
	one := npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", 4)
	damaged := archive(t, zip.Store, "a.npy", one)
	damaged[bytes.Index(damaged, one)+len(one)-1] ^= 1
	whole := archive(t, zip.Store, "a.npy", one)
	for _, test := range []struct {
		name string
		data []byte
		want string
	}{
		{"empty", nil, "not a .npz"},
		{"text", []byte("hello"), "not a .npz"},
		{"cut", whole[:len(whole)-30], "not a .npz"},
		{"another file inside", archive(t, zip.Deflate, "readme.txt", one), "is no .npy array"},
		{"a name twice", archive(t, zip.Deflate, "a.npy", one, "a.npy", one), "occurs twice"},
		{"no array inside", archive(t, zip.Deflate, "a.npy", []byte("hello, this is no array")), `tensor "a": not a .npy array`},
		{"array too short", archive(t, zip.Deflate, "a.npy", one[:len(one)-1]), "takes"},
		{"wrong checksum", damaged, "checksum"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a.npz")
			require.NoError(t, os.WriteFile(path, test.data, 0o666))
			_, err := ReadNPZ(path)
			require.ErrorContains(t, err, test.want)
			assert.Contains(t, err.Error(), path)
		})
	}
	t.Run("bomb", func(t *testing.T) {
		// One array of 64 MiB of zeros, and 20 times the same compressed bytes:
		// more than 1 GiB and 64 times the file.
		zeros := npy(fmt.Sprintf("{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }", 64<<20), 64<<20)
		small := archive(t, zip.Deflate, "a.npy", zeros)
		r, err := zip.NewReader(bytes.NewReader(small), int64(len(small)))
		require.NoError(t, err)
		var b bytes.Buffer
		w := zip.NewWriter(&b)
		for i := range 20 {
			header := r.File[0].FileHeader
			header.Name = fmt.Sprintf("%d.npy", i)
			to, err := w.CreateRaw(&header)
			require.NoError(t, err)
			from, err := r.File[0].OpenRaw()
			require.NoError(t, err)
			_, err = io.Copy(to, from)
			require.NoError(t, err)
		}
		require.NoError(t, w.Close())
		require.Less(t, b.Len(), 2<<20)
		_, err = readNPZ(bytes.NewReader(b.Bytes()), int64(b.Len()))
		require.ErrorContains(t, err, "unpacks to more")
	})
}

func TestNPZDamage(t *testing.T) {
	whole, err := os.ReadFile(filepath.Join("testdata", "deflated.npz"))
	require.NoError(t, err)
	for n := range whole {
		_, err := readNPZ(bytes.NewReader(whole[:n]), int64(n))
		require.Error(t, err, "cut at byte %d", n)
	}
	for at := range whole {
		damaged := bytes.Clone(whole)
		damaged[at] ^= 1 << (at % 8)
		if got, err := readNPZ(bytes.NewReader(damaged), int64(len(damaged))); err == nil {
			for name, tensor := range got { // zip has fields that nobody reads
				require.NoError(t, tensor.Check(), name)
			}
		}
	}
}
