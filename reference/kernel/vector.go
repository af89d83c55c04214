package kernel

import (
	"math"
	"runtime"
	"sync"
	"unsafe"
)

//go:generate go run ./asm -out vector_amd64.s -stubs stubs_amd64.go -pkg kernel

// instructionSet holds the vector kernels of one kind of processor.
type instructionSet struct {
	name   string
	single vectors[float32]
	double vectors[float64]
}

// vectors are the kernels for one type of activations. x is prepared for them
// by arrange.
type vectors[F Float] struct {
	arrange func(dst, x []F) // puts the columns in the order of decoded weights
	// Blocks multiply decoded tiles; mxfp4 and bf16 decode in registers. Those may
	// be missing.
	blocks      []blockKernel[F] // by number of tokens less one
	mxfp4, bf16 streams[F]
	reduce      func(n int, acc, y *F)
	lanes       int // of a sum in acc; 64 bytes
	// Decoders of whole groups, in the order that arrange makes; may be missing.
	decodeMXFP4, decodeBF16 func(groups int, w, scales *byte, dst *F)
	// What attention needs, on rows that lie stride bytes apart: a vector's inner
	// products with n rows of some chunks of 64 bytes, and the sum of n rows times
	// their weights, in blocks of blockBytes of a row.
	innerProducts func(n, chunks int, x, rows *F, stride int, dst *F)
	weightedSum   func(n, blocks int, weights, rows *F, stride int, dst *F)
	blockBytes    int
	exp           func(chunks int, x *F) // of 64 bytes each, in place; may be missing
}

// chunkBytes is what one running sum takes from a row at a time.
const chunkBytes = 64

// blockKernel adds the products of some rows of a tile with some tokens to acc
// [rows, tokens, lanes]. Strides are in bytes.
type blockKernel[F Float] struct {
	rows int
	run  func(groups int, x *F, xStride int, w *F, wStride int, acc *F)
}

// streamKernel multiplies some rows of packed weights with some tokens:
// y[t·yStride + r·rowStride]. Strides are in bytes.
type streamKernel[F Float] struct {
	rows int
	run  func(groups int, x *F, xStride int, w *byte, wStride int, scales *byte, scaleStride int, y *F, yStride, rowStride int)
}

// streams are the kernels that decode in registers, by number of tokens less one,
// and the most tokens for which they are faster than blocks.
type streams[F Float] struct {
	kernels []streamKernel[F]
	most    int
}

// groupColumns is how many columns the kernels take at a time: MXFP4's group.
const groupColumns = 32

// Sizes of the blocks, for an L1 cache of 32 KiB and an L2 of 512 KiB or more.
// Six rows and four tokens of 24 groups are 30 KiB of float32; a panel of 24
// rows of 2880 columns is 276 KiB.
const (
	panelRows   = 24 // rows decoded at a time; a multiple of every kernel's rows
	panelGroups = 24 // groups of columns that pass at a time
	panelTokens = 64 // tokens that a panel meets at a time
	taskRows    = 4 * panelRows
)

// The rows of a task that streams its weights but once, which need not stay in a
// cache, are as many as leave every core some tasks to balance. Longer streams are
// faster: 768 rows reach 59 GB/s where 96 reach 53, on four cores of Zen 4.
const (
	longestTask  = 8 * taskRows
	tasksPerCore = 16
)

// vectorsFor returns a set's kernels for F, or nil.
func vectorsFor[F Float](set *instructionSet) *vectors[F] {
	if set == nil {
		return nil
	}
	if v, ok := any(&set.single).(*vectors[F]); ok {
		return v
	}
	v, _ := any(&set.double).(*vectors[F])
	return v
}

// task is some rows of a product.
type task[F Float] struct {
	x        []F // arranged, [tokens, cols]
	tokens   int
	w        Rows
	cols     int
	from, to int // rows of w
	y        []F // [tokens, stride], starting at the column of w's first row
	stride   int
	stopped  func() bool
}

// multiply computes the products that fit the kernels, and returns the others.
func (v *vectors[F]) multiply(products []Product[F]) (rest []Product[F]) {
	var tasks []task[F]
	most := v.taskRows(products)
	for _, p := range products {
		rows, cols := p.W.Dims()
		if cols%groupColumns != 0 || rows == 0 || cols == 0 {
			rest = append(rest, p)
			continue
		}
		x := make([]F, len(p.X))
		Parallel(len(x)/cols, 16, func(from, to int) { v.arrange(x[from*cols:to*cols], p.X[from*cols:to*cols]) })
		tasks = addTasks(tasks, task[F]{x: x, tokens: len(x) / cols, w: p.W, cols: cols, y: p.Y, stride: rows, stopped: p.stopped}, most)
	}
	Parallel(len(tasks), 1, func(from, to int) {
		s := scratchOf[F]()
		defer s.free()
		for _, t := range tasks[from:to] {
			v.run(t, s)
		}
	})
	return rest
}

// taskRows returns how many rows a task has at most: a multiple of all kernels' rows.
func (v *vectors[F]) taskRows(products []Product[F]) int {
	total, once := 0, min(len(v.mxfp4.kernels), len(v.bf16.kernels))
	for _, p := range products {
		rows, cols := p.W.Dims()
		if len(p.X) > once*cols {
			return taskRows
		}
		total += rows
	}
	share := total / (tasksPerCore * runtime.GOMAXPROCS(0))
	return min(max(share/taskRows, 1)*taskRows, longestTask)
}

// addTasks splits a product into tasks of at most `most` rows each.
func addTasks[F Float](tasks []task[F], whole task[F], most int) []task[F] {
	if stack, ok := whole.w.(Stacked); ok {
		for _, part := range stack.Stacked() {
			t := whole
			t.w = part
			tasks = addTasks(tasks, t, most)
			rows, _ := part.Dims()
			whole.y = whole.y[min(rows, len(whole.y)):]
		}
		return tasks
	}
	rows, _ := whole.w.Dims()
	for from := 0; from < rows; from += most {
		t := whole
		t.from, t.to = from, min(from+most, rows)
		tasks = append(tasks, t)
	}
	return tasks
}

// run computes one task.
func (v *vectors[F]) run(t task[F], s *scratch[F]) {
	if t.tokens == 0 || t.stopped() {
		return
	}
	from := t.from
	switch w := t.w.(type) {
	case PackedMXFP4:
		blocks, scales := w.PackedMXFP4()
		from = v.stream(t, v.mxfp4, blocks, groupColumns/2, scales)
	case PackedBF16:
		data := w.PackedBF16()
		from = v.stream(t, v.bf16, data, 2*groupColumns, data)
	}
	for ; from < t.to; from += panelRows {
		v.panel(t, from, min(panelRows, t.to-from), s)
	}
}

// stream multiplies packed rows as they are stored, some tokens at a time, and
// returns the first row that it left: less than a kernel's rows. After the first
// tokens the rows of a task (taskRows) come from the L2 cache.
//
// A kernel's rows are as far apart as the task allows, so that each of them is
// followed by the next one of its own part: a few long streams, which processors
// fetch ahead. Of rows that lie side by side each stream ends after a page or two,
// which costs a third of the bandwidth.
func (v *vectors[F]) stream(t task[F], s streams[F], data []byte, groupBytes int, scales []byte) int {
	if t.tokens > s.most || len(s.kernels) == 0 {
		return t.from
	}
	groups := t.cols / groupColumns
	size := int(unsafe.Sizeof(t.x[0]))
	done := t.to
	passes := (t.tokens + len(s.kernels) - 1) / len(s.kernels)
	for pass := range passes { // of almost the same number of tokens: a kernel for one is slow
		token := pass * t.tokens / passes
		k := s.kernels[(pass+1)*t.tokens/passes-token-1]
		apart := (t.to - t.from) / k.rows
		for row := t.from; row < t.from+apart; row++ {
			at := row * groups
			k.run(groups, &t.x[token*t.cols], t.cols*size, &data[at*groupBytes], apart*groups*groupBytes,
				&scales[at], apart*groups, &t.y[token*t.stride+row], t.stride*size, apart*size)
		}
		done = min(done, t.from+apart*k.rows)
	}
	return done
}

// panel decodes up to panelRows rows and multiplies them with all tokens.
func (v *vectors[F]) panel(t task[F], from, n int, s *scratch[F]) {
	kernelRows := v.blocks[0].rows
	padded := (n + kernelRows - 1) / kernelRows * kernelRows
	tile := grow(&s.tile, padded*t.cols)
	v.decode(t, from, n, tile, s)
	for first := 0; first < t.tokens; first += panelTokens {
		v.multiplyTile(t, tile, from, n, first, min(panelTokens, t.tokens-first), s)
	}
}

// multiplyTile multiplies a decoded tile with tokens [first, first+tokens).
func (v *vectors[F]) multiplyTile(t task[F], tile []F, from, n, first, tokens int, s *scratch[F]) {
	kernelRows, most := v.blocks[0].rows, len(v.blocks)
	size := int(unsafe.Sizeof(tile[0]))
	rowBlocks := (n + kernelRows - 1) / kernelRows
	acc := grow(&s.acc, rowBlocks*kernelRows*tokens*v.lanes)
	clear(acc)
	const step = panelGroups * groupColumns
	for column := 0; column < t.cols; column += step {
		groups := min(step, t.cols-column) / groupColumns
		for b := range rowBlocks {
			w := &tile[b*kernelRows*t.cols+column]
			for token := 0; token < tokens; token += most {
				k := v.blocks[min(most, tokens-token)-1]
				k.run(groups, &t.x[(first+token)*t.cols+column], t.cols*size, w, t.cols*size,
					&acc[(b*tokens+token)*kernelRows*v.lanes])
			}
		}
	}
	sums := grow(&s.sums, len(acc)/v.lanes)
	v.reduce(len(sums), &acc[0], &sums[0])
	for token := 0; token < tokens; token += most {
		width := min(most, tokens-token)
		for i := range width {
			y := t.y[(first+token+i)*t.stride+from:][:n]
			for b := 0; b < n; b += kernelRows {
				part := sums[b*tokens+token*kernelRows+i:]
				for r := range y[b:min(b+kernelRows, n)] {
					y[b+r] = part[r*width]
				}
			}
		}
	}
}

// decode fills a tile with rows [from, from+n), in the kernels' order.
func (v *vectors[F]) decode(t task[F], from, n int, tile []F, s *scratch[F]) {
	groups := t.cols / groupColumns
	at := from * groups
	switch w := t.w.(type) {
	case Magnitudes:
		t.w = w.Magnitudes()
		v.decode(t, from, n, tile, s)
		for i, x := range tile {
			tile[i] = F(math.Abs(float64(x)))
		}
		return
	case PackedMXFP4:
		if v.decodeMXFP4 != nil {
			blocks, scales := w.PackedMXFP4()
			v.decodeMXFP4(n*groups, &blocks[at*groupColumns/2], &scales[at], &tile[0])
			return
		}
	case PackedBF16:
		if v.decodeBF16 != nil {
			data := w.PackedBF16()
			v.decodeBF16(n*groups, &data[at*2*groupColumns], &data[at], &tile[0])
			return
		}
	}
	narrow := grow(&s.narrow, n*t.cols)
	t.w.Rows(narrow, from, n)
	wide, ok := any(narrow).([]F)
	if !ok {
		wide = grow(&s.wide, n*t.cols)
		for i, x := range narrow {
			wide[i] = F(x)
		}
	}
	v.arrange(tile, wide)
}

// split puts the even columns of every group of 32 before the odd ones: so they
// lie in the bytes of MXFP4 (low and high half) and bfloat16 (pairs).
func split(dst, x []float32) {
	for g := 0; g+groupColumns <= len(x); g += groupColumns {
		in, out := (*[groupColumns]float32)(x[g:]), (*[groupColumns]float32)(dst[g:])
		for i := range groupColumns / 2 {
			out[i], out[groupColumns/2+i] = in[2*i], in[2*i+1]
		}
	}
}

// inOrder leaves the columns as they are.
func inOrder(dst, x []float64) { copy(dst, x) }

// scratch is a worker's memory, kept from one product to the next.
type scratch[F Float] struct {
	tile, acc, sums, wide []F
	narrow                []float32
}

var scratches = [2]sync.Pool{
	{New: func() any { return new(scratch[float32]) }},
	{New: func() any { return new(scratch[float64]) }},
}

func scratchPool[F Float]() *sync.Pool {
	var f F
	return &scratches[unsafe.Sizeof(f)/8]
}

func scratchOf[F Float]() *scratch[F] { return scratchPool[F]().Get().(*scratch[F]) }

func (s *scratch[F]) free() { scratchPool[F]().Put(s) }

// grow returns n elements of a slice that is kept.
func grow[F Float](kept *[]F, n int) []F {
	if cap(*kept) < n {
		*kept = make([]F, n)
	}
	return (*kept)[:n]
}
