package exporter

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"strconv"

	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Source is where a weight's bytes come from, little-endian and in C order.
// Nothing is copied before the data file is written.
type Source interface {
	Size() int64
	WriteTo(w io.Writer) (int64, error)
}

// Bytes is a source in memory, or mapped from a checkpoint.
type Bytes []byte

// Size returns the bytes to be written.
func (b Bytes) Size() int64 { return int64(len(b)) }

// WriteTo writes the bytes, in pieces, so that a cancelled writer stops early.
func (b Bytes) WriteTo(w io.Writer) (int64, error) {
	const piece = 8 << 20
	var written int64
	for len(b) > 0 {
		n, err := w.Write(b[:min(piece, len(b))])
		written += int64(n)
		if err != nil {
			return written, err
		}
		b = b[n:]
	}
	return written, nil
}

// Sources is several sources, one after another.
type Sources []Source

// Size returns the bytes to be written.
func (s Sources) Size() int64 {
	var size int64
	for _, part := range s {
		size += part.Size()
	}
	return size
}

// WriteTo writes all of them.
func (s Sources) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for _, part := range s {
		n, err := part.WriteTo(w)
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// decoded writes any matrix row by row, as float32 or as bfloat16.
type decoded struct {
	matrix checkpoint.Matrix
	typ    Type
}

func (d decoded) Size() int64 {
	rows, cols := d.matrix.Dims()
	return int64(rows) * int64(cols) * typeSize[d.typ]
}

func (d decoded) WriteTo(w io.Writer) (int64, error) {
	rows, cols := d.matrix.Dims()
	batch := max(1, (1<<18)/max(cols, 1)) // about a mebibyte of float32 at a time
	values := make([]float32, batch*cols)
	data := make([]byte, 0, 4*len(values))
	var written int64
	for from := 0; from < rows; from += batch {
		n := min(batch, rows-from)
		d.matrix.Rows(values, from, n)
		data = data[:0]
		for _, v := range values[:n*cols] {
			bits := math.Float32bits(v)
			if d.typ == Float32 {
				data = binary.LittleEndian.AppendUint32(data, bits)
				continue
			}
			if bits&0xffff != 0 {
				return written, fmt.Errorf("value %g is not a bfloat16", v)
			}
			data = binary.LittleEndian.AppendUint16(data, uint16(bits>>16))
		}
		k, err := w.Write(data)
		written += int64(k)
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// initializer is a weight of the graph.
type initializer struct {
	*edge
	source   Source
	location string // the data file's name, beside the graph's
	offset   int64  // in the data file; -1 when the bytes are in the graph itself
}

// inlineLimit is the largest weight that stands in the graph file itself, where
// ONNX's shape inference can see it.
const inlineLimit = 1024

// Weight adds an initializer whose bytes are read when the data file is written.
func (g *Graph) Weight(name string, typ Type, shape Shape, source Source) Value {
	want := typeSize[typ]
	for _, d := range shape {
		want *= int64(d.Size)
	}
	if got := source.Size(); got != want && g.err == nil {
		g.err = fmt.Errorf("weight %s has %d bytes, %v of type %v needs %d", name, got, shape, typ, want)
	}
	g.main.reserve(name, g)
	w := &initializer{edge: &edge{name: name, named: true, typ: typ, shape: shape}, source: source, offset: -1}
	g.initializers = append(g.initializers, w)
	return Value{w.edge}
}

func (w *initializer) inline() *onnxpb.TensorProto {
	message := &onnxpb.TensorProto{DataType: proto.Int32(int32(w.typ))}
	if w.name != "" {
		message.Name = proto.String(w.name)
	}
	for _, d := range w.shape {
		message.Dims = append(message.Dims, int64(d.Size))
	}
	var data sliceWriter
	if _, err := w.source.WriteTo(&data); err != nil {
		panic(err) // only small sources in memory are inlined
	}
	message.RawData = data
	return message
}

type sliceWriter []byte

func (s *sliceWriter) Write(p []byte) (int, error) {
	*s = append(*s, p...)
	return len(p), nil
}

func (w *initializer) message() *onnxpb.TensorProto {
	if w.offset < 0 {
		return w.inline()
	}
	message := &onnxpb.TensorProto{
		DataType: proto.Int32(int32(w.typ)), Name: proto.String(w.name),
		DataLocation: onnxpb.TensorProto_EXTERNAL.Enum(),
	}
	for _, d := range w.shape {
		message.Dims = append(message.Dims, int64(d.Size))
	}
	entry := func(key, value string) {
		message.ExternalData = append(message.ExternalData, &onnxpb.StringStringEntryProto{
			Key: proto.String(key), Value: proto.String(value),
		})
	}
	entry("location", w.location)
	entry("offset", strconv.FormatInt(w.offset, 10))
	entry("length", strconv.FormatInt(w.source.Size(), 10))
	return message
}

// Alignments of weights in the data file. Runtimes map a weight from a page
// boundary on; small ones only need what vector loads like.
const (
	pageAlignment   = 4096
	vectorAlignment = 64
	pageWorth       = 64 << 10
)

// layOut gives every weight that does not fit inline its place in the data file
// called location, in order of creation.
func (g *Graph) layOut(location string) {
	var end int64
	for _, w := range g.initializers {
		size := w.source.Size()
		if size <= inlineLimit {
			continue
		}
		alignment := int64(vectorAlignment)
		if size >= pageWorth {
			alignment = pageAlignment
		}
		w.offset = (end + alignment - 1) / alignment * alignment
		w.location = location
		end = w.offset + size
	}
	g.dataSize = end
}

// writeData streams the weights in the order of their offsets. It keeps no more
// than one piece of a weight in memory.
func (g *Graph) writeData(ctx context.Context, w io.Writer, progress func(bytes int64)) error {
	out := &countingWriter{ctx: ctx, w: w, progress: progress}
	for _, weight := range g.initializers {
		if weight.offset < 0 {
			continue
		}
		if padding := weight.offset - out.written; padding > 0 {
			if _, err := out.Write(make([]byte, padding)); err != nil {
				return err
			}
		}
		n, err := weight.source.WriteTo(out)
		if err != nil {
			return fmt.Errorf("weight %s: %w", weight.name, err)
		}
		if n != weight.source.Size() {
			return fmt.Errorf("weight %s wrote %d bytes of %d", weight.name, n, weight.source.Size())
		}
	}
	return nil
}

type countingWriter struct {
	ctx      context.Context
	w        io.Writer
	written  int64
	progress func(int64)
}

func (c *countingWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.w.Write(p)
	c.written += int64(n)
	if c.progress != nil {
		c.progress(c.written)
	}
	return n, err
}

// storage returns the type in which a matrix is written, the checkpoint's own,
// and its bytes. Matrices that are computed row by row are float32.
func storage(m checkpoint.Matrix) (Type, Source) {
	switch m := m.(type) {
	case checkpoint.BF16:
		return BFloat16, Bytes(m.Data)
	case checkpoint.F16:
		return Float16, Bytes(m.Data)
	case checkpoint.F32:
		return Float32, Bytes(m.Data)
	case checkpoint.MXFP4:
		// Every value is a bfloat16: two bits of fraction, and the smallest,
		// 2^-128, is a subnormal bfloat16.
		return BFloat16, decoded{m, BFloat16}
	case checkpoint.Transposed:
		if m.DType == tensor.BF16 {
			return BFloat16, decoded{m, BFloat16}
		}
	case checkpoint.Stack:
		var parts Sources
		var common Type
		for _, part := range m.Parts {
			typ, source := storage(part)
			if common != 0 && typ != common {
				return Float32, decoded{m, Float32}
			}
			common, parts = typ, append(parts, source)
		}
		return common, parts
	}
	return Float32, decoded{m, Float32}
}

// matrix declares a weight [rows, cols].
func (m *model) matrix(name string, weight checkpoint.Matrix) (Value, error) {
	if weight == nil {
		if m.partial {
			return Value{}, nil
		}
		return Value{}, fmt.Errorf("%s: the checkpoint has no %s", m.weights.Source.Path, name)
	}
	typ, source := storage(weight)
	rows, cols := weight.Dims()
	return m.graph.Weight(name, typ, Ns(rows, cols), source), nil
}

// vector declares a small weight as float32, which checkpoints widen exactly.
func (m *model) vector(name string, values []float32) Value {
	if m.partial && values == nil {
		return Value{}
	}
	return m.graph.Weight(name, Float32, Ns(len(values)), float32Bytes(values))
}

// vectors declares one small weight for each expert, [experts, width].
func (m *model) vectors(name string, values [][]float32) Value {
	if m.partial && len(values) == 0 {
		return Value{}
	}
	var parts Sources
	for _, v := range values {
		parts = append(parts, float32Bytes(v))
	}
	return m.graph.Weight(name, Float32, Ns(len(values), len(values[0])), parts)
}

func float32Bytes(values []float32) Bytes {
	data := make([]byte, 0, 4*len(values))
	for _, v := range values {
		data = appendUint32(data, math.Float32bits(v))
	}
	return data
}

// packed declares the experts' MXFP4 weights: the checkpoint's bytes, pairs of
// which are seen as one little-endian uint16; or, for an operator that decodes
// them itself, as uint8 with E8M0 scales.
func (m *model) packed(name string, experts []checkpoint.Matrix) (MXFP4, error) {
	var blocks, scales Sources
	rows, cols := experts[0].Dims()
	for i, expert := range experts {
		w, ok := expert.(checkpoint.MXFP4)
		if !ok {
			return MXFP4{}, fmt.Errorf("%s: %s of expert %d is not stored as MXFP4: export with dense experts",
				m.weights.Source.Path, name, i)
		}
		blocks, scales = append(blocks, Bytes(w.Blocks)), append(scales, Bytes(w.Scales))
	}
	groups := cols / 32
	if m.stages.FusedExperts != nil {
		m.graph.irVersion = irVersionE8M0
		return MXFP4{
			Blocks: m.graph.Weight(name+".blocks", UInt8, Ns(len(experts), rows, cols/2), blocks),
			Scales: m.graph.Weight(name+".scales", E8M0, Ns(len(experts), rows, groups), scales),
		}, nil
	}
	return MXFP4{
		Blocks: m.graph.Weight(name+".blocks", UInt16, Ns(len(experts), rows, groups, 8), blocks),
		Scales: m.graph.Weight(name+".scales", UInt8, Ns(len(experts), rows, groups), scales),
	}, nil
}

// dense declares the experts' weights [experts, rows, cols] decoded.
func (m *model) dense(name string, experts []checkpoint.Matrix) (Value, error) {
	typ, source := storage(checkpoint.Stack{Parts: experts})
	rows, cols := experts[0].Dims()
	return m.graph.Weight(name, typ, Ns(len(experts), rows, cols), source), nil
}
