package exporter

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func newScope() *Scope { return NewGraph(opset, irVersion).Scope() }

func TestShapesAreInferred(t *testing.T) {
	s := newScope()
	g := s.graph
	x := g.Input("x", Float32, Shape{Symbol("t"), N(6)}, "")
	w := g.Input("w", Float32, Ns(4, 6), "")
	for _, c := range []struct {
		name string
		got  Value
		want string
	}{
		{"gemm", s.Gemm(x, w, Value{}), "[t, 4]"},
		{"reshape", s.Reshape(x, Symbol("t"), N(2), N(3)), "[t, 2, 3]"},
		{"transpose", s.Transpose(s.Reshape(x, Symbol("t"), N(2), N(3)), 1, 0, 2), "[2, t, 3]"},
		{"broadcast", s.Add(x, s.Float(1)), "[t, 6]"},
		{"reduce", s.ReduceMean(x, -1, true), "[t, 1]"},
		{"reduce and drop", s.ReduceMean(x, 0, false), "[6]"},
		{"unsqueeze", s.Unsqueeze(x, 0, 2), "[1, t, 1, 6]"},
		{"gather", s.Gather(w, 0, s.Int64s(1, 2, 3)), "[3, 6]"},
		{"matmul", s.MatMul(s.Unsqueeze(w, 0), s.Reshape(w, N(1), N(6), N(4))), "[1, 4, 4]"},
		{"concat", s.Concat(1, N(12), x, x), "[t, 12]"},
		{"slice", s.Slice(x, 1, 0, 6, 2, N(3)), "[t, 3]"},
	} {
		require.Equal(t, c.want, c.got.Shape().String(), c.name)
	}
	require.NoError(t, g.Err())
}

func TestMistakesAreFoundWhileBuilding(t *testing.T) {
	for name, build := range map[string]func(s *Scope, x Value){
		"types":        func(s *Scope, x Value) { s.Add(x, s.Int64(1)) },
		"broadcast":    func(s *Scope, x Value) { s.Add(x, s.Floats("f", Ns(5), make([]float32, 5))) },
		"gemm":         func(s *Scope, x Value) { s.Gemm(x, x, x) },
		"matmul":       func(s *Scope, x Value) { s.MatMul(x, x) },
		"reshape":      func(s *Scope, x Value) { s.Reshape(x, N(7)) },
		"axis":         func(s *Scope, x Value) { s.ReduceMean(x, 5, true) },
		"transpose":    func(s *Scope, x Value) { s.Transpose(x, 0) },
		"squeeze":      func(s *Scope, x Value) { s.Squeeze(x, 0) },
		"concat":       func(s *Scope, x Value) { s.Concat(0, N(3), x, s.Reshape(x, N(3), N(2))) },
		"weight bytes": func(s *Scope, x Value) { s.graph.Weight("w", Float32, Ns(2), Bytes(make([]byte, 7))) },
		"names":        func(s *Scope, x Value) { s.Rename(s.Identity(x), "x") },
		"loop": func(s *Scope, x Value) {
			s.Loop("l", s.Int64(1), []Value{x}, func(s *Scope, _ Value, v []Value) []Value { return []Value{s.Transpose(v[0], 1, 0)} })
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScope()
			build(s, s.graph.Input("x", Float32, Ns(2, 3), ""))
			require.Error(t, s.graph.Err())
		})
	}
}

func TestNamesAreUniqueAndScoped(t *testing.T) {
	s := newScope()
	x := s.graph.Input("x", Float32, Ns(2), "")
	block := s.Sub("block_0")
	require.Equal(t, "block_0.Mul", block.Mul(x, x).Name())
	require.Equal(t, "block_0.Mul_2", block.Mul(x, x).Name())
	named := block.Rename(block.Mul(x, x), "block_0.q")
	require.Equal(t, "block_0.q", named.Name())
	// A second name needs a second value.
	again := block.Rename(named, "block_0.k")
	require.Equal(t, "block_0.q", named.Name())
	require.Equal(t, "block_0.k", again.Name())
	require.NoError(t, s.graph.Err())
}

func TestConstantsAreShared(t *testing.T) {
	s := newScope()
	require.Equal(t, s.Float(1.5).edge, s.Sub("inner").Float(1.5).edge)
	require.NotEqual(t, s.Float(1.5).edge, s.Float(2.5).edge)
	require.Equal(t, s.Int64s(1, 2).edge, s.Int64s(1, 2).edge)
}

func TestSmallWeightsStandInTheGraph(t *testing.T) {
	g := NewGraph(opset, irVersion)
	g.Weight("small", Float32, Ns(4), Bytes(make([]byte, 16)))
	g.Weight("vector", Float32, Ns(1000), Bytes(make([]byte, 4000)))
	g.Weight("matrix", Float32, Ns(300, 100), Bytes(make([]byte, 120000)))
	g.layOut("m.data")
	model := g.message("test")
	require.Equal(t, int64(4096+120000), g.dataSize)
	require.NotEmpty(t, model.Graph.Initializer[0].RawData)
	require.Empty(t, model.Graph.Initializer[1].RawData)
	require.Equal(t, "0", model.Graph.Initializer[1].ExternalData[1].GetValue())
	require.Equal(t, "4096", model.Graph.Initializer[2].ExternalData[1].GetValue())
}
