package tensor

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// NumPy's .npy: the magic string, a version, the header's length (2 bytes in
// version 1, else 4), a Python dictionary padded with spaces, and the data.
// Source: numpy/lib/format.py describes it.
const (
	npyMagic = "\x93NUMPY"
	// maxNPYHeader bounds the dictionary. Those of plain arrays have 60 to 120
	// bytes; only structured types, which we refuse, are longer.
	maxNPYHeader = 4096
)

// npyTypes has the types that are read. bfloat16 is not NumPy's own: ml_dtypes
// writes it as two opaque bytes.
var npyTypes = map[string]DType{
	"<f8": F64, "<f4": F32, "<f2": F16, "|V2": BF16, "<V2": BF16, "V2": BF16,
	"<i8": I64, "<i4": I32, "|u1": U8, "|i1": "I8", "|b1": "BOOL",
	"<u2": "U16", "<i2": "I16", "<u4": "U32", "<u8": "U64",
}

// NPYHeader describes one .npy array.
type NPYHeader struct {
	DType   DType
	Shape   []int
	Fortran bool // the first index varies fastest
	Offset  int  // of the data
	Bytes   int  // of the data
}

// ParseNPYHeader reads the header at the start of data, which may end before
// the array does.
func ParseNPYHeader(data []byte) (NPYHeader, error) {
	var h NPYHeader
	if len(data) < len(npyMagic)+4 || string(data[:len(npyMagic)]) != npyMagic {
		return h, errors.New("not a .npy array: it does not start with NumPy's magic string")
	}
	version, rest := data[len(npyMagic)], data[len(npyMagic)+2:]
	var length, prefix int
	switch version {
	case 1:
		length, prefix = int(binary.LittleEndian.Uint16(rest)), 2
	case 2, 3:
		if len(rest) < 4 {
			return h, errors.New("the .npy header is cut short")
		}
		length, prefix = int(binary.LittleEndian.Uint32(rest)), 4
	default:
		return h, fmt.Errorf("version %d of .npy is not known", version)
	}
	if length > maxNPYHeader {
		return h, fmt.Errorf("the .npy header has %d bytes; at most %d are accepted", length, maxNPYHeader)
	}
	if length > len(rest)-prefix {
		return h, errors.New("the .npy header is cut short")
	}
	h.Offset = len(data) - len(rest) + prefix + length
	descr, err := h.parse(string(rest[prefix : prefix+length]))
	if err != nil {
		return h, fmt.Errorf(".npy header: %w", err)
	}
	dtype, ok := npyTypes[descr]
	if !ok {
		if strings.HasPrefix(descr, ">") {
			return h, fmt.Errorf(".npy dtype %.20q is big-endian; save it little-endian", descr)
		}
		return h, fmt.Errorf(".npy dtype %.20q is not read; save float32, float64, float16, bfloat16, int32 or int64", descr)
	}
	h.DType = dtype
	h.Bytes, err = byteSize(dtype, h.Shape)
	return h, err
}

// npyNames is npyTypes backwards, for the types that are written. NumPy itself
// says "<V2" for ml_dtypes' bfloat16 today, and said "|V2" earlier.
var npyNames = map[DType]string{F64: "<f8", F32: "<f4", F16: "<f2", BF16: "<V2", I64: "<i8", I32: "<i4", U8: "|u1"}

// NPYHead returns the beginning of a .npy array in C order, up to its data,
// byte for byte as NumPy 2 writes it: spaces for a first dimension of 21 digits,
// then as many as make the length a multiple of 64.
func NPYHead(s Spec) ([]byte, error) {
	descr, ok := npyNames[s.DType]
	if !ok {
		return nil, fmt.Errorf("%s is not written as .npy", s.DType)
	}
	shape, growth := "(", 0
	for i, n := range s.Shape {
		digits := strconv.Itoa(n)
		if i == 0 {
			growth = 21 - len(digits)
		} else {
			shape += " "
		}
		shape += digits + ","
	}
	if len(s.Shape) > 1 {
		shape = strings.TrimSuffix(shape, ",")
	}
	text := fmt.Sprintf("{'descr': '%s', 'fortran_order': False, 'shape': %s), }", descr, shape) + strings.Repeat(" ", growth)
	const before = len(npyMagic) + 4 // magic, version, length
	text += strings.Repeat(" ", 64-(before+len(text)+1)%64) + "\n"
	head := append([]byte(npyMagic), 1, 0)
	head = binary.LittleEndian.AppendUint16(head, uint16(len(text)))
	return append(head, text...), nil
}

// parse reads {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }. It
// knows just enough of Python's literals.
func (h *NPYHeader) parse(text string) (descr string, err error) {
	p := literal{strings.TrimRight(text, " \n\x00")}
	if !p.skip("{") {
		return "", errors.New("not a dictionary")
	}
	seen := map[string]bool{}
	for !p.skip("}") {
		key, ok := p.quoted()
		if !ok || seen[key] || !p.skip(":") {
			return "", errors.New("not a dictionary with the keys descr, fortran_order and shape")
		}
		seen[key] = true
		switch key {
		case "descr":
			if descr, ok = p.quoted(); !ok {
				return "", errors.New("descr is not a plain dtype")
			}
		case "fortran_order":
			switch {
			case p.skip("True"):
				h.Fortran = true
			case !p.skip("False"):
				return "", errors.New("fortran_order is neither True nor False")
			}
		case "shape":
			if h.Shape, ok = p.tuple(); !ok {
				return "", errors.New("shape is not a tuple of at most 8 sizes")
			}
		default:
			return "", fmt.Errorf("key %.20q is not known", key)
		}
		if !p.skip(",") && !strings.HasPrefix(p.rest, "}") {
			return "", errors.New("not a dictionary")
		}
	}
	if p.rest != "" || len(seen) != 3 {
		return "", errors.New("not a dictionary with the keys descr, fortran_order and shape")
	}
	return descr, nil
}

// literal is the rest of a text of Python.
type literal struct{ rest string }

func (p *literal) skip(token string) bool {
	rest, ok := strings.CutPrefix(strings.TrimLeft(p.rest, " "), token)
	if ok {
		p.rest = strings.TrimLeft(rest, " ")
	}
	return ok
}

func (p *literal) quoted() (string, bool) {
	for _, quote := range []string{"'", "\""} {
		if p.skip(quote) {
			text, rest, ok := strings.Cut(p.rest, quote)
			p.rest = strings.TrimLeft(rest, " ")
			return text, ok
		}
	}
	return "", false
}

func (p *literal) tuple() ([]int, bool) {
	shape := []int{}
	if !p.skip("(") {
		return nil, false
	}
	for !p.skip(")") {
		end := strings.IndexAny(p.rest, ",) ")
		if end < 0 || len(shape) == maxDimensions {
			return nil, false
		}
		digits := strings.TrimSuffix(p.rest[:end], "L") // Python 2 wrote 3L
		n, err := strconv.ParseUint(digits, 10, 62)
		if err != nil {
			return nil, false
		}
		shape = append(shape, int(n))
		p.rest = p.rest[end:]
		if !p.skip(",") && !strings.HasPrefix(strings.TrimLeft(p.rest, " "), ")") {
			return nil, false
		}
	}
	return shape, true
}

// cOrder returns the array with its last index varying fastest.
func (h NPYHeader) cOrder(data []byte) Tensor {
	t := Tensor{h.DType, h.Shape, data}
	if !h.Fortran || len(h.Shape) < 2 {
		return t
	}
	size := h.DType.Size()
	t.Data = make([]byte, len(data))
	index := make([]int, len(h.Shape))
	for to := 0; to < len(data); to += size {
		from, stride := 0, size
		for i, n := range h.Shape {
			from += index[i] * stride
			stride *= n
		}
		copy(t.Data[to:to+size], data[from:])
		for i := len(index) - 1; i >= 0; i-- {
			if index[i]++; index[i] < h.Shape[i] {
				break
			}
			index[i] = 0
		}
	}
	return t
}

// ReadNPY reads a .npy file.
func ReadNPY(path string) (Tensor, error) {
	file, size, err := openRegular(path)
	if err != nil {
		return Tensor{}, err
	}
	defer file.Close()
	t, err := readNPY(file, size)
	if err != nil {
		return Tensor{}, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

// readNPY reads an array of exactly size bytes, header included. The size is
// compared with what the header says before the data is allocated.
func readNPY(r io.Reader, size int64) (Tensor, error) {
	head := make([]byte, min(size, int64(len(npyMagic)+6+maxNPYHeader)))
	if _, err := io.ReadFull(r, head); err != nil {
		return Tensor{}, fmt.Errorf("cut short: %w", err)
	}
	h, err := ParseNPYHeader(head)
	if err != nil {
		return Tensor{}, err
	}
	if want := int64(h.Offset) + int64(h.Bytes); want != size {
		return Tensor{}, fmt.Errorf("%s %v takes %d bytes with its header, but there are %d", h.DType, h.Shape, want, size)
	}
	// Grown as data arrives, because a zip file can lie about the size.
	var data bytes.Buffer
	data.Write(head[h.Offset:])
	if n, err := io.Copy(&data, io.LimitReader(r, int64(h.Bytes-data.Len()))); err != nil {
		return Tensor{}, fmt.Errorf("cut short after %d bytes: %w", n, err)
	}
	if data.Len() != h.Bytes {
		return Tensor{}, fmt.Errorf("cut short: %d of %d bytes", data.Len(), h.Bytes)
	}
	return h.cOrder(data.Bytes()[:h.Bytes:h.Bytes]), nil
}

// Limits on a .npz as a whole. Deflate shrinks zeros a thousandfold, and an
// honest file may hold many; what grows beyond 1 GiB and beyond 64 times the
// file's size is taken for a bomb.
const (
	maxNPZEntries = 1 << 16
	freeInflation = 1 << 30
	maxInflation  = 64
)

// ReadNPZ reads NumPy's .npz: a zip file, stored or deflated, of .npy arrays.
// Names lose their ".npy".
func ReadNPZ(path string) (map[string]Tensor, error) {
	file, size, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	tensors, err := readNPZ(file, size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return tensors, nil
}

func readNPZ(r io.ReaderAt, size int64) (map[string]Tensor, error) {
	archive, err := zip.NewReader(r, size)
	if err != nil {
		start := make([]byte, lengthBytes+1)
		n, _ := r.ReadAt(start, 0) // whatever there is
		start = start[:n]
		if is := foreign(start); is != "" && !bytes.HasPrefix(start, []byte(zipMagic)) {
			return nil, errors.New("not a .npz file: " + is)
		}
		if n > lengthBytes && start[lengthBytes] == '{' {
			return nil, errors.New("not a .npz file: " + isSafe)
		}
		return nil, fmt.Errorf("not a .npz file, or cut short: %w", err)
	}
	if len(archive.File) > maxNPZEntries {
		return nil, fmt.Errorf("has %d entries; at most %d are accepted", len(archive.File), maxNPZEntries)
	}
	budget := uint64(freeInflation) + maxInflation*uint64(size)
	for _, entry := range archive.File { // before anything is unpacked
		if entry.UncompressedSize64 > budget {
			return nil, fmt.Errorf("unpacks to more than a file of %d bytes may (%d times its size and 1 GiB)", size, maxInflation)
		}
		budget -= entry.UncompressedSize64
	}
	tensors := map[string]Tensor{}
	for _, entry := range archive.File {
		name, ok := strings.CutSuffix(entry.Name, ".npy")
		switch {
		case ok:
		case strings.HasSuffix(name, torchPickle):
			return nil, errors.New("not a .npz file: " + isTorch)
		default:
			return nil, fmt.Errorf("entry %.60q is no .npy array", entry.Name)
		}
		if _, ok := tensors[name]; ok {
			return nil, fmt.Errorf("tensor %.60q occurs twice", name)
		}
		t, err := readEntry(entry)
		if err != nil {
			return nil, fmt.Errorf("tensor %.60q: %w", name, err)
		}
		tensors[name] = t
	}
	return tensors, nil
}

func readEntry(entry *zip.File) (Tensor, error) {
	r, err := entry.Open()
	if err != nil {
		return Tensor{}, err
	}
	defer r.Close()
	t, err := readNPY(r, int64(entry.UncompressedSize64))
	if err != nil {
		return Tensor{}, err
	}
	// The checksum is only looked at when the end is reached.
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		if err == nil || err == io.EOF {
			err = errors.New("has bytes after the array")
		}
		return Tensor{}, err
	}
	return t, nil
}

// openRegular opens a regular file; a pipe would wait for its writer.
func openRegular(path string) (*os.File, int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s: not a regular file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	return file, info.Size(), nil
}
