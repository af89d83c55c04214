package onnxruntime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// New returns our exporter and ONNX Runtime as an implementation: every
// checkpoint is exported on the spot, with all taps, and run.
func New(name string, export exporter.Options, o Options) conformance.Implementation {
	export.HiddenStates, export.BlockDebug = true, true
	return implementation{name, export, o}
}

type implementation struct {
	name    string
	export  exporter.Options
	options Options
}

func (i implementation) Name() string { return i.name }

func (i implementation) Precision() reference.Precision {
	if i.export.Precision == "" {
		return reference.Float32
	}
	return reference.Precision(i.export.Precision)
}

func (i implementation) Open(ctx context.Context, dir string) (conformance.Instance, error) {
	weights, err := checkpoint.Open(dir)
	if err != nil {
		return nil, err
	}
	defer weights.Close()
	work, err := os.MkdirTemp("", "gptoss-onnxruntime-*")
	if err != nil {
		return nil, err
	}
	path := filepath.Join(work, filepath.Base(dir)+".onnx")
	if err := exporter.Export(ctx, weights, path, i.export); err != nil {
		return nil, errors.Join(err, os.RemoveAll(work))
	}
	session, err := OpenContext(ctx, path, i.options)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(work))
	}
	return &instance{session, work}, nil
}

type instance struct {
	session *Session
	work    string
}

func (i *instance) Close() error { return errors.Join(i.session.Close(), os.RemoveAll(i.work)) }

func (i *instance) Forward(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error) {
	return i.session.RunTaps(ctx, tokens, []string{taps.Logits})
}

func (i *instance) ForwardTaps(ctx context.Context, tokens []int32, names []string) (map[string]tensor.Tensor, error) {
	return i.session.RunTaps(ctx, tokens, names)
}

// Decode starts a sequence, if the graph has a KV cache.
func (i *instance) Decode(context.Context) (conformance.Decoding, error) {
	d, err := i.session.Decode()
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Graph returns a graph of unknown make as an implementation. The graph holds
// its own weights, so the checkpoint that it is opened with only has to be the
// same model.
func Graph(name, path string, precision reference.Precision, o Options) conformance.Implementation {
	return graph{name, path, precision, o}
}

type graph struct {
	name, path string
	precision  reference.Precision
	options    Options
}

func (g graph) Name() string                   { return g.name }
func (g graph) Precision() reference.Precision { return g.precision }

func (g graph) Open(ctx context.Context, _ string) (conformance.Instance, error) {
	session, err := OpenContext(ctx, g.path, g.options)
	if err != nil {
		return nil, err
	}
	return &instance{session: session}, nil
}

// RunStage exports a graph of the stage alone and runs it.
func (i implementation) RunStage(ctx context.Context, in conformance.StageInput) (map[string]tensor.Tensor, error) {
	work, err := os.MkdirTemp("", "gptoss-onnxruntime-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	path := filepath.Join(work, "stage.onnx")
	if err := exporter.ExportStage(ctx, in.Model, in.Layer, in.Taps, path, i.export); err != nil {
		return nil, err
	}
	if err := environment(); err != nil {
		return nil, err
	}
	look, err := introspection()
	if err != nil {
		return nil, err
	}
	defer look.Destroy()
	inputs, outputs, err := ort.GetInputOutputInfoWithOptions(path, look)
	if err != nil {
		return nil, fmt.Errorf("stage of %v: %s", in.Taps, oneLine(err))
	}
	return i.runStage(ctx, path, in, inputs, outputs)
}

func (i implementation) runStage(ctx context.Context, path string, in conformance.StageInput, inputs, outputs []ort.InputOutputInfo) (map[string]tensor.Tensor, error) {
	var inputNames, outputNames []string
	var given, results []ort.Value
	s := &Session{path: path}
	defer func() {
		s.release(given)
		s.release(results)
	}()
	for _, info := range inputs {
		v, err := stageInput(in, info)
		if err != nil {
			return nil, fmt.Errorf("stage of %v: input %s: %w", in.Taps, info.Name, err)
		}
		inputNames, given = append(inputNames, info.Name), append(given, v)
	}
	for _, info := range outputs {
		outputNames = append(outputNames, info.Name)
	}
	results = make([]ort.Value, len(outputs))
	settings, err := i.options.settings()
	if err != nil {
		return nil, err
	}
	defer settings.Destroy()
	if s.session, err = ort.NewDynamicAdvancedSession(path, inputNames, outputNames, settings); err != nil {
		return nil, fmt.Errorf("stage of %v: %s", in.Taps, oneLine(err))
	}
	defer s.Close()
	if err := s.run(ctx, given, results); err != nil {
		return nil, fmt.Errorf("stage of %v: %w", in.Taps, err)
	}
	named := make(map[string]tensor.Tensor, len(in.Taps))
	for k, info := range outputs {
		for _, tap := range in.Taps {
			if exporter.StageOutput(tap) != info.Name {
				continue
			}
			full := tap
			if _, ok := rank(tap); !ok {
				full = taps.Block(0, tap)
			}
			if named[tap], err = (output{info, full}).tensor(results[k]); err != nil {
				return nil, fmt.Errorf("stage of %v: output %s: %w", in.Taps, tap, err)
			}
		}
	}
	return named, nil
}

// stageInput makes one of the tensors that a stage's graph reads.
func stageInput(in conformance.StageInput, info ort.InputOutputInfo) (ort.Value, error) {
	integers := func(shape []int, n int, at func(int) int64) (ort.Value, error) {
		values := make([]int64, n)
		for k := range values {
			values[k] = at(k)
		}
		return ort.NewTensor(wide(shape), values)
	}
	switch info.Name {
	case exporter.TokensInput:
		return integers([]int{len(in.Tokens)}, len(in.Tokens), func(k int) int64 { return int64(in.Tokens[k]) })
	case exporter.PositionsInput:
		return integers([]int{len(in.Positions)}, len(in.Positions), func(k int) int64 { return int64(in.Positions[k]) })
	}
	t, ok := in.Inputs[info.Name]
	if !ok {
		return nil, errors.New("is missing")
	}
	if info.Name == taps.ExpertIndices {
		indices, err := t.Int32s()
		if err != nil {
			return nil, err
		}
		for _, expert := range indices {
			if expert < 0 || int(expert) >= in.Model.Config.Experts {
				return nil, fmt.Errorf("names expert %d of %d", expert, in.Model.Config.Experts)
			}
		}
		return integers(t.Shape, len(indices), func(k int) int64 { return int64(indices[k]) })
	}
	values, err := t.Float32s()
	if err != nil {
		return nil, err
	}
	return ort.NewTensor(wide(t.Shape), values)
}

func wide(shape []int) ort.Shape {
	dims := make(ort.Shape, len(shape))
	for i, d := range shape {
		dims[i] = int64(d)
	}
	return dims
}
