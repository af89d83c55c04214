package checkpoint

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Flax's msgpack, laid out. Keys are sorted, as jax.tree_util sorts them, so
// that flax.serialization writes the same bytes when it has read them.

// maxFlaxArray is the size above which Flax stores an array in chunks
// (flax/serialization.py, MAX_CHUNK_SIZE).
const maxFlaxArray = 1 << 30

// node is a map of the bundle or one of its arrays.
type node struct {
	keys     []string
	children map[string]*node
	leaf     *item
}

func layOutMsgpack(path string, items []item) (*output, error) {
	root := &node{children: map[string]*node{}}
	for i := range items {
		at := root
		for key := range strings.SplitSeq(items[i].Name, "/") {
			child := at.children[key]
			if child == nil {
				child = &node{children: map[string]*node{}}
				at.children[key] = child
				at.keys = append(at.keys, key)
			}
			at = child
		}
		at.leaf = &items[i]
	}
	o := &output{path: path}
	return o, root.layOut(o)
}

func (n *node) layOut(o *output) error {
	if n.leaf != nil {
		return layOutArray(o, n.leaf.Spec)
	}
	slices.Sort(n.keys)
	o.put(mapHead(len(n.keys)))
	for _, key := range n.keys {
		o.put(textHead(key))
		if err := n.children[key].layOut(o); err != nil {
			return err
		}
	}
	return nil
}

// layOutArray writes an array's extension, in chunks if it is large.
func layOutArray(o *output, s tensor.Spec) error {
	size, err := s.Size()
	if err != nil {
		return fmt.Errorf("%q: %w", s.Name, err)
	}
	if size <= maxFlaxArray {
		return layOutPiece(o, s, s.Shape, size)
	}
	o.put(mapHead(3))
	o.put(append(textHead(chunkedKey), 0xc3)) // true
	o.put(textHead("shape"))
	o.put(mapHead(len(s.Shape)))
	for i, n := range s.Shape {
		o.put(append(textHead(fmt.Sprint(i)), integer(n)...))
	}
	o.put(textHead("chunks"))
	o.put(mapHead((size + maxFlaxArray - 1) / maxFlaxArray))
	for at := 0; at < size; at += maxFlaxArray {
		o.put(textHead(fmt.Sprint(at / maxFlaxArray)))
		n := min(maxFlaxArray, size-at)
		if err := layOutPiece(o, s, []int{n / s.DType.Size()}, n); err != nil {
			return err
		}
	}
	return nil
}

func layOutPiece(o *output, s tensor.Spec, shape []int, size int) error {
	name := ""
	for numpy, d := range flaxTypes {
		if d == s.DType {
			name = numpy
		}
	}
	if name == "" || len(shape) > 15 {
		return fmt.Errorf("%q: %s %v is not written by Flax", s.Name, s.DType, shape)
	}
	inner := []byte{0x93, 0x90 | byte(len(shape))} // arrays of 3 and of the shape's length
	for _, n := range shape {
		inner = append(inner, integer(n)...)
	}
	inner = append(append(inner, textHead(name)...), sized(0xc4, size)...)
	o.put(extHead(len(inner) + size))
	o.put(inner)
	o.reserve(s.Name, int64(size))
	return nil
}

// The smallest encodings, which Python's msgpack chooses.

func mapHead(n int) []byte {
	switch {
	case n < 16:
		return []byte{0x80 | byte(n)}
	case n < 1<<16:
		return []byte{0xde, byte(n >> 8), byte(n)}
	}
	return binary.BigEndian.AppendUint32([]byte{0xdf}, uint32(n))
}

func textHead(s string) []byte {
	if len(s) < 32 {
		return append([]byte{0xa0 | byte(len(s))}, s...)
	}
	return append(sized(0xd9, len(s)), s...)
}

// sized is a code for a length of 8 bits, or one of the next two for 16 and 32.
func sized(code byte, n int) []byte {
	switch {
	case n < 1<<8:
		return []byte{code, byte(n)}
	case n < 1<<16:
		return []byte{code + 1, byte(n >> 8), byte(n)}
	}
	return binary.BigEndian.AppendUint32([]byte{code + 2}, uint32(n))
}

func extHead(n int) []byte {
	if n <= 16 && n&(n-1) == 0 { // 1, 2, 4, 8, 16 have codes of their own
		return []byte{0xd4 + byte(math.Ilogb(float64(n))), extArray}
	}
	return append(sized(0xc7, n), extArray)
}

func integer(n int) []byte {
	if n < 128 {
		return []byte{byte(n)}
	}
	if n >= 1<<32 {
		return binary.BigEndian.AppendUint64([]byte{0xcf}, uint64(n))
	}
	return sized(0xcc, n)
}
