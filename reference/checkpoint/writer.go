package checkpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/x448/float16"
	"golang.org/x/sync/errgroup"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// item is a tensor to write: raw bytes, or matrices one after another.
type item struct {
	tensor.Spec
	raw        []byte
	parts      []Matrix
	transposed bool   // each part is stored [cols, rows]
	scales     string // MXFP4 blocks: the name of the scales, which are made with them
}

// output is a file that is laid out before it is written: fixed bytes (headers)
// at some places, tensors at the others. Tensors are then written in any order.
type output struct {
	path   string
	fixed  []run
	places map[string][]run // a tensor's pieces, in order; Flax cuts large ones
	size   int64
	file   *atomicfile.File

	// Writers wait here and not in the kernel, which lets one write to a file at
	// a time too, and spins meanwhile.
	mu sync.Mutex
}

// run is a stretch of a file.
type run struct {
	at, length int64
	data       []byte // of fixed bytes
}

// put appends fixed bytes.
func (o *output) put(data []byte) {
	o.fixed = append(o.fixed, run{o.size, int64(len(data)), data})
	o.size += int64(len(data))
}

// reserve appends a place for the next bytes of a tensor.
func (o *output) reserve(name string, length int64) {
	if o.places == nil {
		o.places = map[string][]run{}
	}
	o.places[name] = append(o.places[name], run{at: o.size, length: length})
	o.size += length
}

// writeAt writes a part of a tensor.
func (o *output) writeAt(name string, p []byte, at int64) error {
	for _, r := range o.places[name] {
		if at < r.length && len(p) > 0 {
			n := min(int64(len(p)), r.length-at)
			o.mu.Lock()
			_, err := o.file.WriteAt(p[:n], r.at+at)
			o.mu.Unlock()
			if err != nil {
				return err
			}
			p, at = p[n:], 0
			continue
		}
		at = max(at-r.length, 0)
	}
	if len(p) > 0 {
		return fmt.Errorf("%s: %d bytes too many for tensor %q", o.path, len(p), name)
	}
	return nil
}

// Sizes of what is held in memory at a time, per worker.
const (
	copyBytes  = 4 << 20  // of bytes that are copied as they are
	tileValues = 1 << 20  // of values that are converted
	turnBytes  = 16 << 20 // of a matrix that is transposed
	turnRows   = 32       // decoded at a time for that: one cache line of bfloat16

	// Workers beyond this number would only take memory: 8·(16+4+4) MiB.
	maxWorkers = 8
	// releaseEvery bounds the resident memory of the mapped source.
	releaseEvery = 64 << 20
)

// writer fills outputs.
type writer struct {
	model    *Model
	quantize bool
	progress func(written, total int64)
	total    int64
	written  atomic.Int64
	touched  atomic.Int64 // bytes of the source that were read, or more
	released atomic.Int64
}

// task writes a part of a tensor.
type task func(s *scratch) error

// scratch is a worker's memory.
type scratch struct {
	values, part []float32
	bytes, more  []byte
}

func resize[T any](s []T, n int) []T { return slices.Grow(s[:0], n)[:n] }

// errNotFinite stands for values that [Model.Check] describes better.
var errNotFinite = errors.New("is not finite")

// write writes files completely, and lets them appear together at the end.
func (w *writer) write(ctx context.Context, outputs []*output, items map[*output][]item) (err error) {
	for _, o := range outputs {
		if o.file, err = atomicfile.Create(ctx, o.path); err != nil {
			return err
		}
		defer o.file.Close()
		for _, r := range o.fixed {
			if _, err := o.file.WriteAt(r.data, r.at); err != nil {
				return err
			}
		}
	}
	var tasks []task
	for _, o := range outputs {
		for _, i := range items[o] {
			for _, t := range w.tasks(o, i) {
				tasks = append(tasks, func(s *scratch) error {
					if err := t(s); err != nil {
						return fmt.Errorf("%s: tensor %q %w", o.path, i.Name, err)
					}
					return nil
				})
			}
			size, err := i.Size()
			if err != nil {
				return fmt.Errorf("tensor %q: %w", i.Name, err)
			}
			w.total += int64(size)
		}
	}

	group, groupCtx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range min(runtime.GOMAXPROCS(0), maxWorkers) {
		group.Go(func() error {
			var s scratch
			for {
				i := int(next.Add(1)) - 1
				if i >= len(tasks) {
					return nil
				}
				if err := groupCtx.Err(); err != nil {
					return err
				}
				if err := tasks[i](&s); err != nil {
					return err
				}
			}
		})
	}
	if err := group.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, errNotFinite) {
			if better := w.model.Check(ctx); better != nil {
				return better
			}
		}
		return err
	}
	for _, o := range outputs {
		if err := o.file.Commit(); err != nil {
			return err
		}
	}
	return nil
}

// done counts what was written, and values that were read for it.
func (w *writer) done(written, values int) {
	// The source may hold float32, whatever is written.
	touched := w.touched.Add(4 * int64(values))
	if last := w.released.Load(); touched-last >= releaseEvery && w.released.CompareAndSwap(last, touched) {
		w.model.Release()
	}
	total := w.written.Add(int64(written))
	if w.progress != nil {
		w.progress(total, w.total)
	}
}

// tasks cuts the writing of an item into parts that are done in any order.
func (w *writer) tasks(o *output, i item) []task {
	if i.parts == nil && i.raw == nil {
		return nil // scales
	}
	if i.parts == nil {
		return []task{func(*scratch) error {
			w.done(len(i.raw), 0)
			return o.writeAt(i.Name, i.raw, 0)
		}}
	}
	var tasks []task
	at := int64(0) // of the part, in elements
	parts := i.parts
	if !i.transposed { // the transpose of a stack interleaves its parts
		parts = flatten(parts)
	}
	for k, p := range parts {
		rows, cols := p.Dims()
		switch {
		case i.scales != "":
			tasks = append(tasks, w.packed(o, i, p, k, at)...)
		case i.transposed:
			if stored, ok := asStored(p); ok {
				tasks = append(tasks, w.straight(o, i, stored, at)...)
			} else {
				tasks = append(tasks, w.turned(o, i, p, at)...)
			}
		default:
			tasks = append(tasks, w.straight(o, i, p, at)...)
		}
		at += int64(rows) * int64(cols)
	}
	return tasks
}

// flatten takes stacks apart.
func flatten(parts []Matrix) []Matrix {
	var out []Matrix
	for _, p := range parts {
		if s, ok := p.(Stack); ok {
			out = append(out, flatten(s.Parts)...)
		} else {
			out = append(out, p)
		}
	}
	return out
}

// asStored returns a matrix that is stored transposed as what it is in the file.
func asStored(m Matrix) (Matrix, bool) {
	switch m := m.(type) {
	case Transposed:
		return dense(m.DType, m.ColCount, m.RowCount, m.Data), true
	case Chunked:
		if m.Transposed {
			m.RowCount, m.ColCount, m.Transposed = m.ColCount, m.RowCount, false
			return m, true
		}
	}
	return nil, false
}

// rowsOf returns rows [from, from+n) as a matrix of their own.
func rowsOf(m Matrix, from, n int) Matrix {
	rows, cols := m.Dims()
	if from == 0 && n == rows {
		return m
	}
	switch m := m.(type) {
	case BF16:
		return BF16{n, cols, m.Data[2*from*cols : 2*(from+n)*cols]}
	case F16:
		return F16{n, cols, m.Data[2*from*cols : 2*(from+n)*cols]}
	case F32:
		return F32{n, cols, m.Data[4*from*cols : 4*(from+n)*cols]}
	case Dense:
		return Dense{n, cols, m.Data[from*cols : (from+n)*cols]}
	case MXFP4:
		groups := cols / groupValues
		return MXFP4{n, cols, m.Blocks[from*groups*groupBytes : (from+n)*groups*groupBytes], m.Scales[from*groups : (from+n)*groups]}
	case Chunked:
		if !m.Transposed {
			m.RowCount, m.Start = n, m.Start+from*cols
			return m
		}
	case Stack:
		var parts []Matrix
		for _, p := range m.Parts {
			rows, _ := p.Dims()
			if take := min(rows-from, n); take > 0 {
				parts = append(parts, rowsOf(p, from, take))
				n -= take
				from = 0
				continue
			}
			from = max(from-rows, 0)
		}
		return Stack{parts}
	}
	return rowRange{m, from, n}
}

// rowRange is some rows of a matrix.
type rowRange struct {
	of      Matrix
	from, n int
}

func (m rowRange) Dims() (int, int) {
	_, cols := m.of.Dims()
	return m.n, cols
}

func (m rowRange) Rows(dst []float32, from, n int) { m.of.Rows(dst, m.from+from, n) }

// storage returns the bytes of a matrix that is stored in one piece.
func storage(m Matrix) (tensor.DType, []byte) {
	switch m := m.(type) {
	case BF16:
		return tensor.BF16, m.Data
	case F16:
		return tensor.F16, m.Data
	case F32:
		return tensor.F32, m.Data
	}
	return "", nil
}

// straight writes a matrix row after row.
func (w *writer) straight(o *output, i item, m Matrix, at int64) []task {
	rows, cols := m.Dims()
	size := int64(i.DType.Size())
	var tasks []task
	if d, data := storage(m); d == i.DType {
		for from := 0; from < len(data); from += copyBytes {
			tasks = append(tasks, func(*scratch) error {
				chunk := data[from:min(from+copyBytes, len(data))]
				if firstNonFinite(d, chunk) >= 0 {
					return errNotFinite
				}
				defer w.done(len(chunk), len(chunk)/4) // exactly what is read
				return o.writeAt(i.Name, chunk, at*size+int64(from))
			})
		}
		return tasks
	}
	step := max(tileRows(m, cols), 1)
	for from := 0; from < rows; from += step {
		tasks = append(tasks, func(s *scratch) error {
			n := min(step, rows-from)
			s.bytes = resize(s.bytes, n*cols*int(size))
			done, err := decodeBF16(i.DType, s.bytes, m, from, n)
			if !done {
				s.values = resize(s.values, n*cols)
				readRows(m, s.values, from, n, &s.part, w.model.Release)
				err = encode(i.DType, s.bytes, s.values)
			}
			if err != nil {
				return err
			}
			defer w.done(len(s.bytes), n*cols)
			return o.writeAt(i.Name, s.bytes, (at+int64(from)*int64(cols))*size)
		})
	}
	return tasks
}

// tileRows is how many rows are decoded at a time: more from a transposed
// matrix, where few rows mean many short reads.
func tileRows(m Matrix, cols int) int {
	if _, ok := asStored(m); ok {
		return 4 * tileValues / cols
	}
	return tileValues / cols
}

// turned writes the transpose of a matrix: tiles of rows are turned in memory,
// and their columns written one by one.
func (w *writer) turned(o *output, i item, m Matrix, at int64) []task {
	rows, cols := m.Dims()
	size := i.DType.Size()
	step := max(turnBytes/(cols*size)/turnRows*turnRows, turnRows)
	var tasks []task
	for from := 0; from < rows; from += step {
		tasks = append(tasks, func(s *scratch) error {
			n := min(step, rows-from)
			s.bytes = resize(s.bytes, n*cols*size)
			for r := 0; r < n; r += turnRows {
				k := min(turnRows, n-r)
				s.more = resize(s.more, k*cols*size)
				done, err := decodeBF16(i.DType, s.more, m, from+r, k)
				if !done {
					s.values = resize(s.values, k*cols)
					m.Rows(s.values, from+r, k)
					err = encode(i.DType, s.more, s.values)
				}
				if err != nil {
					return err
				}
				turn(s.bytes[r*size:], s.more, k, cols, n, size)
			}
			defer w.done(len(s.bytes), n*cols)
			if n == rows {
				return o.writeAt(i.Name, s.bytes, at*int64(size))
			}
			for c := range cols {
				place := (at + int64(c)*int64(rows) + int64(from)) * int64(size)
				if err := o.writeAt(i.Name, s.bytes[c*n*size:(c+1)*n*size], place); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return tasks
}

// turn copies k rows of cols elements to columns of a matrix with lines of n
// elements.
func turn(dst, src []byte, k, cols, n, size int) {
	if size == 2 && k%4 == 0 && cols%4 == 0 {
		turn16(dst, src, k, cols, n)
		return
	}
	for c := range cols {
		line := dst[c*n*size:]
		for r := range k {
			copy(line[r*size:(r+1)*size], src[(r*cols+c)*size:])
		}
	}
}

// turn16 is turn for elements of two bytes, in squares of 4 by 4: four loads and
// four stores for sixteen elements.
func turn16(dst, src []byte, k, cols, n int) {
	const low, high = 0x0000ffff0000ffff, 0xffff0000ffff0000
	for c := 0; c < cols; c += 4 {
		for r := 0; r < k; r += 4 {
			at := 2 * (r*cols + c)
			a := binary.LittleEndian.Uint64(src[at:])
			b := binary.LittleEndian.Uint64(src[at+2*cols:])
			d := binary.LittleEndian.Uint64(src[at+4*cols:])
			e := binary.LittleEndian.Uint64(src[at+6*cols:])
			// Pairs of rows: elements 0 and 2, 1 and 3 of both.
			ab02, ab13 := a&low|b&low<<16, a&high>>16|b&high
			de02, de13 := d&low|e&low<<16, d&high>>16|e&high
			to := 2 * (c*n + r)
			binary.LittleEndian.PutUint64(dst[to:], ab02&0xffffffff|de02<<32)
			binary.LittleEndian.PutUint64(dst[to+2*n:], ab13&0xffffffff|de13<<32)
			binary.LittleEndian.PutUint64(dst[to+4*n:], ab02>>32|de02&^0xffffffff)
			binary.LittleEndian.PutUint64(dst[to+6*n:], ab13>>32|de13&^0xffffffff)
		}
	}
}

// decodeBF16 stores rows of a matrix as bfloat16 by the short way, where there
// is one.
func decodeBF16(d tensor.DType, dst []byte, m Matrix, from, n int) (bool, error) {
	if d != tensor.BF16 {
		return false, nil
	}
	switch m := m.(type) {
	case MXFP4:
		part := rowsOf(m, from, n).(MXFP4)
		if part.firstOverflow() >= 0 {
			return true, errNotFinite
		}
		part.putBF16(dst)
		return true, nil
	case BF16:
		data := m.Data[2*from*m.ColCount : 2*(from+n)*m.ColCount]
		if firstNonFinite(tensor.BF16, data) >= 0 {
			return true, errNotFinite
		}
		copy(dst, data)
		return true, nil
	}
	return false, nil
}

// packed writes blocks and scales, as they are or encoded from values.
func (w *writer) packed(o *output, i item, m Matrix, expert int, at int64) []task {
	rows, cols := m.Dims()
	groups := cols / groupValues
	at /= groupValues // now in groups
	step := max(4*tileValues/cols, 1)
	if p, ok := m.(MXFP4); ok {
		var tasks []task
		for from := 0; from < rows; from += step {
			tasks = append(tasks, func(*scratch) error {
				chunk := rowsOf(p, from, min(step, rows-from)).(MXFP4)
				if chunk.firstOverflow() >= 0 {
					return errNotFinite
				}
				size := len(chunk.Blocks) + len(chunk.Scales)
				defer w.done(size, size/4)
				first := at + int64(from)*int64(groups)
				if err := o.writeAt(i.Name, chunk.Blocks, first*groupBytes); err != nil {
					return err
				}
				return o.writeAt(i.scales, chunk.Scales, first)
			})
		}
		return tasks
	}
	step = max(tileRows(m, cols), 1)
	var tasks []task
	for from := 0; from < rows; from += step {
		tasks = append(tasks, func(s *scratch) error {
			n := min(step, rows-from)
			s.values = resize(s.values, n*cols)
			readRows(m, s.values, from, n, &s.part, w.model.Release)
			s.bytes, s.more = resize(s.bytes, n*groups*groupBytes), resize(s.more, n*groups)
			for g := range s.more {
				block, values := (*[groupBytes]byte)(s.bytes[g*groupBytes:]), (*[groupValues]float32)(s.values[g*groupValues:])
				scale, ok := encodeMXFP4(block, values)
				if !ok {
					if !finite(values[:]) {
						return errNotFinite
					}
					if !w.quantize {
						return fmt.Errorf("can't hold the source exactly: expert %d, row %d, group %d is no MXFP4 (--quantize rounds it)", expert, from+g/groups, g%groups)
					}
					scale = quantizeMXFP4(block, values)
				}
				s.more[g] = scale
			}
			defer w.done(len(s.bytes)+len(s.more), n*cols)
			first := at + int64(from)*int64(groups)
			if err := o.writeAt(i.Name, s.bytes, first*groupBytes); err != nil {
				return err
			}
			return o.writeAt(i.scales, s.more, first)
		})
	}
	return tasks
}

// encode stores values that the type holds exactly.
func encode(d tensor.DType, dst []byte, values []float32) error {
	switch d {
	case tensor.F32:
		for i, v := range values {
			b := math.Float32bits(v)
			dst[4*i], dst[4*i+1], dst[4*i+2], dst[4*i+3] = byte(b), byte(b>>8), byte(b>>16), byte(b>>24)
		}
	case tensor.BF16:
		exact, finite := putBF16(dst, values)
		if !finite {
			return errNotFinite
		}
		if !exact {
			return errors.New("has values that bfloat16 can't hold")
		}
		return nil
	case tensor.F16:
		for i, v := range values {
			h := float16.Fromfloat32(v)
			if h.Float32() != v {
				return fmt.Errorf("has values that float16 can't hold (%g)", v)
			}
			dst[2*i], dst[2*i+1] = byte(h), byte(h>>8)
		}
	}
	if !finite(values) {
		return errNotFinite
	}
	return nil
}

// finite reports whether no value is NaN or infinite.
func finite(values []float32) bool {
	var worst uint32
	for _, v := range values {
		worst = max(worst, math.Float32bits(v)&^signBit)
	}
	return worst < infinityBits
}
