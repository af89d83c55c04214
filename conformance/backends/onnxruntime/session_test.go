package onnxruntime

import (
	"bytes"
	"context"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	ort "github.com/yalue/onnxruntime_go"
	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Small graphs of other people's making.

func value(name string, typ exporter.Type, dims ...any) *onnxpb.ValueInfoProto {
	shape := &onnxpb.TensorShapeProto{}
	for _, d := range dims {
		dim := &onnxpb.TensorShapeProto_Dimension{}
		switch d := d.(type) {
		case int:
			dim.Value = &onnxpb.TensorShapeProto_Dimension_DimValue{DimValue: int64(d)}
		case string:
			dim.Value = &onnxpb.TensorShapeProto_Dimension_DimParam{DimParam: d}
		}
		shape.Dim = append(shape.Dim, dim)
	}
	return &onnxpb.ValueInfoProto{Name: proto.String(name), Type: &onnxpb.TypeProto{Value: &onnxpb.TypeProto_TensorType{
		TensorType: &onnxpb.TypeProto_Tensor{ElemType: proto.Int32(int32(typ)), Shape: shape},
	}}}
}

func operator(op string, inputs, outputs string, attributes ...*onnxpb.AttributeProto) *onnxpb.NodeProto {
	return &onnxpb.NodeProto{OpType: proto.String(op), Input: strings.Fields(inputs), Output: strings.Fields(outputs), Attribute: attributes}
}

func castTo(typ exporter.Type) *onnxpb.AttributeProto {
	return &onnxpb.AttributeProto{Name: proto.String("to"), Type: onnxpb.AttributeProto_INT.Enum(), I: proto.Int64(int64(typ))}
}

func constant(name string, typ exporter.Type, dims []int64, data []byte) *onnxpb.TensorProto {
	return &onnxpb.TensorProto{Name: proto.String(name), DataType: proto.Int32(int32(typ)), Dims: dims, RawData: data}
}

var one = constant("one", exporter.Int64, []int64{1}, []byte{1, 0, 0, 0, 0, 0, 0, 0})

func write(t *testing.T, g *onnxpb.GraphProto) string {
	t.Helper()
	g.Name = proto.String("stranger")
	data, err := proto.Marshal(&onnxpb.ModelProto{
		IrVersion: proto.Int64(10), Graph: g,
		OpsetImport: []*onnxpb.OperatorSetIdProto{{Domain: proto.String(""), Version: proto.Int64(21)}},
	})
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "stranger.onnx")
	require.NoError(t, os.WriteFile(path, data, 0o644))
	return path
}

// echo puts out an input as reals [T, 1].
func echo(input, output string, typ exporter.Type) []*onnxpb.NodeProto {
	return []*onnxpb.NodeProto{
		operator("Cast", input, output+".cast", castTo(typ)),
		operator("Unsqueeze", output+".cast one", output),
	}
}

func open(t *testing.T, path string, o Options) *Session {
	t.Helper()
	s, err := Open(path, o)
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

func reals(t *testing.T, x tensor.Tensor) []float64 {
	t.Helper()
	values, err := x.Float64s()
	require.NoError(t, err)
	return values
}

func TestEveryFloatTypeComesOut(t *testing.T) {
	for typ, dtype := range map[exporter.Type]tensor.DType{
		exporter.Float32: tensor.F32, exporter.Float16: tensor.F16, exporter.BFloat16: tensor.BF16,
		onnxpb.TensorProto_DOUBLE: tensor.F64,
	} {
		s := open(t, write(t, &onnxpb.GraphProto{
			Input:  []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, "T")},
			Output: []*onnxpb.ValueInfoProto{value("logits", typ, "T", 1)},
			Node:   echo("input_ids", "logits", typ), Initializer: []*onnxpb.TensorProto{one},
		}), Options{})
		out, err := s.Run(t.Context(), []int32{3, 1, 4})
		require.NoError(t, err)
		require.Equal(t, dtype, out["logits"].DType)
		require.Equal(t, []int{3, 1}, out["logits"].Shape)
		require.Equal(t, []float64{3, 1, 4}, reals(t, out["logits"]))
	}
}

// A graph as transformers' exporters write them: a batch of one, a mask and
// positions, other names.
func TestStrangersGraph(t *testing.T) {
	batch := func(input, output string) []*onnxpb.NodeProto {
		return []*onnxpb.NodeProto{
			operator("Cast", input, output+".cast", castTo(exporter.Float32)),
			operator("Unsqueeze", output+".cast two", output),
		}
	}
	two := constant("two", exporter.Int64, []int64{1}, []byte{2, 0, 0, 0, 0, 0, 0, 0})
	path := write(t, &onnxpb.GraphProto{
		Input: []*onnxpb.ValueInfoProto{
			value("ids", exporter.Int32, "B", "T"), value("attention_mask", exporter.Int64, "B", "T"), value("position_ids", exporter.Int64, 1, "T"),
		},
		Output: []*onnxpb.ValueInfoProto{
			value("scores", exporter.Float32, "B", "T", 1), value("embedding", exporter.Float32, "B", "T", 1), value("final_norm", exporter.Float32, 1, "T", 1),
			value("unrelated", exporter.Float32, "B", "T", 1),
		},
		Node: append(append(append(batch("ids", "scores"), batch("attention_mask", "embedding")...),
			batch("position_ids", "final_norm")...), batch("ids", "unrelated")...),
		Initializer: []*onnxpb.TensorProto{two},
	})
	s := open(t, path, Options{Names: map[string]string{"ids": "input_ids", "scores": "logits"}})
	require.ElementsMatch(t, []string{"logits", "embedding", "final_norm"}, s.Outputs())
	out, err := s.Run(t.Context(), []int32{7, 8, 9})
	require.NoError(t, err)
	require.Equal(t, []int{3, 1}, out["logits"].Shape)
	require.Equal(t, []float64{7, 8, 9}, reals(t, out["logits"]))
	require.Equal(t, []float64{1, 1, 1}, reals(t, out["embedding"]))
	require.Equal(t, []float64{0, 1, 2}, reals(t, out["final_norm"]))

	_, err = Open(path, Options{})
	require.ErrorContains(t, err, "input ids is none of input_ids")
	_, err = Open(path, Options{Names: map[string]string{"nope": "logits"}})
	require.ErrorContains(t, err, `no input or output called "nope"`)
}

func TestOnlyOutputIsLogits(t *testing.T) {
	s := open(t, write(t, &onnxpb.GraphProto{
		Input:  []*onnxpb.ValueInfoProto{value("x", exporter.Int64, "T")},
		Output: []*onnxpb.ValueInfoProto{value("y", exporter.Float32, "T", 1)},
		Node:   echo("x", "y", exporter.Float32), Initializer: []*onnxpb.TensorProto{one},
	}), Options{})
	require.Equal(t, []string{"logits"}, s.Outputs())
}

// Padding is added at the end and its results are dropped.
func TestFixedLengthIsPadded(t *testing.T) {
	s := open(t, write(t, &onnxpb.GraphProto{
		Input:  []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, 5)},
		Output: []*onnxpb.ValueInfoProto{value("logits", exporter.BFloat16, 5, 1)},
		Node:   echo("input_ids", "logits", exporter.BFloat16), Initializer: []*onnxpb.TensorProto{one},
	}), Options{})
	require.Equal(t, 5, s.Length())
	out, err := s.Run(t.Context(), []int32{1, 2, 3})
	require.NoError(t, err)
	require.Equal(t, []int{3, 1}, out["logits"].Shape)
	require.Equal(t, []float64{1, 2, 3}, reals(t, out["logits"]))
	_, err = s.Run(t.Context(), []int32{1, 2, 3, 4, 5, 6})
	require.ErrorContains(t, err, "6 tokens do not fit a graph of fixed length 5")
}

func TestLastLogitsOfPaddingAreRefused(t *testing.T) {
	path, m := toyGraph(t, exporter.Options{SequenceLength: 5, LastLogitsOnly: true})
	s := open(t, path, Options{})
	out, err := s.Run(t.Context(), []int32{1, 2, 3, 4, 5})
	require.NoError(t, err)
	require.Equal(t, []int{1, m.Config.VocabSize}, out[taps.Logits].Shape)
	_, err = s.Run(t.Context(), []int32{1, 2, 3})
	require.ErrorContains(t, err, "give the graph all of its 5")
}

func TestGraphsThatCannotBeRunAreRefused(t *testing.T) {
	ids := value("input_ids", exporter.Int64, "T")
	logits := value("logits", exporter.Float32, "T", 1)
	nodes := echo("input_ids", "logits", exporter.Float32)
	initializers := []*onnxpb.TensorProto{one}
	for _, c := range []struct {
		name, want string
		graph      *onnxpb.GraphProto
	}{
		{"no inputs", "no inputs", &onnxpb.GraphProto{
			Output:      []*onnxpb.ValueInfoProto{value("logits", exporter.Int64, 1)},
			Node:        []*onnxpb.NodeProto{operator("Identity", "one", "logits")},
			Initializer: initializers,
		}},
		{"reals as ids", "holds float, expected int64 or int32", &onnxpb.GraphProto{
			Input:  []*onnxpb.ValueInfoProto{value("input_ids", exporter.Float32, "T", 1)},
			Output: []*onnxpb.ValueInfoProto{logits}, Node: []*onnxpb.NodeProto{operator("Identity", "input_ids", "logits")},
		}},
		{"rank 3", "expected [tokens] or [1, tokens]", &onnxpb.GraphProto{
			Input:  []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, 1, "T", 1)},
			Output: []*onnxpb.ValueInfoProto{value("logits", exporter.Int64, 1, "T", 1)}, Node: []*onnxpb.NodeProto{operator("Identity", "input_ids", "logits")},
		}},
		{"batch", "batch of 2 sequences", &onnxpb.GraphProto{
			Input:  []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, 2, "T")},
			Output: []*onnxpb.ValueInfoProto{value("logits", exporter.Int64, 2, "T")}, Node: []*onnxpb.NodeProto{operator("Identity", "input_ids", "logits")},
		}},
		{"length 0", "has shape [0]", &onnxpb.GraphProto{
			Input:  []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, 0)},
			Output: []*onnxpb.ValueInfoProto{value("logits", exporter.Int64, 0)}, Node: []*onnxpb.NodeProto{operator("Identity", "input_ids", "logits")},
		}},
		{"no known output", "no output is one that can be judged", &onnxpb.GraphProto{
			Input: []*onnxpb.ValueInfoProto{ids}, Initializer: initializers,
			Output: []*onnxpb.ValueInfoProto{value("a", exporter.Float32, "T", 1), value("b", exporter.Float32, "T", 1)},
			Node:   append(echo("input_ids", "a", exporter.Float32), echo("input_ids", "b", exporter.Float32)...),
		}},
		{"unknown input", "input extra is none of", &onnxpb.GraphProto{
			Input:  []*onnxpb.ValueInfoProto{ids, value("extra", exporter.Int64, "T")},
			Output: []*onnxpb.ValueInfoProto{logits}, Node: nodes, Initializer: initializers,
		}},
		{"not a graph", "does not load", &onnxpb.GraphProto{
			Input: []*onnxpb.ValueInfoProto{ids}, Output: []*onnxpb.ValueInfoProto{logits},
			Node: []*onnxpb.NodeProto{operator("NoSuchOperator", "input_ids", "logits")},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := write(t, c.graph)
			_, err := Open(path, Options{})
			require.ErrorContains(t, err, c.want)
			require.ErrorContains(t, err, path)
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestResultsThatCannotBeJudgedAreRefused(t *testing.T) {
	ids := value("input_ids", exporter.Int64, "T")
	for _, c := range []struct {
		name, want string
		output     *onnxpb.ValueInfoProto
		nodes      []*onnxpb.NodeProto
	}{
		{"integers", "holds int64, expected reals", value("logits", exporter.Int64, "T", 1), []*onnxpb.NodeProto{operator("Unsqueeze", "input_ids one", "logits")}},
		{"rank 1", "expected 2 dimensions", value("logits", exporter.Float32, "T"), []*onnxpb.NodeProto{operator("Cast", "input_ids", "logits", castTo(exporter.Float32))}},
		{"rank 1 in 16 bits", "expected 2 dimensions", value("logits", exporter.Float16, "T"), []*onnxpb.NodeProto{operator("Cast", "input_ids", "logits", castTo(exporter.Float16))}},
		{"unknown width in 16 bits", "cast it to float32", value("logits", exporter.Float16, "T", "W"), []*onnxpb.NodeProto{
			operator("NonZero", "input_ids", "positions"), operator("Cast", "positions", "logits", castTo(exporter.Float16)),
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := write(t, &onnxpb.GraphProto{
				Input: []*onnxpb.ValueInfoProto{ids}, Output: []*onnxpb.ValueInfoProto{c.output},
				Node: c.nodes, Initializer: []*onnxpb.TensorProto{one},
			})
			s, err := Open(path, Options{})
			if err == nil {
				defer s.Close()
				_, err = s.Run(t.Context(), []int32{1, 2})
			}
			require.ErrorContains(t, err, c.want)
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestFilesThatAreNoGraphs(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(filepath.Join(dir, "missing.onnx"), Options{})
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Open(dir, Options{})
	require.ErrorContains(t, err, "is not a file")
	for name, data := range map[string][]byte{
		"empty": nil, "text": []byte("this is not a graph"), "zeros": make([]byte, 1000), "ones": bytes.Repeat([]byte{0xff}, 1000),
	} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, data, 0o644))
		_, err := Open(path, Options{})
		require.Error(t, err, name)
		require.NotContains(t, err.Error(), "\n")
	}
}

// Our own graph of the toy fixture.
func toyGraph(t *testing.T, o exporter.Options) (string, *checkpoint.Model) {
	t.Helper()
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	path := filepath.Join(t.TempDir(), "toy.onnx")
	require.NoError(t, exporter.Export(t.Context(), m, path, o))
	return path, m
}

func TestDamagedExportsAreRefused(t *testing.T) {
	path, _ := toyGraph(t, exporter.Options{})
	graph, err := os.ReadFile(path)
	require.NoError(t, err)
	for _, cut := range []int{len(graph) / 3, len(graph) - 1} {
		require.NoError(t, os.WriteFile(path, graph[:cut], 0o644))
		_, err = Open(path, Options{})
		require.ErrorContains(t, err, "does not load")
	}
	require.NoError(t, os.WriteFile(path, graph, 0o644))
	require.NoError(t, os.Truncate(path+".data", 1000))
	_, err = Open(path, Options{})
	require.ErrorContains(t, err, "does not load")
	require.NoError(t, os.Remove(path+".data"))
	_, err = Open(path, Options{})
	require.ErrorContains(t, err, "does not load")
}

func TestTokensAreChecked(t *testing.T) {
	path, m := toyGraph(t, exporter.Options{})
	s := open(t, path, Options{})
	_, err := s.Run(t.Context(), nil)
	require.ErrorContains(t, err, "at least one")
	_, err = s.Run(t.Context(), []int32{1, -1})
	require.ErrorContains(t, err, "token 1 has id -1")
	_, err = s.Run(t.Context(), []int32{int32(m.Config.VocabSize)})
	require.Error(t, err)
	require.NotContains(t, err.Error(), "\n")
	// The session survives.
	out, err := s.Run(t.Context(), []int32{1})
	require.NoError(t, err)
	require.Equal(t, []int{1, m.Config.VocabSize}, out[taps.Logits].Shape)
}

// endless is a graph that counts to the first token's id, one step of a Loop at a
// time: with a large id no run of it ends by itself.
func endless(t *testing.T) string {
	t.Helper()
	body := &onnxpb.GraphProto{
		Name: proto.String("body"),
		Input: []*onnxpb.ValueInfoProto{
			value("i", exporter.Int64), value("go", exporter.Bool), value("sum", exporter.Int64, 1),
		},
		Output: []*onnxpb.ValueInfoProto{value("on", exporter.Bool), value("next", exporter.Int64, 1)},
		Node:   []*onnxpb.NodeProto{operator("Identity", "go", "on"), operator("Add", "sum one", "next")},
	}
	return write(t, &onnxpb.GraphProto{
		Input:  []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, "T")},
		Output: []*onnxpb.ValueInfoProto{value("logits", exporter.Float32, 1, 1)},
		Node: append([]*onnxpb.NodeProto{
			operator("Gather", "input_ids zero", "count"),
			{
				OpType: proto.String("Loop"), Input: []string{"count", "", "start"}, Output: []string{"total"},
				Attribute: []*onnxpb.AttributeProto{{Name: proto.String("body"), Type: onnxpb.AttributeProto_GRAPH.Enum(), G: body}},
			},
		}, echo("total", "logits", exporter.Float32)...),
		Initializer: []*onnxpb.TensorProto{
			one, constant("zero", exporter.Int64, nil, make([]byte, 8)), constant("start", exporter.Int64, []int64{1}, make([]byte, 8)),
		},
	})
}

// watched is a context that tells when somebody begins to wait for its end.
type watched struct {
	context.Context
	once  sync.Once
	asked chan struct{}
}

func (w *watched) Done() <-chan struct{} {
	w.once.Do(func() { close(w.asked) })
	return w.Context.Done()
}

func TestCancelledRunStops(t *testing.T) {
	s := open(t, endless(t), Options{Threads: 1})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Run(ctx, []int32{1})
	require.ErrorIs(t, err, context.Canceled)

	// While it runs. The session can run again at once, and the runtime gives the
	// first run up: else the test would not come to its end.
	ctx, cancel = context.WithCancel(t.Context())
	w := &watched{Context: ctx, asked: make(chan struct{})}
	go func() {
		<-w.asked
		cancel()
	}()
	_, err = s.Run(w, []int32{math.MaxInt32})
	require.ErrorIs(t, err, context.Canceled)
	out, err := s.Run(t.Context(), []int32{5})
	require.NoError(t, err)
	require.Equal(t, []float64{5}, reals(t, out["logits"]))
	require.NoError(t, s.Close())
	idle := make(chan struct{})
	s.whenIdle(func() error { close(idle); return nil })
	<-idle
}

// A cancelled step leaves the sequence as it was.
func TestCancelledStepLeavesTheSequence(t *testing.T) {
	path, m := toyGraph(t, exporter.Options{KVCache: true})
	s := open(t, path, Options{Threads: 1})
	d, err := s.Decode()
	require.NoError(t, err)
	_, err = d.Step(t.Context(), []int32{1, 2, 3})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	w := &watched{Context: ctx, asked: make(chan struct{})}
	go func() {
		<-w.asked
		cancel()
	}()
	if _, err = d.Step(w, make([]int32, 3000)); err != nil { // it may have been faster
		require.ErrorIs(t, err, context.Canceled)
		require.Equal(t, 3, d.Length())
	}
	before := d.Length()
	logits, err := d.Step(t.Context(), []int32{4})
	require.NoError(t, err)
	require.Equal(t, []int{1, m.Config.VocabSize}, logits.Shape)
	require.Equal(t, before+1, d.Length())
	require.NoError(t, d.Close())
}

func TestCancelledLoading(t *testing.T) {
	path, _ := toyGraph(t, exporter.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	s, err := OpenContext(ctx, path, Options{})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	cancel()
	_, err = OpenContext(ctx, path, Options{})
	require.ErrorIs(t, err, context.Canceled)

	// What is loaded when nobody waits any more is closed.
	dropped := make(chan int)
	ctx, cancel = context.WithCancel(t.Context())
	loaded := make(chan int)
	go func() {
		cancel()
	}()
	_, err = await(ctx, func() (int, error) { return <-loaded, nil }, func(n int) { dropped <- n })
	require.ErrorIs(t, err, context.Canceled)
	loaded <- 7
	require.Equal(t, 7, <-dropped)
}

// The official libraries report what they run to their maker unless told not to:
// the first sign of that is a file of theirs in the temporary directory.
func TestTheRuntimeReportsNothing(t *testing.T) {
	if os.Getenv(isChild) != "" {
		path, _ := toyGraph(t, exporter.Options{})
		_, err := open(t, path, Options{}).Run(t.Context(), []int32{1})
		require.NoError(t, err)
		return
	}
	dir := t.TempDir()
	child := exec.Command(os.Args[0], "-test.run=^TestTheRuntimeReportsNothing$")
	for _, entry := range os.Environ() { // CI silences it too
		if name, _, _ := strings.Cut(entry, "="); name != "CI" && name != "ORT_DISABLE_TELEMETRY" {
			child.Env = append(child.Env, entry)
		}
	}
	child.Env = append(child.Env, isChild+"=1", "TMPDIR="+dir)
	text, err := child.CombinedOutput()
	require.NoError(t, err, "%s", text)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

const isChild = "GPTOSS_TEST_CHILD"

func TestConcurrentRuns(t *testing.T) {
	path, _ := toyGraph(t, exporter.Options{})
	s := open(t, path, Options{Threads: 1})
	want, err := s.Run(t.Context(), []int32{5, 6, 7})
	require.NoError(t, err)
	var waiting sync.WaitGroup
	results := make([]map[string]tensor.Tensor, 4)
	for i := range results {
		waiting.Go(func() { results[i], _ = s.Run(t.Context(), []int32{5, 6, 7}) })
	}
	waiting.Wait()
	for _, got := range results {
		require.Equal(t, want, got)
	}
}

// Metadata is what a report identifies a graph by.
func TestMetadata(t *testing.T) {
	path, m := toyGraph(t, exporter.Options{})
	properties, err := open(t, path, Options{}).Metadata()
	require.NoError(t, err)
	digest, err := m.Digest(t.Context())
	require.NoError(t, err)
	require.Equal(t, digest, properties["gptoss.checkpoint"])
	require.Equal(t, exporter.Producer, properties["producer"])
}

func TestBadOptions(t *testing.T) {
	path, _ := toyGraph(t, exporter.Options{})
	for want, o := range map[string]Options{
		`"most"`:     {GraphOptimization: "most"},
		"-1 threads": {Threads: -1},
		`"abacus"`:   {Provider: "abacus"},
	} {
		_, err := Open(path, o)
		require.ErrorContains(t, err, want)
	}
}

// The runtime accepts an option that it does not know without a word: what each
// of ours does must be seen in the graph that it runs.
func TestOptionsHaveTheirEffect(t *testing.T) {
	path, _ := toyGraph(t, exporter.Options{Experts: exporter.ExpertsDense})
	nodes := func(o Options) map[string]int {
		settings, err := o.settings()
		require.NoError(t, err)
		defer settings.Destroy()
		optimized := filepath.Join(t.TempDir(), "optimized.onnx")
		require.NoError(t, settings.SetOptimizedModelFilePath(optimized))
		session, err := ort.NewDynamicAdvancedSession(path, []string{"input_ids"}, []string{"logits"}, settings)
		require.NoError(t, err)
		require.NoError(t, session.Destroy())
		data, err := os.ReadFile(optimized)
		require.NoError(t, err)
		var model onnxpb.ModelProto
		require.NoError(t, proto.Unmarshal(data, &model))
		count := map[string]int{}
		for _, n := range model.Graph.Node {
			count[n.GetOpType()]++
		}
		return count
	}
	require.NoError(t, environment())
	none, basic, all := nodes(Options{GraphOptimization: OptimizeNone}), nodes(Options{GraphOptimization: OptimizeBasic}), nodes(Options{})
	kept := nodes(Options{KeepWeightsMapped: true})
	total := func(count map[string]int) (n int) {
		for _, c := range count {
			n += c
		}
		return n
	}
	require.Greater(t, total(none), total(basic), "basic optimization removes nodes")
	require.NotEqual(t, basic, all)
	require.Less(t, all["Cast"], kept["Cast"], "without constant folding the casts of bfloat16 weights stay")

	settings, err := Options{}.settings()
	require.NoError(t, err)
	defer settings.Destroy()
	entry, err := settings.GetSessionConfigEntry(allowSpinning)
	require.NoError(t, err)
	require.Equal(t, off, entry)
}

func TestVersionIsThePinnedOne(t *testing.T) {
	if os.Getenv("ONNXRUNTIME_LIB") != "" {
		t.Log("ONNXRUNTIME_LIB names a library of the user's own")
	}
	version, err := Version()
	require.NoError(t, err)
	require.NotEmpty(t, version)
}

func TestNaNIsHandedOut(t *testing.T) {
	nan := constant("nan", exporter.Float32, []int64{1, 1}, []byte{0, 0, 0xc0, 0x7f})
	s := open(t, write(t, &onnxpb.GraphProto{
		Input:       []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, "T")},
		Output:      []*onnxpb.ValueInfoProto{value("logits", exporter.Float32, "T", 1)},
		Node:        append(echo("input_ids", "x", exporter.Float32), operator("Add", "x nan", "logits")),
		Initializer: []*onnxpb.TensorProto{one, nan},
	}), Options{})
	out, err := s.Run(t.Context(), []int32{1})
	require.NoError(t, err)
	require.True(t, math.IsNaN(reals(t, out["logits"])[0]))
}
