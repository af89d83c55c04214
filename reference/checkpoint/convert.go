package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// How experts can be written to Hugging Face's layout.
const (
	ExpertsMXFP4 = "mxfp4"
	ExpertsDense = "dense" // dequantized and transposed
)

// WriteOptions say how [Model.Write] writes. The zero value keeps every value.
type WriteOptions struct {
	// Experts is ExpertsMXFP4 or ExpertsDense. Empty: MXFP4 in OpenAI's and
	// Hugging Face's layouts. Flax and Equinox have dense experts only, OpenAI
	// MXFP4 only.
	Experts string
	// DType is BF16, F32 or F16 for all dense arrays, which must hold them
	// exactly. Empty: BF16 for every array that bfloat16 holds exactly, else F32;
	// Equinox: F32, because its loader wants the same everywhere and can't read
	// its own bfloat16 files back. Norm scales are F32 in Flax and Equinox.
	DType tensor.DType
	// Quantize rounds experts that are no MXFP4, instead of refusing them.
	Quantize bool
	// ShardBytes splits OpenAI's and Hugging Face's files before they grow larger
	// than this. 0: one file.
	ShardBytes int64
	// Progress, if not nil, is called by several goroutines with the bytes
	// written so far and in all.
	Progress func(written, total int64)
}

// Cut returns the model of the first layers. Closing either closes the files.
func (m *Model) Cut(layers int) (*Model, error) {
	if layers < 1 || layers > m.Config.Layers {
		return nil, fmt.Errorf("%s: has %d layers, so it can't be cut to %d", m.Source.Path, m.Config.Layers, layers)
	}
	cut := *m
	cut.Config.Layers, cut.Config.Sliding = layers, m.Config.Sliding[:layers]
	cut.Blocks = m.Blocks[:layers]
	return &cut, nil
}

// Write writes the model in a layout. The path is a directory for OpenAI and
// HuggingFace, and a file .msgpack or .eqx for Flax and Equinox, or a directory
// in which to put model.msgpack or model.eqx. Configurations are written beside
// the weights under the names that [OpenWith] finds.
//
// What the layout can't hold is an error. Nothing appears under its final name
// before everything is complete, and nothing is left behind on an error. Memory
// stays below 300 MiB whatever the checkpoint's size.
func (m *Model) Write(ctx context.Context, layout, path string, o WriteOptions) error {
	p := plan{Model: m, options: o}
	if err := p.check(layout); err != nil {
		return err
	}
	if err := p.chooseTypes(ctx, layout); err != nil {
		return err
	}
	var outputs []*output
	var items map[*output][]item
	var err error
	made, err := p.directory(layout, path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			for _, d := range made { // the innermost first; only if still empty
				os.Remove(d)
			}
		}
	}()
	switch layout {
	case OpenAI:
		outputs, items, err = p.openAI(path)
	case HuggingFace:
		outputs, items, err = p.huggingFace(path)
	case Flax:
		outputs, items, err = p.flax(path)
	case Equinox:
		outputs, items, err = p.equinox(path)
	}
	if err != nil {
		return err
	}
	w := writer{model: m, quantize: o.Quantize, progress: o.Progress}
	err = w.write(ctx, outputs, items)
	return err
}

// plan turns a model into tensors of a layout.
type plan struct {
	*Model
	options WriteOptions
	types   map[string]tensor.DType // of dense tensors, by canonical name
}

func (p *plan) check(layout string) error {
	o := p.options
	switch layout {
	case OpenAI:
		if o.Experts == ExpertsDense {
			return errors.New("OpenAI's layout has its experts in MXFP4 only")
		}
	case HuggingFace:
	case Flax, Equinox:
		if o.Experts == ExpertsMXFP4 {
			return fmt.Errorf("the %s layout has dense experts only", layout)
		}
		if o.ShardBytes != 0 {
			return fmt.Errorf("the %s layout is one file", layout)
		}
	default:
		return fmt.Errorf("no layout is called %q; there are %s, %s, %s and %s", layout, OpenAI, HuggingFace, Flax, Equinox)
	}
	if !slices.Contains([]string{"", ExpertsMXFP4, ExpertsDense}, o.Experts) {
		return fmt.Errorf("experts are %s or %s, not %q", ExpertsMXFP4, ExpertsDense, o.Experts)
	}
	if o.DType != "" && !isDense(o.DType) {
		return fmt.Errorf("weights are stored as %s, not %s", denseTypes, o.DType)
	}
	if o.ShardBytes < 0 {
		return errors.New("a shard can't have less than no bytes")
	}
	if p.mxfp4(layout) && (p.Config.HiddenSize%groupValues != 0 || p.Config.IntermediateSize%groupValues != 0) {
		return fmt.Errorf("MXFP4 needs widths that are multiples of %d, not %d and %d", groupValues, p.Config.HiddenSize, p.Config.IntermediateSize)
	}
	return nil
}

// mxfp4 reports whether the experts will be MXFP4.
func (p *plan) mxfp4(layout string) bool {
	return layout == OpenAI || layout == HuggingFace && p.options.Experts != ExpertsDense
}

// directory makes the directories that the files go to, and returns those that
// were not there. A directory that holds another checkpoint is refused: its
// files would be taken for parts of the new one.
func (p *plan) directory(layout, path string) (made []string, err error) {
	directory := path
	if layout == Flax || layout == Equinox {
		directory = filepath.Dir(filePath(layout, path))
	}
	for d := filepath.Clean(directory); ; d = filepath.Dir(d) {
		if info, err := os.Stat(d); err == nil {
			if !info.IsDir() {
				return nil, fmt.Errorf("%s: is not a directory", d)
			}
			break
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		made = append(made, d)
		if d == filepath.Dir(d) {
			break
		}
	}
	if err := os.MkdirAll(directory, 0o777); err != nil {
		return nil, err
	}
	if layout == OpenAI || layout == HuggingFace {
		entries, err := os.ReadDir(directory)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".safetensors") || e.Name() == indexName {
				return nil, fmt.Errorf("%s: holds a checkpoint already (%s); remove it or write elsewhere", directory, e.Name())
			}
		}
	}
	return made, nil
}

// filePath is where Flax's or Equinox's file goes.
func filePath(layout, path string) string {
	suffix := flaxSuffix
	if layout == Equinox {
		suffix = equinoxSuffix
	}
	if strings.HasSuffix(path, suffix) {
		return path
	}
	return filepath.Join(path, "model"+suffix)
}

// chooseTypes finds out how each dense tensor is stored: see WriteOptions.DType.
func (p *plan) chooseTypes(ctx context.Context, layout string) error {
	p.types = map[string]tensor.DType{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	exact := map[string]*atomic.Bool{}
	for _, t := range p.canonical() {
		name, _, _ := splitExpert(t.name)
		choice := p.options.DType
		if choice == "" && layout == Equinox {
			choice = tensor.F32
		}
		if choice != "" {
			p.types[name] = choice
			continue
		}
		if isExpert(name) && p.mxfp4(layout) {
			continue
		}
		if exact[name] == nil {
			exact[name] = new(atomic.Bool)
			exact[name].Store(true)
		}
		is := exact[name] // not the map, which this loop goes on writing
		group.Go(func() error {
			if is.Load() && !allBF16(ctx, t.matrix) {
				is.Store(false)
			}
			return ctx.Err()
		})
	}
	err := group.Wait()
	for name, is := range exact {
		p.types[name] = tensor.F32
		if is.Load() {
			p.types[name] = tensor.BF16
		}
	}
	return err
}

// splitExpert takes an expert's number off a canonical name.
func splitExpert(name string) (stem, expert string, ok bool) {
	at := strings.LastIndexByte(name, '.')
	if at > 0 && (strings.HasSuffix(name[:at], "_weight") || strings.HasSuffix(name[:at], "_bias")) {
		return name[:at], name[at+1:], true
	}
	return name, "", false
}

func isExpert(name string) bool { return strings.HasSuffix(name, "_weight") }

// allBF16 reports whether a matrix's values are all bfloat16.
func allBF16(ctx context.Context, m Matrix) bool {
	for _, part := range flatten([]Matrix{m}) {
		switch s := part.(type) {
		case BF16, MXFP4:
			continue
		case Transposed:
			if s.DType == tensor.BF16 {
				continue
			}
		case Chunked:
			if s.DType == tensor.BF16 {
				continue
			}
		}
		if stored, ok := asStored(part); ok {
			part = stored // in the order of the file, which is faster
		}
		rows, cols := part.Dims()
		step := max(tileValues/cols, 1)
		values := make([]float32, min(step, rows)*cols)
		for from := 0; from < rows && ctx.Err() == nil; from += step {
			n := min(step, rows-from)
			part.Rows(values, from, n)
			if !isBF16(values[:n*cols]) {
				return false
			}
		}
	}
	return true
}

// Makers of items. The canonical name says which type was chosen.

func (p *plan) matrix(name, canonical string, transposed bool, parts ...Matrix) item {
	rows := 0
	cols := 0
	for _, m := range parts {
		r, c := m.Dims()
		rows, cols = rows+r, c
	}
	shape := []int{rows, cols}
	if transposed {
		shape = []int{cols, rows}
	}
	return item{Spec: tensor.Spec{Name: name, DType: p.types[canonical], Shape: shape}, parts: parts, transposed: transposed}
}

func (p *plan) vector(name, canonical string, v []float32) item {
	i := p.matrix(name, canonical, false, Dense{1, len(v), v})
	i.Shape = []int{len(v)}
	return i
}

func (p *plan) vectors(name, canonical string, rows [][]float32) item {
	parts := make([]Matrix, len(rows))
	for i, v := range rows {
		parts[i] = Dense{1, len(v), v}
	}
	return p.matrix(name, canonical, false, parts...)
}

func (p *plan) experts(name, canonical string, transposed bool, parts []Matrix) item {
	i := p.matrix(name, canonical, transposed, parts...)
	rows, cols := parts[0].Dims()
	i.Shape = []int{len(parts), rows, cols}
	if transposed {
		i.Shape = []int{len(parts), cols, rows}
	}
	return i
}

func packedExperts(blocks, scales string, parts []Matrix) []item {
	rows, cols := parts[0].Dims()
	return []item{
		{Spec: tensor.Spec{Name: blocks, DType: tensor.U8, Shape: []int{len(parts), rows, cols / groupValues, groupBytes}}, parts: parts, scales: scales},
		{Spec: tensor.Spec{Name: scales, DType: tensor.U8, Shape: []int{len(parts), rows, cols / groupValues}}},
	}
}

// textFile is a small file that is written with the others.
func textFile(path string, data []byte) *output {
	o := &output{path: path}
	o.put(data)
	return o
}
