package tensor

import (
	"archive/zip"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestFilesOfOtherKinds: a file of another kind under a wrong name is called what
// it is, and not a file with a header of 10^18 bytes.
func TestFilesOfOtherKinds(t *testing.T) {
	array := npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", 4)
	torch := archive(t, zip.Store, "model/data.pkl", []byte("\x80\x02}q\x00."), "model/data/0", make([]byte, 4))
	for _, test := range []struct {
		name             string
		data             []byte
		safetensors, npz string // what the errors say
	}{
		{"npy", array, "numpy.load", "numpy.load"},
		{"npz", archive(t, zip.Deflate, "logits.npy", array), "NumPy's .npz", ""},
		{"torch.save", torch, "torch.save", "torch.save"},
		{"old torch.save", []byte("\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."), "pickle", "pickle"},
		{"pickle 4", []byte("\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94."), "pickle", "pickle"},
		{"zip", archive(t, zip.Deflate, "readme.txt", []byte("hello")), "zip file", "is no .npy array"},
		{"safetensors", file("{}", 0), "", "let its name end in .safetensors"},
		{"cut zip", torch[:20], "zip file", "cut short"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := write(t, test.data)
			says := func(err error, want string) {
				t.Helper()
				if want == "" {
					require.NoError(t, err)
					return
				}
				require.ErrorContains(t, err, want)
				assert.Contains(t, err.Error(), path)
				assert.NotContains(t, err.Error(), "\n")
			}
			f, err := OpenSafetensors(path)
			says(err, test.safetensors)
			if err == nil {
				require.NoError(t, f.Close())
			}
			_, err = ReadNPZ(path)
			says(err, test.npz)
		})
	}
}

// TestAHeaderLikeAPickle: a safetensors file whose header's length happens to
// start as a pickle does is read all the same.
func TestAHeaderLikeAPickle(t *testing.T) {
	header := "{}" + strings.Repeat(" ", 0x380-2)
	data := file(header, 0)
	require.Equal(t, byte(0x80), data[0])
	require.Equal(t, byte(3), data[1])
	_, _, _, err := parseSafetensors(data)
	require.NoError(t, err)
}

// TestIntegersOfEverySize are read alike.
func TestIntegersOfEverySize(t *testing.T) {
	for dtype, size := range map[DType]int{I64: 8, I32: 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, U8: 1} {
		store := func(v int64) Tensor {
			data := binary.LittleEndian.AppendUint64(nil, uint64(v))
			return Tensor{dtype, []int{2}, append(data[:size:size], data[:size]...)}
		}
		got, err := store(127).Int32s()
		require.NoError(t, err, dtype)
		assert.Equal(t, []int32{127, 127}, got, dtype)

		got, err = store(-1).Int32s()
		switch dtype {
		case "U64", "U32":
			assert.ErrorContains(t, err, "more than int32 can hold", dtype)
		case "U16", U8:
			require.NoError(t, err, dtype)
			assert.Equal(t, []int32{1<<(8*size) - 1, 1<<(8*size) - 1}, got, dtype)
		default:
			require.NoError(t, err, dtype)
			assert.Equal(t, []int32{-1, -1}, got, dtype)
		}
	}
	for _, dtype := range []DType{F32, "BOOL"} {
		_, err := Tensor{dtype, []int{1}, make([]byte, 4)}.Int32s()
		assert.ErrorContains(t, err, "not integers (I32", dtype)
	}
}
