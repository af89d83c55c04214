package tensor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func write(t testing.TB, data []byte) string {
	path := filepath.Join(t.TempDir(), "a.safetensors")
	require.NoError(t, os.WriteFile(path, data, 0o666))
	return path
}

// file puts a safetensors file together from its parts.
func file(header string, body int) []byte {
	data := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(data, header...), make([]byte, body)...)
}

func examples() []Named {
	return []Named{
		{"b", FromFloat32s([]int{2, 3}, []float32{1, 2, 3, 4, 5, 6})},
		{"a", FromBFloat16s([]int{3}, []float32{-1, 0.5, 3})},
		{"empty", FromFloat64s([]int{0, 4}, nil)},
		{"scalar <&>", FromInt32s(nil, []int32{-7})},
		{"bytes", Tensor{U8, []int{5}, []byte{1, 2, 3, 4, 5}}},
	}
}

func TestSafetensorsRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.safetensors")
	metadata := map[string]string{"z": "1", "a": "\"quoted\" <tag>"}
	require.NoError(t, WriteSafetensors(path, examples(), metadata))

	f, err := OpenSafetensors(path)
	require.NoError(t, err)
	assert.Equal(t, []string{"b", "a", "empty", "scalar <&>", "bytes"}, f.Names())
	assert.Equal(t, metadata, f.Metadata())
	for _, want := range examples() {
		got, ok := f.Tensor(want.Name)
		require.True(t, ok, want.Name)
		assert.Equal(t, want.DType, got.DType)
		assert.Equal(t, append([]int{}, want.Shape...), got.Shape)
		assert.Equal(t, append([]byte{}, want.Data...), append([]byte{}, got.Data...))
		require.NoError(t, got.Check())
	}
	_, ok := f.Tensor("c")
	assert.False(t, ok)
	require.NoError(t, f.Close())
	require.NoError(t, f.Close())

	data, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Zero(t, (lengthBytes+binary.LittleEndian.Uint64(data))%8, "the data is aligned")
	again := filepath.Join(t.TempDir(), "y.safetensors")
	require.NoError(t, WriteSafetensors(again, examples(), metadata))
	second, err := os.ReadFile(again)
	require.NoError(t, err)
	assert.Equal(t, data, second, "the same input gives the same bytes")

	all, err := ReadSafetensors(path)
	require.NoError(t, err)
	assert.Len(t, all, 5)
	values, err := all["a"].Float32s()
	require.NoError(t, err)
	assert.Equal(t, []float32{-1, 0.5, 3}, values)
}

func TestSafetensorsWithoutTensors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.safetensors")
	require.NoError(t, WriteSafetensors(path, nil, nil))
	f, err := OpenSafetensors(path)
	require.NoError(t, err)
	defer f.Close()
	assert.Empty(t, f.Names())
}

func TestSafetensorsCarriesUnknownMeaning(t *testing.T) {
	f, err := OpenSafetensors(write(t, file(`{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"F4","shape":[2],"data_offsets":[4,5]}}`, 5)))
	require.NoError(t, err)
	defer f.Close()
	a, _ := f.Tensor("a")
	assert.Equal(t, DType("F8_E8M0"), a.DType)
	_, err = a.Float64s()
	require.ErrorContains(t, err, "holds F8_E8M0, not reals")
}

func TestSafetensorsRefusals(t *testing.T) {
	entry := func(dtype, shape, offsets string) string {
		return `{"a":{"dtype":` + dtype + `,"shape":` + shape + `,"data_offsets":` + offsets + `}}`
	}
	f32 := func(offsets string) string { return `{"dtype":"F32","shape":[1],"data_offsets":` + offsets + `}` }
	for _, test := range []struct {
		name string
		data []byte
		want string
	}{
		{"empty file", nil, "empty"},
		{"seven bytes", make([]byte, 7), "only 7 bytes"},
		{"no header", make([]byte, 8), "does not start with '{'"},
		{"length beyond the file", file(`{}`, 0)[:9], "cut short"},
		{"length of 2^64-1", bytes.Repeat([]byte{0xff}, 64), "cut short"},
		{"header too long", append(binary.LittleEndian.AppendUint64(nil, maxHeaderBytes+1), make([]byte, maxHeaderBytes+1)...), "at most"},
		{"not an object", file(`[]`, 0), "does not start with '{'"},
		{"leading space", file(` {}`, 0), "does not start with '{'"},
		{"cut JSON", file(`{"a":`, 0), "not valid JSON"},
		{"text after the object", file(`{}x`, 0), "not valid JSON"},
		{"entry is a number", file(`{"a":1}`, 0), `tensor "a": is a number, not an object`},
		{"no dtype", file(`{"a":{"shape":[],"data_offsets":[0,0]}}`, 0), "needs dtype, shape and two data_offsets"},
		{"empty entry", file(`{"a":{}}`, 0), "needs dtype"},
		{"another key", file(`{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}`, 4), `key "x"`},
		{"duplicate key", file(`{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}`, 4), `key "shape" occurs twice`},
		{"duplicate tensor", file(`{"a":`+f32("[0,4]")+`,"a":`+f32("[4,8]")+`}`, 8), `key "a" occurs twice`},
		{"unknown dtype", file(entry(`"F31"`, "[1]", "[0,4]"), 4), `dtype "F31" is not known`},
		{"dtype is a number", file(entry(`32`, "[1]", "[0,4]"), 4), "not a string"},
		{"negative dimension", file(entry(`"F32"`, "[-1]", "[0,4]"), 4), "negative dimension"},
		{"two negative dimensions", file(entry(`"F32"`, "[-1,-1]", "[0,4]"), 4), "negative dimension"},
		{"fractional dimension", file(entry(`"F32"`, "[1.0]", "[0,4]"), 4), "not an integer"},
		{"overflow", file(entry(`"F32"`, "[4294967296,4294967296]", "[0,0]"), 0), "too large"},
		{"overflow to the right size", file(entry(`"F32"`, "[4611686018427387905]", "[0,4]"), 4), "too large"},
		{"nine dimensions", file(entry(`"F32"`, "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4), "dimensions"},
		{"shape too small", file(entry(`"F32"`, "[1]", "[0,8]"), 8), "takes 4 bytes"},
		{"shape too large", file(entry(`"F32"`, "[3]", "[0,8]"), 8), "takes 12 bytes"},
		{"half a byte", file(entry(`"F4"`, "[3]", "[0,1]"), 1), "whole number of bytes"},
		{"one offset", file(entry(`"F32"`, "[1]", "[0]"), 4), "two data_offsets"},
		{"three offsets", file(entry(`"F32"`, "[1]", "[0,4,4]"), 4), "more than two"},
		{"backwards", file(entry(`"F32"`, "[1]", "[4,0]"), 4), "no range"},
		{"negative offset", file(entry(`"F32"`, "[1]", "[-4,0]"), 4), "no range"},
		{"beyond the file", file(entry(`"F32"`, "[2]", "[0,8]"), 4), "cut short"},
		{"overlap", file(`{"a":`+f32("[0,4]")+`,"b":`+f32("[2,6]")+`}`, 6), `tensor "b" overlaps "a"`},
		{"the same bytes twice", file(`{"a":`+f32("[0,4]")+`,"b":`+f32("[0,4]")+`}`, 4), "overlaps"},
		{"gap", file(`{"a":`+f32("[0,4]")+`,"b":`+f32("[8,12]")+`}`, 12), "4 bytes before tensor"},
		{"gap at the start", file(`{"a":`+f32("[4,8]")+`}`, 8), "4 bytes before tensor"},
		{"rest", file(`{"a":`+f32("[0,4]")+`}`, 5), "1 bytes after the last tensor"},
		{"metadata is a list", file(`{"__metadata__":[]}`, 0), "__metadata__: is an array"},
		{"metadata holds a number", file(`{"__metadata__":{"a":1}}`, 0), "__metadata__: is a number, not a string"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := write(t, test.data)
			_, err := OpenSafetensors(path)
			require.ErrorContains(t, err, test.want)
			assert.Contains(t, err.Error(), path)
			assert.NotContains(t, err.Error(), "\n")
			_, err = ReadSafetensors(path)
			require.Error(t, err)
		})
	}
}

func TestSafetensorsNotAFile(t *testing.T) {
	_, err := OpenSafetensors(t.TempDir())
	require.ErrorContains(t, err, "not a regular file")
	_, err = OpenSafetensors(filepath.Join(t.TempDir(), "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

// Every cut and every change of one header byte is refused, or leaves a file
// whose tensors have the bytes that they had.
func TestSafetensorsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.safetensors")
	require.NoError(t, WriteSafetensors(path, examples(), map[string]string{"k": "v"}))
	whole, err := os.ReadFile(path)
	require.NoError(t, err)
	for n := range whole {
		_, _, _, err := parseSafetensors(whole[:n])
		require.Error(t, err, "cut at byte %d", n)
	}
	header := lengthBytes + int(binary.LittleEndian.Uint64(whole))
	for at := range header {
		damaged := bytes.Clone(whole)
		for _, b := range []byte{0, ' ', '"', '0', '9', 0xff, whole[at] ^ 1, whole[at] ^ 0x80} {
			damaged[at] = b
			names, tensors, _, err := parseSafetensors(damaged)
			if err == nil {
				total := 0
				for _, name := range names {
					require.NoError(t, tensors[name].Check())
					total += len(tensors[name].Data)
				}
				require.Equal(t, len(whole)-header, total)
			}
		}
	}
}

func TestStreamSafetensors(t *testing.T) {
	ones := func(n int) func(context.Context, io.Writer) error {
		return func(_ context.Context, w io.Writer) error {
			for range n {
				if _, err := w.Write([]byte{1}); err != nil {
					return err
				}
			}
			return nil
		}
	}
	failure := errors.New("no more")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name    string
		ctx     context.Context
		streams []Stream
		want    string
	}{
		{"right", t.Context(), []Stream{{"a", U8, []int{3}, ones(3)}, {"b", F32, []int{1}, ones(4)}}, ""},
		{"too few bytes", t.Context(), []Stream{{"a", U8, []int{3}, ones(2)}}, `tensor "a" ended 1 bytes early`},
		{"too many bytes", t.Context(), []Stream{{"a", U8, []int{3}, ones(4)}}, "more bytes than dtype and shape say"},
		{"failing source", t.Context(), []Stream{{"a", U8, []int{3}, func(context.Context, io.Writer) error { return failure }}}, "no more"},
		{"cancelled", cancelled, []Stream{{"a", U8, []int{3}, ones(3)}}, "canceled"},
		{"duplicate", t.Context(), []Stream{{"a", U8, []int{0}, ones(0)}, {"a", U8, []int{0}, ones(0)}}, "occurs twice"},
		{"reserved name", t.Context(), []Stream{{metadataKey, U8, []int{0}, ones(0)}}, "reserved"},
		{"invalid name", t.Context(), []Stream{{"\xff", U8, []int{0}, ones(0)}}, "UTF-8"},
		{"unknown dtype", t.Context(), []Stream{{"a", "F31", []int{0}, ones(0)}}, "not known"},
		{"negative", t.Context(), []Stream{{"a", U8, []int{-1}, ones(0)}}, "negative"},
		{"nine dimensions", t.Context(), []Stream{{"a", U8, make([]int, 9), ones(0)}}, "dimensions"},
	} {
		t.Run(test.name, func(t *testing.T) {
			directory := t.TempDir()
			path := filepath.Join(directory, "x.safetensors")
			err := StreamSafetensors(test.ctx, path, test.streams, nil)
			entries, listErr := os.ReadDir(directory)
			require.NoError(t, listErr)
			if test.want != "" {
				require.ErrorContains(t, err, test.want)
				assert.Empty(t, entries, "nothing is left behind")
				return
			}
			require.NoError(t, err)
			assert.Len(t, entries, 1)
			_, err = ReadSafetensors(path)
			require.NoError(t, err)
		})
	}
}

func TestWriteSafetensorsChecksSizes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.safetensors")
	err := WriteSafetensors(path, []Named{{"a", Tensor{F32, []int{2}, make([]byte, 4)}}}, nil)
	require.ErrorContains(t, err, "has 4 bytes, but F32 [2] takes 8")
	assert.NoFileExists(t, path)
}

func TestHugeHeaderIsNotAllocated(t *testing.T) {
	// 15 MB of header that is one string: refused because it names no tensor.
	_, _, _, err := parseSafetensors(file(`{"`+strings.Repeat("a", 15<<20)+`":1}`, 0))
	require.Error(t, err)
	assert.Less(t, len(err.Error()), 1000, "the message does not repeat the name")
}
