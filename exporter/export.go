// Package exporter writes gpt-oss models as ONNX graphs, with the weights beside
// the graph as the checkpoint stores them.
//
// A graph is made by a value of stage functions, one file per stage as in package
// reference, whose arithmetic it shares nothing with: only the configuration, the
// checkpoint's views and the registry of taps are common.
package exporter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// Versions of the format. Opset 21 and IR 10 are those of ONNX 1.16 (March
// 2024): recent enough for every operator used here, old enough for runtimes
// other than the newest.
const (
	opset     = 21
	irVersion = 10
	// E8M0 scales exist from IR 12 (ONNX 1.19, August 2025) on.
	irVersionE8M0 = 12
)

// Producer is the name that graphs give as their maker.
const Producer = "gptoss"

// Experts says how the experts' weights are stored.
type Experts string

const (
	// ExpertsPacked keeps MXFP4 as the checkpoint has it, and decodes in the graph.
	ExpertsPacked Experts = "packed"
	// ExpertsDense stores decoded weights, bfloat16 where that is exact.
	ExpertsDense Experts = "dense"
)

// Operators names an operator set.
type Operators string

const (
	// OperatorsPortable is ONNX's standard operators, for any runtime.
	OperatorsPortable Operators = "portable"
	// OperatorsONNXRuntime adds ONNX Runtime's own attention and mixture of experts.
	OperatorsONNXRuntime Operators = "onnxruntime"
)

// Options says which graph to write. The zero value is a graph of dynamic length
// that puts out logits.
type Options struct {
	SequenceLength int       // tokens of every run; 0: any number
	Operators      Operators // empty: portable
	Experts        Experts   // empty: packed if the checkpoint is
	HiddenStates   bool      // put out embedding, the residual stream and final_norm
	BlockDebug     bool      // put out every other tap
	Precision      Precision // empty: float32
	// KVCache makes a graph that continues a sequence: keys and values of earlier
	// tokens go in and come out (see cache.go). It takes any number of tokens, and
	// SequenceLength, if it is not 0, is the most that a sequence can grow to.
	KVCache bool
	// Functions writes blocks, and operations that several stages share, as
	// model-local functions, each once; otherwise every node stands in the graph.
	Functions bool
	// LastLogitsOnly puts out logits [1, vocab] of the last token alone.
	LastLogitsOnly bool
	Stages         *Stages // nil: those of Operators
	Version        string  // of the program, for the metadata

	// Validate is called with the finished graph under a temporary name, before it
	// gets its own. If it returns an error, nothing is left behind.
	Validate func(ctx context.Context, path string) error
	// Progress is told how much of the data file is written.
	Progress func(written, total int64)
}

func (o Options) withDefaults(m *checkpoint.Model) Options {
	if o.Experts == "" {
		o.Experts = ExpertsDense
		if storesPacked(m) {
			o.Experts = ExpertsPacked
		}
	}
	if o.Operators == "" {
		o.Operators = OperatorsPortable
	}
	if o.Precision == "" {
		o.Precision = PrecisionFloat32
	}
	if o.Stages == nil {
		stages := Portable()
		if o.Operators == OperatorsONNXRuntime {
			stages = ONNXRuntime()
		}
		o.Stages = &stages
	}
	return o
}

// storesPacked reports whether the experts are MXFP4; all are stored alike.
func storesPacked(m *checkpoint.Model) bool {
	for _, b := range m.Blocks {
		for _, weight := range slices.Concat(b.MLP1, b.MLP2) {
			_, packed := weight.(checkpoint.MXFP4)
			return packed
		}
	}
	return true // a stage that needs no experts
}

func (o Options) check() error {
	if o.SequenceLength < 0 {
		return fmt.Errorf("sequence length %d is negative", o.SequenceLength)
	}
	if o.Experts != ExpertsPacked && o.Experts != ExpertsDense {
		return fmt.Errorf("experts can be packed or dense, not %q", o.Experts)
	}
	if o.Operators != OperatorsPortable && o.Operators != OperatorsONNXRuntime {
		return fmt.Errorf("operators can be portable or onnxruntime, not %q", o.Operators)
	}
	if o.KVCache && o.SequenceLength == 1 {
		return errors.New("a sequence of at most 1 token has nothing to cache: use a longer one, or no KV cache")
	}
	_, err := ParsePrecision(string(o.Precision))
	return err
}

// Export writes a model as path and path.data. Both are complete when they get
// their names: a failure, or the context's end, leaves what was there before.
//
// The same model and options give the same bytes.
func Export(ctx context.Context, m *checkpoint.Model, path string, o Options) error {
	o = o.withDefaults(m)
	if err := o.check(); err != nil {
		return err
	}
	g, err := build(m, o)
	if err != nil {
		return err
	}
	g.layOut(dataName(path))
	// The digest reads all weights, and so does the data file: at the same time
	// each page comes from the disk once.
	var digest string
	group, groupContext := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		digest, err = m.Digest(groupContext)
		return err
	})
	if o.Precision == PrecisionFloat16 {
		group.Go(func() error { return weightsFitFloat16(groupContext, m) })
	}
	return write(ctx, g, path, o, func(write func(ctx context.Context) error) (*onnxpb.ModelProto, error) {
		group.Go(func() error { return write(groupContext) })
		if err := group.Wait(); err != nil {
			return nil, err
		}
		message := g.message("gpt-oss")
		describe(message, m, o, digest)
		return message, nil
	})
}

func dataName(path string) string { return filepath.Base(path) + ".data" }

// write puts weights and graph under temporary names and renames them. The graph
// comes from finish, which is given the function that writes the weights.
func write(ctx context.Context, g *Graph, path string, o Options, finish func(write func(ctx context.Context) error) (*onnxpb.ModelProto, error)) error {
	if err := checkSpace(filepath.Dir(path), g.dataSize); err != nil {
		return err
	}
	// A directory, because the graph names its data file: both must have their own
	// names to be loaded for validation.
	work, err := os.MkdirTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	graphFile, dataFile := filepath.Join(work, filepath.Base(path)), filepath.Join(work, dataName(path))
	var progress func(int64)
	if total := g.dataSize; o.Progress != nil {
		progress = func(written int64) { o.Progress(written, total) }
	}
	message, err := finish(func(ctx context.Context) error {
		return writeFile(dataFile, func(w *os.File) error { return g.writeData(ctx, w, progress) })
	})
	if err != nil {
		return err
	}
	graphBytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return err
	}
	if err := os.WriteFile(graphFile, graphBytes, 0o666); err != nil {
		return err
	}
	if o.Validate != nil {
		if err := o.Validate(ctx, graphFile); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return publish(graphFile, dataFile, path)
}

// writeFile creates a file and reports every error, the last write's included.
func writeFile(path string, write func(*os.File) error) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return write(f)
}

// publish renames the data file and the graph. If the second rename fails, the
// older data file is put back, so that an older graph keeps its own weights.
func publish(graphFile, dataFile, path string) error {
	data := path + ".data"
	backup := dataFile + ".older"
	hadOlder, err := setAside(data, backup)
	if err != nil {
		return err
	}
	putBack := func(err error) error {
		if hadOlder {
			return errors.Join(err, os.Rename(backup, data))
		}
		return err
	}
	if err := os.Rename(dataFile, data); err != nil {
		return putBack(err)
	}
	if err := os.Rename(graphFile, path); err != nil {
		if !hadOlder {
			err = errors.Join(err, os.Remove(data))
		}
		return putBack(err)
	}
	return nil
}

// setAside gives a file a second name, or another one where the file system has
// no links, and reports whether there was one.
func setAside(path, backup string) (bool, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if info.IsDir() {
		return false, fmt.Errorf("%s is a directory", path)
	}
	if os.Link(path, backup) == nil {
		return true, nil
	}
	return true, os.Rename(path, backup)
}
