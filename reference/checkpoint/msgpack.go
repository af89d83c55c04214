package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Flax's msgpack (flax/serialization.py): maps with string keys, whose leaves
// are extensions. The payload of an array is itself msgpack: [shape, dtype's
// name, the bytes in C order].
const (
	extArray   = 1
	extComplex = 2
	extScalar  = 3 // a NumPy scalar, stored like an array of shape []

	// An array of more than 2^30 bytes is a map with this key (true), "shape"
	// and "chunks", each of them a map with the keys "0", "1", ...
	chunkedKey = "__msgpack_chunked_array__"

	// Far more than a bundle of gpt-oss has (5 levels, 36·15 + 3 arrays).
	maxMsgpackDepth  = 16
	maxMsgpackArrays = 1 << 16
	maxMsgpackKey    = 256
	maxChunks        = 1 << 12
)

// flaxArray is an array with the path of keys that leads to it.
type flaxArray struct {
	name string // joined by "/"
	tensor.Tensor
	chunks [][]byte
}

// flaxTypes has NumPy's and ml_dtypes' names of what weights are stored as, and
// of what else may stand beside them.
var flaxTypes = map[string]tensor.DType{
	"bfloat16": tensor.BF16, "float32": tensor.F32, "float16": tensor.F16, "float64": tensor.F64,
	"int32": tensor.I32, "int64": tensor.I64, "uint8": tensor.U8, "bool": "BOOL",
	"uint32": "U32", "int8": "I8",
}

// msgpackIndexer walks through a bundle without reading the arrays.
type msgpackIndexer struct {
	data   []byte
	reader *bytes.Reader
	*msgpack.Decoder
	arrays []flaxArray
}

// indexMsgpack finds the arrays of a bundle in one pass, in the order of the
// file. They are views of data. Lengths are compared with what is left before
// anything is made of them.
func indexMsgpack(data []byte) ([]flaxArray, error) {
	x := newIndexer(data)
	code, err := x.PeekCode()
	if err != nil || !isMap(code) {
		return nil, errors.New("not a Flax bundle: it does not start with a map")
	}
	if err := x.walk("", 0); err != nil {
		return nil, err
	}
	if x.reader.Len() > 0 {
		return nil, fmt.Errorf("%d bytes after the bundle", x.reader.Len())
	}
	return x.arrays, nil
}

func newIndexer(data []byte) *msgpackIndexer {
	r := bytes.NewReader(data)
	return &msgpackIndexer{data: data, reader: r, Decoder: msgpack.NewDecoder(r)}
}

func isMap(code byte) bool {
	return msgpcode.IsFixedMap(code) || code == msgpcode.Map16 || code == msgpcode.Map32
}

// position returns how many bytes were read.
func (x *msgpackIndexer) position() int { return len(x.data) - x.reader.Len() }

// skip steps over bytes that must be there, and returns them.
func (x *msgpackIndexer) skip(n int) ([]byte, error) {
	at := x.position()
	if n < 0 || n > x.reader.Len() {
		return nil, fmt.Errorf("cut short: %d bytes should follow at byte %d, %d are left", n, at, x.reader.Len())
	}
	_, err := x.reader.Seek(int64(n), io.SeekCurrent)
	return x.data[at : at+n : at+n], err
}

// text reads a short string.
func (x *msgpackIndexer) text() (string, error) {
	at := x.position()
	n, err := x.DecodeBytesLen()
	if err != nil {
		return "", fmt.Errorf("no string at byte %d", at)
	}
	if n < 0 || n > maxMsgpackKey {
		return "", fmt.Errorf("the string at byte %d has %d bytes; at most %d are accepted", at, n, maxMsgpackKey)
	}
	s, err := x.skip(n)
	return string(s), err
}

// object calls field for every member of a map, which must not repeat a key.
func (x *msgpackIndexer) object(field func(key string) error) error {
	n, err := x.DecodeMapLen()
	if err != nil {
		return err
	}
	// Every member takes at least two bytes.
	if n < 0 || n > x.reader.Len()/2 {
		return fmt.Errorf("cut short: a map of %d members with %d bytes left", n, x.reader.Len())
	}
	seen := map[string]bool{}
	for range n {
		key, err := x.text()
		if err != nil {
			return fmt.Errorf("a key: %w", err)
		}
		if seen[key] {
			return fmt.Errorf("key %q occurs twice", key)
		}
		seen[key] = true
		if err := field(key); err != nil {
			return err
		}
	}
	return nil
}

// walk reads one value: a map, or an array under the name.
func (x *msgpackIndexer) walk(name string, depth int) error {
	if depth > maxMsgpackDepth {
		return fmt.Errorf("%q nests more than %d levels", name, maxMsgpackDepth)
	}
	code, err := x.PeekCode()
	if err != nil {
		return fmt.Errorf("%q: cut short", name)
	}
	if !isMap(code) {
		t, err := x.array()
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		return x.append(flaxArray{name, t, nil})
	}
	if depth > 0 && x.chunked() {
		a, err := x.pieces()
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		a.name = name
		return x.append(a)
	}
	return x.object(func(key string) error {
		if name != "" {
			key = name + "/" + key
		}
		return x.walk(key, depth+1)
	})
}

func (x *msgpackIndexer) append(a flaxArray) error {
	if len(x.arrays) == maxMsgpackArrays {
		return fmt.Errorf("has more than %d arrays", maxMsgpackArrays)
	}
	x.arrays = append(x.arrays, a)
	return nil
}

// array reads an array or a NumPy scalar.
func (x *msgpackIndexer) array() (tensor.Tensor, error) {
	var t tensor.Tensor
	code, err := x.PeekCode()
	if err != nil {
		return t, errors.New("cut short")
	}
	if !msgpcode.IsExt(code) {
		return t, fmt.Errorf("is no array (msgpack code %#x)", code)
	}
	id, n, err := x.DecodeExtHeader()
	if err != nil {
		return t, errors.New("cut short")
	}
	payload, err := x.skip(n)
	if err != nil {
		return t, err
	}
	switch id {
	case extArray, extScalar:
	case extComplex:
		return t, errors.New("is a complex number")
	default:
		return t, fmt.Errorf("is a msgpack extension of type %d, which Flax does not write", id)
	}
	p := newIndexer(payload)
	if n, err := p.DecodeArrayLen(); err != nil || n != 3 {
		return t, errors.New("is no array of shape, dtype and bytes")
	}
	n, err = p.DecodeArrayLen()
	if err != nil || n < 0 || n > 8 {
		return t, errors.New("has no shape of at most 8 dimensions")
	}
	t.Shape = make([]int, n)
	for i := range t.Shape {
		if t.Shape[i], err = p.DecodeInt(); err != nil {
			return t, errors.New("has a shape that is not made of integers")
		}
	}
	dtype, err := p.text()
	if err != nil {
		return t, fmt.Errorf("dtype: %w", err)
	}
	var ok bool
	if t.DType, ok = flaxTypes[dtype]; !ok {
		return t, fmt.Errorf("dtype %.20q is not known", dtype)
	}
	n, err = p.DecodeBytesLen()
	if err != nil {
		return t, errors.New("has no bytes")
	}
	if t.Data, err = p.skip(n); err != nil {
		return t, err
	}
	if p.reader.Len() > 0 {
		return t, fmt.Errorf("has %d bytes too many", p.reader.Len())
	}
	return t, t.Check()
}

// chunked reports whether the map that comes next is an array in pieces. Only
// the keys are looked at.
func (x *msgpackIndexer) chunked() bool {
	// A copy that can be thrown away: the first key of such a map is the mark,
	// because Flax writes it first, and Python keeps the order.
	p := newIndexer(x.data[x.position():])
	n, err := p.DecodeMapLen()
	if err != nil || n < 1 {
		return false
	}
	key, err := p.text()
	return err == nil && key == chunkedKey
}

// pieces reads an array in pieces.
func (x *msgpackIndexer) pieces() (flaxArray, error) {
	var a flaxArray
	var flat []tensor.Tensor
	have := map[string]bool{}
	err := x.object(func(key string) error {
		have[key] = true
		switch key {
		case chunkedKey:
			if is, err := x.DecodeBool(); err != nil || !is {
				return fmt.Errorf("%s is not true", chunkedKey)
			}
			return nil
		case "shape":
			a.Shape = []int{}
			return x.numbered(func() error {
				n, err := x.DecodeInt()
				a.Shape = append(a.Shape, n)
				if len(a.Shape) > 8 {
					return errors.New("has more than 8 dimensions")
				}
				return err
			})
		case "chunks":
			return x.numbered(func() error {
				t, err := x.array()
				if err == nil && (len(t.Shape) != 1 || len(t.Data) == 0) {
					err = fmt.Errorf("a chunk has shape %v", t.Shape)
				}
				if len(flat) > maxChunks {
					err = fmt.Errorf("has more than %d chunks", maxChunks)
				}
				flat = append(flat, t)
				return err
			})
		}
		return fmt.Errorf("a chunked array has no key %q", key)
	})
	if err != nil {
		return a, err
	}
	if !have["shape"] || len(flat) == 0 {
		return a, errors.New("a chunked array needs shape and chunks")
	}
	a.DType = flat[0].DType
	total := 0
	for i, t := range flat {
		if t.DType != a.DType {
			return a, fmt.Errorf("has chunks of %s and %s", a.DType, t.DType)
		}
		if i < len(flat)-1 && len(t.Data) != len(flat[0].Data) || len(t.Data) > len(flat[0].Data) {
			return a, errors.New("has chunks of different sizes")
		}
		a.chunks = append(a.chunks, t.Data)
		total += len(t.Data)
	}
	return a, tensor.Tensor{DType: a.DType, Shape: a.Shape}.CheckSize(total)
}

// numbered reads a map with the keys "0", "1", ... in this order.
func (x *msgpackIndexer) numbered(element func() error) error {
	i := 0
	return x.object(func(key string) error {
		if key != strconv.Itoa(i) {
			return fmt.Errorf("key %q stands where %d should", key, i)
		}
		i++
		return element()
	})
}
