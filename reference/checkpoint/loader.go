package checkpoint

import (
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

type located struct {
	tensor.Tensor
	file *tensor.File
}

// loader takes a checkpoint's tensors apart. What is wrong is collected.
type loader struct {
	config     config.Config
	configFile string
	files      []*tensor.File
	names      []string // in file order
	tensors    map[string]located
	used       map[string]bool
	bytes      int64
	issues     []string
	checks     []check
}

func (l *loader) close() error {
	var errs []error
	for _, f := range l.files {
		errs = append(errs, f.Close())
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
	l.files = append(l.files, f)
	l.bytes += f.Size()
	for _, name := range names {
		t, _ := f.Tensor(name)
		if other, ok := l.tensors[name]; ok {
			return fmt.Errorf("%s: tensor %q is also in %s", path, name, other.file.Path())
		}
		l.tensors[name] = located{t, f}
		l.names = append(l.names, name)
	}
	return nil
}

func (l *loader) infos() []TensorInfo {
	infos := make([]TensorInfo, 0, len(l.names))
	for _, name := range l.names {
		t := l.tensors[name]
		infos = append(infos, TensorInfo{name, t.DType, t.Shape, int64(len(t.Data)), t.file.Path()})
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
		l.issue("%s: tensor %q is %s, want %s", t.file.Path(), name, t.DType, wantType)
		return t, false
	}
	if !slices.Equal(t.Shape, shape) {
		l.issue("%s: tensor %q has shape %v, but %s calls for %v", t.file.Path(), name, t.Shape, l.configFile, shape)
		return t, false
	}
	return t, true
}

// where names the files, for errors about a tensor that none of them has.
func (l *loader) where() string {
	if len(l.files) == 1 {
		return l.files[0].Path()
	}
	return fmt.Sprintf("%s and %d more files", l.files[0].Path(), len(l.files)-1)
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
	widen(t.DType, values, t.Data)
	for i, v := range values {
		if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
			l.issue("%s: tensor %q is not finite at element %d", t.file.Path(), name, i)
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
	m := dense(t.DType, rows, cols, t.Data)
	l.watch(t, name, m)
	return m
}

func (l *loader) watch(t located, name string, m Matrix) {
	l.checks = append(l.checks, check{fmt.Sprintf("%s: tensor %q", t.file.Path(), name), m})
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
		l.checks = append(l.checks, check{fmt.Sprintf("%s: tensor %q, expert %d", b.file.Path(), blocks, e), m})
	}
	return out
}

// transposed returns views of the experts' matrices that are stored
// [experts, cols, rows].
func (l *loader) transposed(name string, experts, rows, cols int) []Matrix {
	t, ok := l.take(name, isDense, denseTypes, experts, cols, rows)
	if !ok {
		return nil
	}
	size := rows * cols * t.DType.Size()
	out := make([]Matrix, experts)
	for e := range out {
		m := Transposed{rows, cols, t.DType, t.Data[e*size : (e+1)*size]}
		out[e] = m
		l.checks = append(l.checks, check{fmt.Sprintf("%s: tensor %q, expert %d", t.file.Path(), name, e), m})
	}
	return out
}
