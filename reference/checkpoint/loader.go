package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// IssuesError lists everything that is wrong with a checkpoint. Each issue is
// one line that names the file and the tensor.
type IssuesError struct {
	Issues []string
}

// Error returns the first issue, and how many more there are.
func (e *IssuesError) Error() string {
	if len(e.Issues) == 1 {
		return e.Issues[0]
	}
	return fmt.Sprintf("%s (and %d more)", e.Issues[0], len(e.Issues)-1)
}

// maxIssues bounds the list: a wrong configuration makes every tensor wrong.
const maxIssues = 10000

// TensorInfo describes a tensor of the files that a model was opened from.
type TensorInfo struct {
	Name  string       `json:"name"`
	DType tensor.DType `json:"dtype"`
	Shape []int        `json:"shape"`
	Bytes int64        `json:"bytes"`
	File  string       `json:"file"`
}

// check is something whose values must be finite.
type check struct {
	what   string // `FILE: tensor "NAME"`
	matrix Matrix
}

// located is a tensor and the file that it is in. Flax stores large arrays in
// several pieces; then Data is nil.
type located struct {
	tensor.Tensor
	path   string
	chunks [][]byte // of equal size, but the last
}

// loader takes a checkpoint's tensors apart. What is wrong is collected.
type loader struct {
	config     config.Config
	configFile string
	layout     string
	paths      []string // of the files
	mappings   []*tensor.Mapping
	names      []string // in file order
	tensors    map[string]located
	used       map[string]bool
	bytes      int64
	issues     []string
	checks     []check
}

func newLoader(configFile string) *loader {
	return &loader{configFile: configFile, tensors: map[string]located{}, used: map[string]bool{}}
}

// add makes a mapped file one of the checkpoint's.
func (l *loader) add(m *tensor.Mapping) {
	l.mappings = append(l.mappings, m)
	l.paths = append(l.paths, m.Path())
	l.bytes += m.Size()
}

func (l *loader) close() error {
	var errs []error
	for _, m := range l.mappings {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

func (l *loader) issue(format string, arguments ...any) {
	if len(l.issues) < maxIssues {
		l.issues = append(l.issues, fmt.Sprintf(format, arguments...))
	}
}

func (l *loader) result() error {
	if len(l.issues) > 0 {
		return &IssuesError{l.issues}
	}
	return nil
}

// open adds a file. One that holds nothing of gpt-oss is left alone.
func (l *loader) open(path string) error {
	f, err := tensor.OpenSafetensors(path)
	if err != nil {
		return err
	}
	names := f.Names()
	if layoutOf(names) == "" {
		return f.Close()
	}
	l.add(f.Mapping)
	for _, name := range names {
		t, _ := f.Tensor(name)
		if other, ok := l.tensors[name]; ok {
			return fmt.Errorf("%s: tensor %q is also in %s", path, name, other.path)
		}
		l.tensors[name] = located{t, path, nil}
		l.names = append(l.names, name)
	}
	return nil
}

func (l *loader) infos() []TensorInfo {
	infos := make([]TensorInfo, 0, len(l.names))
	for _, name := range l.names {
		t := l.tensors[name]
		infos = append(infos, TensorInfo{name, t.DType, t.Shape, int64(t.size()), t.path})
	}
	return infos
}

// take returns a tensor after checking its presence, shape and dtype.
func (l *loader) take(name string, accept func(tensor.DType) bool, wantType string, shape ...int) (located, bool) {
	t, ok := l.tensors[name]
	if !ok {
		l.issue("%s: tensor %q is missing: the configuration calls for %s %v", l.where(), name, wantType, shape)
		return t, false
	}
	l.used[name] = true
	if !accept(t.DType) {
		l.issue("%s: tensor %q is %s, want %s", t.path, name, t.DType, wantType)
		return t, false
	}
	if !slices.Equal(t.Shape, shape) {
		l.issue("%s: tensor %q has shape %v, but %s calls for %v", t.path, name, t.Shape, l.configFile, shape)
		return t, false
	}
	return t, true
}

// where names the files, for errors about a tensor that none of them has.
func (l *loader) where() string {
	if len(l.paths) == 1 {
		return l.paths[0]
	}
	return fmt.Sprintf("%s and %d more files", l.paths[0], len(l.paths)-1)
}

const denseTypes = "BF16, F16 or F32"

// vector returns a small tensor's values, which it checks to be finite.
func (l *loader) vector(name string, n int) []float32 {
	t, ok := l.take(name, isDense, denseTypes, n)
	if !ok {
		return nil
	}
	return l.decode(name, t)
}

func (l *loader) decode(name string, t located) []float32 {
	values := make([]float32, t.Elements())
	t.view(1, len(values), 0, false).Rows(values, 0, 1)
	for i, v := range values {
		if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
			l.issue("%s: tensor %q is not finite at element %d", t.path, name, i)
			break
		}
	}
	return values
}

// vectors returns the rows of a small tensor [count, n].
func (l *loader) vectors(name string, count, n int) [][]float32 {
	t, ok := l.take(name, isDense, denseTypes, count, n)
	if !ok {
		return nil
	}
	values := l.decode(name, t)
	rows := make([][]float32, count)
	for i := range rows {
		rows[i] = values[i*n : (i+1)*n : (i+1)*n]
	}
	return rows
}

// matrix returns a view of a dense tensor.
func (l *loader) matrix(name string, rows, cols int) Matrix {
	t, ok := l.take(name, isDense, denseTypes, rows, cols)
	if !ok {
		return nil
	}
	m := t.view(rows, cols, 0, false)
	l.watch(t, name, m)
	return m
}

// kernel returns a view of a dense tensor that is stored [inputs, outputs].
func (l *loader) kernel(name string, rows, cols int) Matrix {
	t, ok := l.take(name, isDense, denseTypes, cols, rows)
	if !ok {
		return nil
	}
	m := t.view(rows, cols, 0, true)
	l.watch(t, name, m)
	return m
}

// stacked returns views of the experts' matrices in a dense tensor, each
// [rows, cols] or transposed [cols, rows].
func (l *loader) stacked(name string, experts, rows, cols int, transposed bool) []Matrix {
	shape := []int{experts, rows, cols}
	if transposed {
		shape = []int{experts, cols, rows}
	}
	t, ok := l.take(name, isDense, denseTypes, shape...)
	if !ok {
		return nil
	}
	out := make([]Matrix, experts)
	for e := range out {
		out[e] = t.view(rows, cols, e*rows*cols, transposed)
		l.checks = append(l.checks, check{fmt.Sprintf("%s: tensor %q, expert %d", t.path, name, e), out[e]})
	}
	return out
}

func (l *loader) watch(t located, name string, m Matrix) {
	l.checks = append(l.checks, check{fmt.Sprintf("%s: tensor %q", t.path, name), m})
}

// size returns the bytes of the data.
func (t located) size() int {
	n := len(t.Data)
	for _, c := range t.chunks {
		n += len(c)
	}
	return n
}

// view returns the matrix that begins at an element of the tensor.
func (t located) view(rows, cols, at int, transposed bool) Matrix {
	if t.chunks != nil {
		return Chunked{rows, cols, t.DType, transposed, at, t.chunks}
	}
	size := t.DType.Size()
	data := t.Data[at*size : (at+rows*cols)*size]
	if transposed {
		return Transposed{rows, cols, t.DType, data}
	}
	return dense(t.DType, rows, cols, data)
}

// mxfp4 returns views of the experts' matrices in MXFP4.
func (l *loader) mxfp4(blocks, scales string, experts, rows, cols int) []Matrix {
	if cols%groupValues != 0 {
		l.issue("%s: %d inputs are no multiple of %d, which MXFP4 (tensor %q) needs", l.configFile, cols, groupValues, blocks)
		return nil
	}
	groups := cols / groupValues
	isU8 := func(d tensor.DType) bool { return d == tensor.U8 }
	b, okBlocks := l.take(blocks, isU8, "U8", experts, rows, groups, groupBytes)
	s, okScales := l.take(scales, isU8, "U8", experts, rows, groups)
	if !okBlocks || !okScales {
		return nil
	}
	out := make([]Matrix, experts)
	size := rows * groups
	for e := range out {
		m := MXFP4{rows, cols, b.Data[e*size*groupBytes : (e+1)*size*groupBytes], s.Data[e*size : (e+1)*size]}
		out[e] = m
		l.checks = append(l.checks, check{fmt.Sprintf("%s: tensor %q, expert %d", b.path, blocks, e), m})
	}
	return out
}

// finish reports what is wrong, or completes the model. Small checkpoints are
// checked for values that are not finite.
func (l *loader) finish(m *Model) error {
	for _, name := range l.names {
		if !l.used[name] {
			l.issue("%s: tensor %q is unexpected: a model of %d layers in the %s layout has none of this name",
				l.tensors[name].path, name, l.config.Layers, l.layout)
		}
	}
	if err := l.result(); err != nil {
		return err
	}
	m.Config, m.Source.Layout = l.config, l.layout
	m.tensors, m.checks, m.mappings = l.infos(), l.checks, l.mappings
	if l.bytes <= checkAllBelow {
		return m.Check(context.Background())
	}
	return nil
}
