package exporter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sebdah/goldie/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/tools/go/packages"
	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

func toy(t testing.TB) *checkpoint.Model {
	t.Helper()
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

func export(t testing.TB, m *checkpoint.Model, o Options) (path string, model *onnxpb.ModelProto) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "m.onnx")
	require.NoError(t, Export(t.Context(), m, path, o))
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	model = new(onnxpb.ModelProto)
	require.NoError(t, proto.Unmarshal(data, model))
	return path, model
}

func outputs(model *onnxpb.ModelProto) []string {
	var names []string
	for _, o := range model.Graph.Output {
		names = append(names, o.GetName())
	}
	return names
}

func TestEveryTapIsAnOutputInItsShape(t *testing.T) {
	m := toy(t)
	for _, experts := range []Experts{ExpertsPacked, ExpertsDense} {
		for _, length := range []int{0, 5} {
			t.Run(fmt.Sprintf("%s/%d", experts, length), func(t *testing.T) {
				_, model := export(t, m, Options{Experts: experts, SequenceLength: length, HiddenStates: true, BlockDebug: true})
				names := outputs(model)
				require.Equal(t, taps.Logits, names[0])
				require.ElementsMatch(t, taps.All(m.Config), names)
				for _, o := range model.Graph.Output {
					want, err := taps.Shape(m.Config, o.GetName(), max(length, 1))
					require.NoError(t, err)
					var got []int
					for i, d := range o.Type.GetTensorType().Shape.Dim {
						if length == 0 && i == 0 {
							require.Equal(t, "sequence", d.GetDimParam(), o.GetName())
							got = append(got, 1)
							continue
						}
						got = append(got, int(d.GetDimValue()))
					}
					require.Equal(t, want, got, o.GetName())
					typ := Float32
					if taps.Integer(o.GetName()) {
						typ = Int32
					}
					require.Equal(t, int32(typ), o.Type.GetTensorType().GetElemType(), o.GetName())
				}
			})
		}
	}
}

func TestOutputsFollowTheOptions(t *testing.T) {
	m := toy(t)
	_, model := export(t, m, Options{})
	require.Equal(t, []string{taps.Logits}, outputs(model))

	_, model = export(t, m, Options{HiddenStates: true})
	names := outputs(model)
	require.Contains(t, names, taps.Embedding)
	require.Contains(t, names, taps.Block(2, taps.PostAttention))
	require.NotContains(t, names, taps.Block(0, taps.Q))

	_, model = export(t, m, Options{BlockDebug: true})
	names = outputs(model)
	require.Contains(t, names, taps.Block(0, taps.Q))
	require.NotContains(t, names, taps.Embedding)
}

func TestLastLogitsOnly(t *testing.T) {
	m := toy(t)
	_, model := export(t, m, Options{LastLogitsOnly: true, HiddenStates: true})
	for _, o := range model.Graph.Output {
		first := o.Type.GetTensorType().Shape.Dim[0]
		if o.GetName() == taps.Logits {
			require.Equal(t, int64(1), first.GetDimValue())
			continue
		}
		require.Equal(t, "sequence", first.GetDimParam(), o.GetName())
	}
}

// A graph with functions says the same in fewer nodes, and every block of the
// same form is one function.
func TestFunctions(t *testing.T) {
	m := toy(t)
	for _, o := range []Options{
		{HiddenStates: true, BlockDebug: true},
		{KVCache: true, HiddenStates: true},
		{Operators: OperatorsONNXRuntime, BlockDebug: true},
		{Experts: ExpertsDense},
	} {
		_, flat := export(t, m, o)
		o.Functions = true
		_, modular := export(t, m, o)
		require.Equal(t, outputs(flat), outputs(modular))
		require.Less(t, len(modular.Graph.Node), len(flat.Graph.Node)/2)
		calls := map[string]int{}
		for _, n := range modular.Graph.Node {
			if n.GetDomain() == functionDomain {
				calls[n.GetOpType()]++
			}
		}
		defined := map[string]bool{}
		for _, f := range modular.Functions {
			require.False(t, defined[f.GetName()], "%s is defined twice", f.GetName())
			defined[f.GetName()] = true
			requireClosed(t, f)
		}
		blocks := 0
		for name, times := range calls {
			require.True(t, defined[name], name)
			blocks += times
		}
		require.Equal(t, m.Config.Layers, blocks)
	}
}

// requireClosed checks that a function reads nothing but its inputs and what it
// computes before.
func requireClosed(t *testing.T, f *onnxpb.FunctionProto) {
	t.Helper()
	known := map[string]bool{"": true}
	for _, name := range f.Input {
		known[name] = true
	}
	var check func(nodes []*onnxpb.NodeProto)
	check = func(nodes []*onnxpb.NodeProto) {
		for _, n := range nodes {
			for _, name := range n.Input {
				require.True(t, known[name], "%s of %s reads %s", n.GetName(), f.GetName(), name)
			}
			for _, a := range n.Attribute {
				if a.G != nil {
					for _, in := range a.G.Input {
						known[in.GetName()] = true
					}
					check(a.G.Node)
				}
			}
			for _, name := range n.Output {
				known[name] = true
			}
		}
	}
	check(f.Node)
	for _, name := range f.Output {
		require.True(t, known[name], name)
	}
}

func TestExportIsDeterministic(t *testing.T) {
	m := toy(t)
	first, _ := export(t, m, Options{BlockDebug: true, Functions: true, KVCache: true})
	second, _ := export(t, m, Options{BlockDebug: true, Functions: true, KVCache: true})
	for _, suffix := range []string{"", ".data"} {
		a, err := os.ReadFile(first + suffix)
		require.NoError(t, err)
		b, err := os.ReadFile(second + suffix)
		require.NoError(t, err)
		require.True(t, bytes.Equal(a, b), "m.onnx%s differs between two exports", suffix)
	}
}

// The node list of one layer of the toy graph, so that a change of it is seen.
func TestNodesOfToy(t *testing.T) {
	m := *toy(t)
	m.Config.Layers = 1
	_, model := export(t, &m, Options{})
	var list strings.Builder
	describeNodes(&list, model.Graph, "")
	goldie.New(t).Assert(t, "toy_nodes", []byte(list.String()))
}

func describeNodes(w io.Writer, g *onnxpb.GraphProto, indent string) {
	for _, n := range g.Node {
		fmt.Fprintf(w, "%s%s = %s(%s)\n", indent, strings.Join(n.Output, ", "), n.GetOpType(), strings.Join(n.Input, ", "))
		for _, a := range n.Attribute {
			if a.G != nil {
				describeNodes(w, a.G, indent+"    ")
			}
		}
	}
}

// The data file must hold the checkpoint's own bytes where the graph says.
func TestWeightsAreTheCheckpointsBytes(t *testing.T) {
	m := toy(t)
	path, model := export(t, m, Options{})
	data, err := os.ReadFile(path + ".data")
	require.NoError(t, err)
	external := func(name string) []byte {
		at := slices.IndexFunc(model.Graph.Initializer, func(w *onnxpb.TensorProto) bool { return w.GetName() == name })
		require.GreaterOrEqual(t, at, 0, name)
		var offset, length int
		for _, e := range model.Graph.Initializer[at].ExternalData {
			switch e.GetKey() {
			case "location":
				require.Equal(t, "m.onnx.data", e.GetValue())
			case "offset":
				fmt.Sscan(e.GetValue(), &offset)
			case "length":
				fmt.Sscan(e.GetValue(), &length)
			}
		}
		require.Positive(t, length, name)
		return data[offset : offset+length]
	}
	embedding := m.Embedding.(checkpoint.BF16)
	require.Equal(t, embedding.Data, external("embedding.weight"))
	var blocks []byte
	for _, expert := range m.Blocks[1].MLP2 {
		blocks = append(blocks, expert.(checkpoint.MXFP4).Blocks...)
	}
	require.Equal(t, blocks, external("block.1.mlp.mlp2_weight.blocks"))
}

func TestDenseWeightsAreExactBFloat16(t *testing.T) {
	_, model := export(t, toy(t), Options{Experts: ExpertsDense})
	for _, w := range model.Graph.Initializer {
		if strings.Contains(w.GetName(), "mlp1_weight") {
			require.Equal(t, int32(BFloat16), w.GetDataType())
			require.Len(t, w.Dims, 3)
			return
		}
	}
	t.Fatal("no dense expert weights in the graph")
}

func TestMetadataSaysWhatMadeIt(t *testing.T) {
	m := toy(t)
	_, model := export(t, m, Options{Version: "v1.2.3", SequenceLength: 7})
	properties := map[string]string{}
	for _, p := range model.MetadataProps {
		properties[p.GetKey()] = p.GetValue()
	}
	digest, err := m.Digest(t.Context())
	require.NoError(t, err)
	require.Equal(t, digest, properties["gptoss.checkpoint"])
	require.Equal(t, "7", properties["gptoss.sequence_length"])
	require.Equal(t, "packed", properties["gptoss.experts"])
	require.Equal(t, Producer, model.GetProducerName())
	require.Equal(t, "v1.2.3", model.GetProducerVersion())
}

// The metadata are enough to make the same bytes again.
func TestOptionsOf(t *testing.T) {
	m := toy(t)
	for _, o := range []Options{
		{Version: "v1"},
		{Operators: OperatorsONNXRuntime, Experts: ExpertsPacked, KVCache: true, SequenceLength: 9, HiddenStates: true},
		{Experts: ExpertsDense, Precision: PrecisionFloat16, BlockDebug: true, Functions: true, LastLogitsOnly: true},
	} {
		first, model := export(t, m, o)
		read, digest, err := OptionsOf(model)
		require.NoError(t, err)
		want, err := m.Digest(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, digest)
		second, _ := export(t, m, read)
		a, err := os.ReadFile(first)
		require.NoError(t, err)
		b, err := os.ReadFile(second)
		require.NoError(t, err)
		require.Equal(t, a, b)
	}
	_, _, err := OptionsOf(&onnxpb.ModelProto{})
	require.ErrorContains(t, err, "not by gptoss")
	_, _, err = OptionsOf(&onnxpb.ModelProto{ProducerName: proto.String(Producer)})
	require.ErrorContains(t, err, "lacks gptoss.operators")
}

// A failure must leave neither temporary files nor a damaged older output.
func TestFailureLeavesTheOlderOutput(t *testing.T) {
	m := toy(t)
	for _, c := range []struct {
		name    string
		context func(cancel context.CancelFunc) (progress func(written, total int64))
		options Options
	}{
		{"cancelled while writing", func(cancel context.CancelFunc) func(int64, int64) {
			return func(written, total int64) {
				if written > total/2 {
					cancel()
				}
			}
		}, Options{}},
		{"validation fails", nil, Options{Validate: func(context.Context, string) error { return errors.New("wrong") }}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "m.onnx")
			require.NoError(t, os.WriteFile(path, []byte("older graph"), 0o644))
			require.NoError(t, os.WriteFile(path+".data", []byte("older weights"), 0o644))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if c.context != nil {
				c.options.Progress = c.context(cancel)
			}
			require.Error(t, Export(ctx, m, path, c.options))
			requireFiles(t, dir, map[string]string{"m.onnx": "older graph", "m.onnx.data": "older weights"})
		})
	}
}

// The graph's name is taken by a directory: its rename fails after the weights
// have theirs.
func TestFailedRenamePutsTheWeightsBack(t *testing.T) {
	m := toy(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "m.onnx")
	require.NoError(t, os.Mkdir(path, 0o755))
	require.Error(t, Export(t.Context(), m, path, Options{}))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "only the directory may be left")

	require.NoError(t, os.WriteFile(path+".data", []byte("older weights"), 0o644))
	require.Error(t, Export(t.Context(), m, path, Options{}))
	data, err := os.ReadFile(path + ".data")
	require.NoError(t, err)
	require.Equal(t, "older weights", string(data))
}

// The data file's name is taken by a directory with somebody's files in it.
func TestDirectoryInTheWayIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "m.onnx")
	require.NoError(t, os.Mkdir(path+".data", 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(path+".data", "letter"), []byte("a letter"), 0o644))
	require.ErrorContains(t, Export(t.Context(), toy(t), path, Options{}), "is a directory")
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	requireFiles(t, path+".data", map[string]string{"letter": "a letter"})
}

func requireFiles(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, len(want))
	for name, content := range want {
		data, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Equal(t, content, string(data))
	}
}

func TestValidationSeesTheGraphBeforeItHasItsName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.onnx")
	called := false
	require.NoError(t, Export(t.Context(), toy(t), path, Options{Validate: func(_ context.Context, temporary string) error {
		called = true
		require.NotEqual(t, path, temporary)
		require.NoFileExists(t, path)
		require.FileExists(t, temporary)
		require.FileExists(t, temporary+".data")
		return nil
	}}))
	require.True(t, called)
	require.FileExists(t, path)
}

func TestBadOptionsAreRefused(t *testing.T) {
	m := toy(t)
	dir := t.TempDir()
	for _, c := range []struct {
		options Options
		want    string
	}{
		{Options{SequenceLength: -1}, "negative"},
		{Options{Experts: "sparse"}, "sparse"},
		{Options{Precision: "float8"}, "float8"},
		{Options{Operators: "cuda"}, "cuda"},
		{Options{KVCache: true, SequenceLength: 1}, "nothing to cache"},
	} {
		require.ErrorContains(t, Export(t.Context(), m, filepath.Join(dir, "m.onnx"), c.options), c.want)
	}
	require.Error(t, Export(t.Context(), m, filepath.Join(dir, "missing", "m.onnx"), Options{}))
	requireFiles(t, dir, nil)
}

func TestWeightsThatDoNotFitTheDiskAreRefused(t *testing.T) {
	dir := t.TempDir()
	err := write(t.Context(), &Graph{dataSize: 1 << 60}, filepath.Join(dir, "m.onnx"), Options{}, nil)
	require.ErrorContains(t, err, "GB are free")
	requireFiles(t, dir, nil)
}

func TestPackedNeedsMXFP4(t *testing.T) {
	m := *toy(t)
	m.Blocks = slices.Clone(m.Blocks)
	m.Blocks[1].MLP2 = slices.Clone(m.Blocks[1].MLP2)
	rows, cols := m.Blocks[1].MLP2[3].Dims()
	m.Blocks[1].MLP2[3] = checkpoint.Dense{RowCount: rows, ColCount: cols, Data: make([]float32, rows*cols)}
	err := Export(t.Context(), &m, filepath.Join(t.TempDir(), "m.onnx"), Options{Experts: ExpertsPacked})
	require.ErrorContains(t, err, "block.1.mlp.mlp2_weight of expert 3 is not stored as MXFP4")
}

// A stage is swapped by assigning it: the fault catalogue depends on that.
func TestStagesCanBeSwapped(t *testing.T) {
	stages := Portable()
	stages.Scale = func(Layer) float64 { return 0.123 }
	_, model := export(t, toy(t), Options{Stages: &stages})
	require.True(t, slices.ContainsFunc(model.Graph.Initializer, func(w *onnxpb.TensorProto) bool {
		return w.GetName() == "float32(0.123)"
	}))
}

// Every stage that makes a tap can stand alone.
func TestExportStage(t *testing.T) {
	m := toy(t)
	for _, experts := range []Experts{ExpertsPacked, ExpertsDense} {
		for _, name := range append(slices.Clone(taps.InBlock[1:]), taps.Embedding, taps.FinalNorm, taps.Logits) {
			t.Run(string(experts)+"/"+name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "stage.onnx")
				require.NoError(t, ExportStage(t.Context(), m, 1, []string{name}, path, Options{Experts: experts}))
				data, err := os.ReadFile(path)
				require.NoError(t, err)
				var model onnxpb.ModelProto
				require.NoError(t, proto.Unmarshal(data, &model))
				require.Equal(t, []string{StageOutput(name)}, outputs(&model))
				require.NotEmpty(t, model.Graph.Input)
			})
		}
	}
	path := filepath.Join(t.TempDir(), "stage.onnx")
	require.ErrorContains(t, ExportStage(t.Context(), m, 9, []string{taps.Q}, path, Options{}), "no layer 9")
	require.ErrorContains(t, ExportStage(t.Context(), m, 0, []string{"nonsense"}, path, Options{}), "nonsense")
}

// Reference and exporter check each other, so they must not share arithmetic:
// of reference/ the exporter imports what reads files and names things.
func TestExporterDoesNotImportTheReference(t *testing.T) {
	loaded, err := packages.Load(&packages.Config{Mode: packages.NeedName | packages.NeedImports | packages.NeedDeps}, ".")
	require.NoError(t, err)
	require.Len(t, loaded, 1)
	const reference = "github.com/gptoss-conformance/gptoss/reference"
	var direct []string
	for path := range loaded[0].Imports {
		if strings.HasPrefix(path, reference) {
			direct = append(direct, path)
		}
	}
	require.ElementsMatch(t, []string{reference + "/checkpoint", reference + "/config", reference + "/taps", reference + "/tensor"}, direct)
	packages.Visit(loaded, nil, func(p *packages.Package) {
		require.NotEqual(t, reference, p.PkgPath, "the reference's arithmetic is imported indirectly")
	})
}

// A weight that float16 does not have is named, however it is stored.
func TestWeightsBeyondFloat16AreRefused(t *testing.T) {
	for want, change := range map[string]func(m *checkpoint.Model){
		"norm.scale is 70000 at [0 3]":                           func(m *checkpoint.Model) { m.FinalNorm = with(m.FinalNorm, 3, 7e4) },
		"block.1.mlp.mlp2_bias of expert 5 is -70000 at [0 2]":   func(m *checkpoint.Model) { m.Blocks[1].MLP2Bias[5] = with(m.Blocks[1].MLP2Bias[5], 2, -7e4) },
		"block.0.mlp.mlp1_weight of expert 2 is 98304 at [1 32]": func(m *checkpoint.Model) { m.Blocks[0].MLP1[2] = hugeMXFP4(m.Blocks[0].MLP1[2]) },
		"block.2.attn.qkv.weight is 65536 at [4 1]":              func(m *checkpoint.Model) { m.Blocks[2].QKV = dense(m.Blocks[2].QKV, 4, 1, 65536) },
	} {
		t.Run(want, func(t *testing.T) {
			m := *toy(t)
			m.Blocks = slices.Clone(m.Blocks)
			for i := range m.Blocks {
				m.Blocks[i].MLP1, m.Blocks[i].MLP2Bias = slices.Clone(m.Blocks[i].MLP1), slices.Clone(m.Blocks[i].MLP2Bias)
			}
			dir := t.TempDir()
			require.NoError(t, Export(t.Context(), &m, filepath.Join(dir, "right.onnx"), Options{Precision: PrecisionFloat16}))
			change(&m)
			path := filepath.Join(dir, "m.onnx")
			require.ErrorContains(t, Export(t.Context(), &m, path, Options{Precision: PrecisionFloat16}), want)
			require.NoFileExists(t, path)
			require.NoError(t, Export(t.Context(), &m, path, Options{Precision: PrecisionBFloat16}), "bfloat16 has it")
		})
	}
}

func with(values []float32, at int, value float32) []float32 {
	changed := slices.Clone(values)
	changed[at] = value
	return changed
}

// dense decodes a matrix and changes one element.
func dense(w checkpoint.Matrix, row, col int, value float32) checkpoint.Matrix {
	rows, cols := w.Dims()
	data := make([]float32, rows*cols)
	w.Rows(data, 0, rows)
	data[row*cols+col] = value
	return checkpoint.Dense{RowCount: rows, ColCount: cols, Data: data}
}

// hugeMXFP4 puts 6·2^14 at [1 32], and a large scale on zeros before it.
func hugeMXFP4(w checkpoint.Matrix) checkpoint.Matrix {
	m := w.(checkpoint.MXFP4)
	m.Blocks, m.Scales = slices.Clone(m.Blocks), slices.Clone(m.Scales)
	clear(m.Blocks[:16])
	m.Scales[0] = 141
	group := m.ColCount/32 + 1 // the second of row 1
	clear(m.Blocks[16*group:][:16])
	m.Blocks[16*group], m.Scales[group] = 7, 141
	return m
}
