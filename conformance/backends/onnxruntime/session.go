// Package onnxruntime runs ONNX graphs of gpt-oss, ours and strangers', in ONNX
// Runtime, and hands out their results under the registry's names.
package onnxruntime

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// environment loads the shared library once per process.
var environment = sync.OnceValue(func() error {
	path, err := library.Path()
	if err != nil {
		return err
	}
	// The official libraries for Linux report every session to their maker unless
	// they are told not to (since 1.29; this is how, before they are loaded).
	if err := os.Setenv("ORT_DISABLE_TELEMETRY", "1"); err != nil {
		return err
	}
	ort.SetSharedLibraryPath(path)
	// Errors are returned; the runtime need not print them too.
	if err := ort.InitializeEnvironment(ort.WithLogLevelFatal()); err != nil {
		return fmt.Errorf("loading ONNX Runtime from %s: %w", path, err)
	}
	return nil
})

// Version returns the version of the runtime that is loaded.
func Version() (string, error) {
	if err := environment(); err != nil {
		return "", err
	}
	return ort.GetVersion(), nil
}

// Names of inputs that can be filled in.
const (
	inputIDs      = "input_ids"
	attentionMask = "attention_mask"
	positionIDs   = "position_ids"
	pastLength    = exporter.PastLength
)

// Session is a graph that is loaded and ready to run. It is safe for concurrent
// use.
type Session struct {
	path    string
	session *ort.DynamicAdvancedSession
	inputs  []input
	outputs []output
	cache   []cached
	fixed   int // tokens of every run, or 0 for any number
	close   sync.Once
	background
}

// input is an input of the graph and what it is fed with.
type input struct {
	ort.InputOutputInfo
	role string
}

// output is an output of the graph that the registry knows.
type output struct {
	ort.InputOutputInfo
	tap string
}

// OpenContext is [Open], and returns as soon as the context ends. The runtime
// cannot be stopped while it loads a graph: it goes on in the background, and
// what it loaded is closed.
func OpenContext(ctx context.Context, path string, o Options) (*Session, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return await(ctx, func() (*Session, error) { return Open(path, o) }, func(s *Session) { s.Close() })
}

// Open loads a graph, with or without a KV cache. It must have one input of token ids, int64 or int32, [T]
// or [1, T], and an output called logits (or be its only output); outputs under
// other names are not run. A graph of another form is an error that says what
// it has.
func Open(path string, o Options) (*Session, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	if err := environment(); err != nil {
		return nil, err
	}
	settings, err := o.settings()
	if err != nil {
		return nil, err
	}
	defer settings.Destroy()
	look, err := introspection()
	if err != nil {
		return nil, err
	}
	defer look.Destroy()
	inputs, outputs, err := ort.GetInputOutputInfoWithOptions(path, look)
	if err != nil {
		return nil, fmt.Errorf("%s: ONNX Runtime does not load it: %s", path, oneLine(err))
	}
	s := &Session{path: path}
	if err := s.recognize(inputs, outputs, o.Names); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var in, out []string
	for _, i := range s.inputs {
		in = append(in, i.Name)
	}
	for _, o := range s.outputs {
		out = append(out, o.Name)
	}
	for _, c := range s.cache {
		in, out = append(in, c.Name), append(out, c.present)
	}
	s.session, err = ort.NewDynamicAdvancedSession(path, in, out, settings)
	if err != nil {
		return nil, fmt.Errorf("%s: ONNX Runtime does not load it: %s", path, oneLine(err))
	}
	return s, nil
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// recognize decides what every input is fed with and which outputs are run.
func (s *Session) recognize(inputs, outputs []ort.InputOutputInfo, names map[string]string) error {
	if len(inputs) == 0 {
		return errors.New("the graph has no inputs: expected input_ids")
	}
	inputNames, outputNames := map[string]bool{}, map[string]bool{}
	for _, i := range inputs {
		inputNames[i.Name] = true
	}
	for _, o := range outputs {
		outputNames[o.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !inputNames[name] && !outputNames[name] {
			return fmt.Errorf("the graph has no input or output called %q: it has %s", name, list(inputs, outputs))
		}
	}
	ours := func(name string) string {
		if mapped, ok := names[name]; ok {
			return mapped
		}
		return name
	}

	tokens := 0
	for _, i := range inputs {
		in := input{i, ours(i.Name)}
		if len(inputs) == 1 {
			in.role = inputIDs
		}
		switch in.role {
		case inputIDs:
			tokens++
		case attentionMask, positionIDs:
		case pastLength:
			if !slices.Equal(in.Dimensions, ort.Shape{1}) || in.DataType != ort.TensorElementDataTypeInt64 {
				return fmt.Errorf("input %s holds %s %v, expected int64 [1]", in.Name, typeName(i), in.Dimensions)
			}
			s.inputs = append(s.inputs, in)
			continue
		default:
			if _, ok := presentOf(i.Name); ok {
				c, err := acceptCache(i, outputNames)
				if err != nil {
					return err
				}
				s.cache = append(s.cache, c)
				continue
			}
			return fmt.Errorf("input %s is none of input_ids, attention_mask and position_ids: map it to one (the graph has %s)",
				i.Name, list(inputs, outputs))
		}
		if err := s.accept(in); err != nil {
			return err
		}
		s.inputs = append(s.inputs, in)
	}
	if tokens != 1 {
		return fmt.Errorf("%d inputs are token ids, expected 1: map one to input_ids (the graph has %s)", tokens, list(inputs, outputs))
	}

	seen, present := map[string]bool{}, map[string]bool{}
	for _, c := range s.cache {
		present[c.present] = true
	}
	for _, o := range outputs {
		tap := ours(o.Name)
		if len(outputs) == 1+len(present) && !present[o.Name] {
			tap = taps.Logits
		}
		if _, ok := rank(tap); !ok {
			continue
		}
		if o.OrtValueType != ort.ONNXTypeTensor {
			return fmt.Errorf("output %s is not a tensor", o.Name)
		}
		if seen[tap] {
			return fmt.Errorf("two outputs are %s", tap)
		}
		seen[tap] = true
		s.outputs = append(s.outputs, output{o, tap})
	}
	if len(s.outputs) == 0 {
		return fmt.Errorf("no output is one that can be judged: map one to logits (the graph has %s)", list(inputs, outputs))
	}
	return nil
}

// accept checks an input's type and shape, and learns the length if it is fixed.
func (s *Session) accept(in input) error {
	if in.OrtValueType != ort.ONNXTypeTensor ||
		in.DataType != ort.TensorElementDataTypeInt64 && in.DataType != ort.TensorElementDataTypeInt32 {
		return fmt.Errorf("input %s holds %s, expected int64 or int32", in.Name, typeName(in.InputOutputInfo))
	}
	dims := in.Dimensions
	if len(dims) != 1 && len(dims) != 2 {
		return fmt.Errorf("input %s has shape %v, expected [tokens] or [1, tokens]", in.Name, dims)
	}
	if len(dims) == 2 && dims[0] > 1 {
		return fmt.Errorf("input %s is a batch of %d sequences: only one can be run", in.Name, dims[0])
	}
	length := dims[len(dims)-1]
	switch {
	case length == 0 || length > math.MaxInt32:
		return fmt.Errorf("input %s has shape %v", in.Name, dims)
	case length < 0:
		return nil
	case s.fixed != 0 && s.fixed != int(length):
		return fmt.Errorf("inputs have different lengths, %d and %d", s.fixed, length)
	}
	s.fixed = int(length)
	return nil
}

// list names the graph's inputs and outputs, for errors; long lists are cut.
func list(inputs, outputs []ort.InputOutputInfo) string {
	words := func(infos []ort.InputOutputInfo) string {
		var names []string
		for _, i := range infos[:min(len(infos), 8)] {
			names = append(names, fmt.Sprintf("%s %s %v", i.Name, typeName(i), i.Dimensions))
		}
		if more := len(infos) - len(names); more > 0 {
			names = append(names, fmt.Sprintf("and %d more", more))
		}
		return strings.Join(names, ", ")
	}
	return "inputs " + words(inputs) + "; outputs " + words(outputs)
}

func typeName(i ort.InputOutputInfo) string {
	if i.OrtValueType != ort.ONNXTypeTensor {
		return "no tensor"
	}
	return strings.ToLower(strings.TrimPrefix(i.DataType.String(), "ONNX_TENSOR_ELEMENT_DATA_TYPE_"))
}

// rank returns the number of dimensions of a tap, and whether there is such a tap
// in any model.
func rank(tap string) (int, bool) {
	layer, _ := taps.Split(tap)
	shape, err := taps.Shape(config.Config{Layers: layer + 1}, tap, 1)
	return len(shape), err == nil
}

// Outputs lists the names of the registry that the graph puts out.
func (s *Session) Outputs() []string {
	names := make([]string, len(s.outputs))
	for i, o := range s.outputs {
		names[i] = o.tap
	}
	return names
}

// Length returns the number of tokens that every run of the graph has, or 0 if
// it is free. Shorter prompts are padded at the end, where a causal model does
// not look, and the padding's results are dropped.
func (s *Session) Length() int { return s.fixed }

// Close releases the session, if a cancelled run is still in it when that has
// ended.
func (s *Session) Close() error {
	var err error
	s.close.Do(func() { err = s.whenIdle(s.session.Destroy) })
	return err
}

// Metadata returns what the graph says of itself.
func (s *Session) Metadata() (map[string]string, error) {
	m, err := s.session.GetModelMetadata()
	if err != nil {
		return nil, err
	}
	defer m.Destroy()
	keys, err := m.GetCustomMetadataMapKeys()
	if err != nil {
		return nil, err
	}
	properties := map[string]string{}
	for _, key := range keys {
		value, ok, err := m.LookupCustomMetadataMap(key)
		if err != nil {
			return nil, err
		}
		if ok {
			properties[key] = value
		}
	}
	if producer, err := m.GetProducerName(); err == nil && producer != "" {
		properties["producer"] = producer
	}
	return properties, nil
}

// Run feeds tokens and returns every output that the registry knows, in its
// shape. When the context ends, it returns at once and the runtime stops as soon as
// it can; the session stays usable.
func (s *Session) Run(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error) {
	return s.RunTaps(ctx, tokens, nil)
}

// RunTaps is Run, and returns only the outputs wanted (nil: all).
func (s *Session) RunTaps(ctx context.Context, tokens []int32, wanted []string) (map[string]tensor.Tensor, error) {
	var past []ort.Value
	defer func() { s.release(past) }()
	for _, c := range s.cache {
		v, err := c.empty()
		if err != nil {
			return nil, err
		}
		past = append(past, v)
	}
	results, present, err := s.forward(ctx, tokens, 0, past)
	if err != nil {
		return nil, err
	}
	s.release(present)
	if wanted != nil {
		maps.DeleteFunc(results, func(name string, _ tensor.Tensor) bool { return !slices.Contains(wanted, name) })
	}
	return results, nil
}

// release destroys values as soon as no abandoned run uses them.
func (s *Session) release(values []ort.Value) error {
	return s.whenIdle(func() error {
		var failures []error
		for _, v := range values {
			if v != nil {
				failures = append(failures, v.Destroy())
			}
		}
		return errors.Join(failures...)
	})
}

// forward runs tokens that come after as many earlier ones as start says, whose
// keys and values are in past. It returns the outputs and the cache that goes on;
// the caller destroys it.
func (s *Session) forward(ctx context.Context, tokens []int32, start int, past []ort.Value) (map[string]tensor.Tensor, []ort.Value, error) {
	if err := s.checkTokens(ctx, tokens); err != nil {
		return nil, nil, err
	}
	length := len(tokens)
	if s.fixed > 0 {
		length = s.fixed
	}
	inputs := make([]ort.Value, 0, len(s.inputs)+len(past))
	outputs := make([]ort.Value, len(s.outputs)+len(s.cache))
	defer func() {
		s.release(inputs[:min(len(inputs), len(s.inputs))])
		s.release(outputs)
	}()
	for _, in := range s.inputs {
		v, err := in.value(tokens, start, length)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: input %s: %w", s.path, in.Name, err)
		}
		inputs = append(inputs, v)
	}
	inputs = append(inputs, past...)
	for i, out := range s.outputs {
		v, err := out.allocate(length)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: output %s: %w", s.path, out.Name, err)
		}
		outputs[i] = v
	}
	if err := s.run(ctx, inputs, outputs); err != nil {
		return nil, nil, err
	}
	results := make(map[string]tensor.Tensor, len(s.outputs))
	for i, out := range s.outputs {
		t, err := out.tensor(outputs[i])
		if err == nil {
			t, err = rows(t, length, len(tokens))
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: output %s: %w", s.path, out.Name, err)
		}
		results[out.tap] = t
	}
	present := outputs[len(s.outputs):]
	outputs = outputs[:len(s.outputs)]
	return results, present, nil
}

func (s *Session) checkTokens(ctx context.Context, tokens []int32) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(tokens) == 0 {
		return fmt.Errorf("%s: no tokens: a run needs at least one", s.path)
	}
	for i, id := range tokens {
		if id < 0 {
			return fmt.Errorf("%s: token %d has id %d, outside the vocabulary", s.path, i, id)
		}
	}
	if s.fixed > 0 && len(tokens) > s.fixed {
		return fmt.Errorf("%s: %d tokens do not fit a graph of fixed length %d", s.path, len(tokens), s.fixed)
	}
	return nil
}

// run calls the runtime. When the context ends it tells the runtime to stop, and
// does not wait until it has: inputs and outputs stay in use until the session is
// idle.
func (s *Session) run(ctx context.Context, inputs, outputs []ort.Value) error {
	options, err := ort.NewRunOptions()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		err := s.session.RunWithOptions(inputs, outputs, options)
		runtime.KeepAlive(inputs)
		done <- err
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		options.Terminate()
		s.begin()
		go func() {
			<-done
			options.Destroy()
			s.end()
		}()
		return ctx.Err()
	}
	options.Destroy()
	if err != nil {
		return fmt.Errorf("%s: %s", s.path, oneLine(err))
	}
	return nil
}

// value makes the tensor that an input is fed with, for tokens after start
// earlier ones.
func (in input) value(tokens []int32, start, length int) (ort.Value, error) {
	if in.role == pastLength {
		return ort.NewTensor(ort.NewShape(1), []int64{int64(start)})
	}
	values := make([]int64, length)
	switch in.role {
	case inputIDs:
		for i, id := range tokens {
			values[i] = int64(id)
		}
	case attentionMask:
		// The mask covers the cache too.
		values = make([]int64, start+length)
		for i := range start + len(tokens) {
			values[i] = 1
		}
	case positionIDs:
		for i := range values {
			values[i] = int64(start + i)
		}
	}
	shape := ort.NewShape(int64(len(values)))
	if len(in.Dimensions) == 2 {
		shape = ort.NewShape(1, int64(len(values)))
	}
	if in.DataType == ort.TensorElementDataTypeInt64 {
		return ort.NewTensor(shape, values)
	}
	narrow := make([]int32, len(values))
	for i, v := range values {
		narrow[i] = int32(v)
	}
	return ort.NewTensor(shape, narrow)
}

// allocate makes room for an output of a 16-bit type, which the binding cannot
// do by itself; others are left to the runtime (nil).
func (o output) allocate(length int) (ort.Value, error) {
	if o.DataType != ort.TensorElementDataTypeFloat16 && o.DataType != ort.TensorElementDataTypeBFloat16 {
		return nil, nil
	}
	want, _ := rank(o.tap)
	shape := o.Dimensions.Clone()
	// Only the batch and the tokens may be unknown: then they are 1 and length.
	first := len(shape) - want
	if first != 0 && first != 1 {
		return nil, fmt.Errorf("has shape %v, expected %d dimensions", shape, want)
	}
	size := int64(2)
	for i, d := range shape {
		if d < 0 && i > first {
			return nil, fmt.Errorf("has shape %v: the runtime's binding needs to know all but the tokens of a 16-bit output; cast it to float32 in the graph", shape)
		}
		if d < 0 {
			shape[i] = 1
			if i == first {
				shape[i] = int64(length)
			}
		}
		if shape[i] == 0 || size > math.MaxInt/shape[i] {
			return nil, fmt.Errorf("has shape %v", o.Dimensions)
		}
		size *= shape[i]
	}
	return ort.NewCustomDataTensor(shape, make([]byte, size), o.DataType)
}

// tensor takes the runtime's value over, without a batch dimension of 1.
func (o output) tensor(v ort.Value) (tensor.Tensor, error) {
	shape := make([]int, 0, 4)
	for _, d := range v.GetShape() {
		shape = append(shape, int(d))
	}
	want, _ := rank(o.tap)
	if len(shape) == want+1 && shape[0] == 1 {
		shape = shape[1:]
	}
	if len(shape) != want {
		return tensor.Tensor{}, fmt.Errorf("has shape %v, expected %d dimensions", v.GetShape(), want)
	}
	if taps.Integer(o.tap) {
		switch v := v.(type) {
		case *ort.Tensor[int32]:
			return tensor.FromInt32s(shape, v.GetData()), nil
		case *ort.Tensor[int64]:
			narrow := make([]int32, len(v.GetData()))
			for i, wide := range v.GetData() {
				if wide != int64(int32(wide)) {
					return tensor.Tensor{}, fmt.Errorf("element %d is %d, more than int32 can hold", i, wide)
				}
				narrow[i] = int32(wide)
			}
			return tensor.FromInt32s(shape, narrow), nil
		}
		return tensor.Tensor{}, fmt.Errorf("holds %s, expected int32 or int64", typeName(o.InputOutputInfo))
	}
	switch v := v.(type) {
	case *ort.Tensor[float32]:
		return tensor.FromFloat32s(shape, v.GetData()), nil
	case *ort.Tensor[float64]:
		return tensor.FromFloat64s(shape, v.GetData()), nil
	case *ort.CustomDataTensor:
		storage := map[ort.TensorElementDataType]tensor.DType{
			ort.TensorElementDataTypeFloat16: tensor.F16, ort.TensorElementDataTypeBFloat16: tensor.BF16,
		}
		if dtype, ok := storage[o.DataType]; ok {
			return tensor.Tensor{DType: dtype, Shape: shape, Data: slices.Clone(v.GetData())}, nil
		}
	}
	return tensor.Tensor{}, fmt.Errorf("holds %s, expected reals", typeName(o.InputOutputInfo))
}

// rows drops the padding's rows. A graph that puts out the last row alone has put
// out that of the padding.
func rows(t tensor.Tensor, length, tokens int) (tensor.Tensor, error) {
	if length == tokens {
		// A first dimension other than the tokens is for the judge to refuse.
		return t, nil
	}
	if len(t.Shape) == 0 || t.Shape[0] != length || len(t.Data)%length != 0 {
		return t, fmt.Errorf("has shape %v for a padded run of %d tokens: give the graph all of its %d", t.Shape, tokens, length)
	}
	t.Data = t.Data[:len(t.Data)/length*tokens]
	t.Shape = append([]int{tokens}, t.Shape[1:]...)
	return t, nil
}
