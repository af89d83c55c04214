package tensor

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"

	"github.com/gptoss-conformance/gptoss/reference/config/strictjson"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// A safetensors file: 8 bytes of header length (little-endian), a JSON object
//
//	{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
//	 "__metadata__": {"key": "value"}}
//
// and the data, to which the offsets refer. Source: the format description of
// huggingface/safetensors.
const (
	lengthBytes = 8
	metadataKey = "__metadata__"

	// maxHeaderBytes bounds what a hostile header can make us allocate. The
	// header of gpt-oss-120b is about 0.1 MB; one entry per expert matrix would
	// make it 4 MB.
	maxHeaderBytes = 16 << 20
	// maxDimensions is twice what gpt-oss needs (blocks have 4).
	maxDimensions = 8
)

// File is an open safetensors file. Its tensors are views of the mapped file
// and must not be used after Close. It is safe for concurrent use.
type File struct {
	*Mapping
	names    []string
	tensors  map[string]Tensor
	metadata map[string]string
}

// OpenSafetensors maps a file and checks its header completely: afterwards
// every tensor has exactly the bytes that its dtype and shape need, tensors
// don't overlap, and they fill the file. Nothing is allocated from a length
// that the file does not have.
func OpenSafetensors(path string) (*File, error) {
	mapping, err := Map(path)
	if err != nil {
		return nil, err
	}
	f := &File{Mapping: mapping}
	f.names, f.tensors, f.metadata, err = parseSafetensors(mapping.Bytes())
	if err != nil {
		mapping.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// entry is one tensor of the header.
type entry struct {
	name       string
	dtype      DType
	shape      []int
	begin, end int
}

func parseSafetensors(data []byte) ([]string, map[string]Tensor, map[string]string, error) {
	if len(data) < lengthBytes {
		return nil, nil, nil, fmt.Errorf("not a safetensors file: it has only %d bytes", len(data))
	}
	length := binary.LittleEndian.Uint64(data)
	rest := data[lengthBytes:]
	if len(rest) > 0 && rest[0] != '{' { // with that it is one, whatever its length looks like
		if is := foreign(data); is != "" {
			return nil, nil, nil, errors.New("not a safetensors file: " + is)
		}
	}
	if length > uint64(len(rest)) {
		return nil, nil, nil, fmt.Errorf("not a safetensors file, or cut short: the header should have %d bytes, %d are left", length, len(rest))
	}
	if length > maxHeaderBytes {
		return nil, nil, nil, fmt.Errorf("the header has %d bytes; at most %d are accepted", length, maxHeaderBytes)
	}
	header, body := rest[:length], rest[length:]
	if len(header) == 0 || header[0] != '{' {
		return nil, nil, nil, errors.New("not a safetensors file: the header does not start with '{'")
	}
	entries, metadata, err := parseHeader(header)
	if err != nil {
		return nil, nil, nil, err
	}

	slices.SortStableFunc(entries, func(a, b entry) int {
		if a.begin != b.begin {
			return a.begin - b.begin
		}
		return a.end - b.end // empty tensors first
	})
	names := make([]string, len(entries))
	tensors := make(map[string]Tensor, len(entries))
	at := 0
	for i, e := range entries {
		switch {
		case e.end > len(body):
			return nil, nil, nil, fmt.Errorf("tensor %q ends at byte %d, but the file has only %d bytes of data; is it cut short?", e.name, e.end, len(body))
		case e.begin < at:
			return nil, nil, nil, fmt.Errorf("tensor %q overlaps %q", e.name, entries[i-1].name)
		case e.begin > at:
			return nil, nil, nil, fmt.Errorf("%d bytes before tensor %q belong to no tensor", e.begin-at, e.name)
		}
		at = e.end
		names[i] = e.name
		tensors[e.name] = Tensor{DType: e.dtype, Shape: e.shape, Data: body[e.begin:e.end:e.end]}
	}
	if at != len(body) {
		return nil, nil, nil, fmt.Errorf("%d bytes after the last tensor belong to no tensor", len(body)-at)
	}
	return names, tensors, metadata, nil
}

func parseHeader(header []byte) ([]entry, map[string]string, error) {
	r, err := strictjson.NewReader(header)
	if err != nil {
		return nil, nil, fmt.Errorf("header %w", err)
	}
	var entries []entry
	metadata := map[string]string{}
	err = r.Object(func(name string) error {
		if name == metadataKey {
			if err := r.Object(func(key string) (err error) {
				metadata[key], err = r.String()
				return err
			}); err != nil {
				return fmt.Errorf("%s: %w", metadataKey, err)
			}
			return nil
		}
		e, err := parseEntry(r, name)
		if err != nil {
			return fmt.Errorf("tensor %q: %w", name, err)
		}
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("header: %w", err)
	}
	return entries, metadata, nil
}

func parseEntry(r *strictjson.Reader, name string) (entry, error) {
	e := entry{name: name, shape: []int{}}
	var offsets []int
	seen := 0
	err := r.Object(func(key string) error {
		seen++
		switch key {
		case "dtype":
			s, err := r.String()
			e.dtype = DType(s)
			return err
		case "shape":
			return r.Array(func(i int) error {
				if i == maxDimensions {
					return fmt.Errorf("has more than %d dimensions", maxDimensions)
				}
				n, err := r.Int()
				e.shape = append(e.shape, n)
				return err
			})
		case "data_offsets":
			return r.Array(func(i int) error {
				if i == 2 {
					return errors.New("data_offsets has more than two elements")
				}
				n, err := r.Int()
				offsets = append(offsets, n)
				return err
			})
		}
		return fmt.Errorf("has a key %q, which the format does not know", key)
	})
	if err != nil {
		return e, err
	}
	if seen != 3 || len(offsets) != 2 {
		return e, errors.New("needs dtype, shape and two data_offsets")
	}
	want, err := byteSize(e.dtype, e.shape)
	if err != nil {
		return e, err
	}
	e.begin, e.end = offsets[0], offsets[1]
	if e.begin < 0 || e.end < e.begin {
		return e, fmt.Errorf("data_offsets [%d, %d] are no range", e.begin, e.end)
	}
	if e.end-e.begin != want {
		return e, fmt.Errorf("%s %v takes %d bytes, but data_offsets [%d, %d] hold %d", e.dtype, e.shape, want, e.begin, e.end, e.end-e.begin)
	}
	return e, nil
}

// Names lists the tensors in the order of their data.
func (f *File) Names() []string { return slices.Clone(f.names) }

// Tensor returns a view of a tensor, and whether the file has it.
func (f *File) Tensor(name string) (Tensor, bool) {
	t, ok := f.tensors[name]
	return t, ok
}

// Metadata returns the strings of the header's __metadata__.
func (f *File) Metadata() map[string]string { return maps.Clone(f.metadata) }

// ReadSafetensors reads a whole file into memory. It is for small files that
// must outlive the reading, golden tensors for one.
func ReadSafetensors(path string) (map[string]Tensor, error) {
	f, err := OpenSafetensors(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := make(map[string]Tensor, len(f.tensors))
	for name, t := range f.tensors {
		t.Data = bytes.Clone(t.Data)
		if t.Data == nil {
			t.Data = []byte{}
		}
		out[name] = t
	}
	return out, nil
}

// Named is a tensor with its name.
type Named struct {
	Name string
	Tensor
}

// Spec says what a tensor will be.
type Spec struct {
	Name  string
	DType DType
	Shape []int
}

// Size returns the bytes of the tensor.
func (s Spec) Size() (int, error) { return byteSize(s.DType, s.Shape) }

// Stream is a tensor that is produced while the file is written.
type Stream struct {
	Name  string
	DType DType
	Shape []int
	// Write writes the tensor's bytes, exactly as many as dtype and shape need.
	// Several tensors' functions run at the same time.
	Write func(ctx context.Context, w io.Writer) error
}

// WriteSafetensors writes the tensors in the order given. The file appears
// under its name only when it is complete. The same input gives the same bytes.
func WriteSafetensors(path string, tensors []Named, metadata map[string]string) error {
	streams := make([]Stream, len(tensors))
	for i, t := range tensors {
		if err := t.Check(); err != nil {
			return fmt.Errorf("%s: tensor %q %w", path, t.Name, err)
		}
		streams[i] = Stream{t.Name, t.DType, t.Shape, func(_ context.Context, w io.Writer) error {
			_, err := w.Write(t.Data)
			return err
		}}
	}
	return StreamSafetensors(context.Background(), path, streams, metadata)
}

// StreamSafetensors is WriteSafetensors for tensors that need not fit into
// memory. It stops when the context is cancelled, and leaves nothing behind
// when it fails.
func StreamSafetensors(ctx context.Context, path string, tensors []Stream, metadata map[string]string) error {
	specs := make([]Spec, len(tensors))
	for i, t := range tensors {
		specs[i] = Spec{t.Name, t.DType, t.Shape}
	}
	header, offsets, err := SafetensorsHeader(specs, metadata)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	file, err := atomicfile.Create(ctx, path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Write(header); err != nil {
		return err
	}

	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, t := range tensors {
		if groupCtx.Err() != nil {
			break
		}
		group.Go(func() error {
			w := &sectionWriter{ctx: groupCtx, file: file, at: int64(len(header) + offsets[i]), end: int64(len(header) + offsets[i+1])}
			if err := t.Write(groupCtx, w); err != nil {
				return fmt.Errorf("%s: writing tensor %q: %w", path, t.Name, err)
			}
			if w.at != w.end {
				return fmt.Errorf("%s: tensor %q ended %d bytes early", path, t.Name, w.end-w.at)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	return file.Commit()
}

// SafetensorsHeader lays a file out, for writers that put the tensors where they
// belong themselves. It returns the beginning of the file, and where each tensor
// begins after it, with one more element: the end.
func SafetensorsHeader(tensors []Spec, metadata map[string]string) (header []byte, offsets []int, err error) {
	type headerEntry struct {
		DType   DType  `json:"dtype"`
		Shape   []int  `json:"shape"`
		Offsets [2]int `json:"data_offsets"`
	}
	var b bytes.Buffer
	b.Write(make([]byte, lengthBytes))
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	encode := func(value any) error {
		err := encoder.Encode(value)
		b.Truncate(b.Len() - 1) // the encoder's newline
		return err
	}
	b.WriteByte('{')
	if len(metadata) > 0 {
		if err := encode(metadataKey); err != nil {
			return nil, nil, err
		}
		b.WriteByte(':')
		if err := encode(metadata); err != nil { // sorted by key
			return nil, nil, err
		}
	}
	offsets = make([]int, len(tensors)+1)
	seen := map[string]bool{metadataKey: true}
	for i, t := range tensors {
		if seen[t.Name] {
			return nil, nil, fmt.Errorf("tensor %q occurs twice or has a reserved name", t.Name)
		}
		seen[t.Name] = true
		if !utf8.ValidString(t.Name) {
			return nil, nil, fmt.Errorf("tensor name %q is not valid UTF-8", t.Name)
		}
		if len(t.Shape) > maxDimensions {
			return nil, nil, fmt.Errorf("tensor %q has more than %d dimensions", t.Name, maxDimensions)
		}
		size, err := t.Size()
		if err != nil {
			return nil, nil, fmt.Errorf("tensor %q: %w", t.Name, err)
		}
		offsets[i+1] = offsets[i] + size
		if b.Len() > lengthBytes+1 {
			b.WriteByte(',')
		}
		if err := encode(t.Name); err != nil {
			return nil, nil, err
		}
		b.WriteByte(':')
		shape := t.Shape
		if shape == nil {
			shape = []int{} // a scalar; null would be no shape
		}
		if err := encode(headerEntry{t.DType, shape, [2]int{offsets[i], offsets[i+1]}}); err != nil {
			return nil, nil, err
		}
	}
	b.WriteByte('}')
	for b.Len()%8 != 0 {
		b.WriteByte(' ') // so that the data is aligned when the file is mapped
	}
	if b.Len() > maxHeaderBytes {
		return nil, nil, fmt.Errorf("a header of %d bytes is too long; at most %d are read back", b.Len(), maxHeaderBytes)
	}
	header = b.Bytes()
	binary.LittleEndian.PutUint64(header, uint64(len(header)-lengthBytes))
	return header, offsets, nil
}

// sectionWriter writes one tensor's range of the file and nothing beyond it.
type sectionWriter struct {
	ctx     context.Context
	file    io.WriterAt
	at, end int64
}

// writeChunk bounds how long a cancelled write goes on.
const writeChunk = 8 << 20

func (w *sectionWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > w.end-w.at {
		return 0, errors.New("more bytes than dtype and shape say")
	}
	written := 0
	for written < len(p) {
		if err := w.ctx.Err(); err != nil {
			return written, err
		}
		n, err := w.file.WriteAt(p[written:min(len(p), written+writeChunk)], w.at)
		written += n
		w.at += int64(n)
		if err != nil {
			return written, err
		}
	}
	return written, nil
}
