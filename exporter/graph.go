package exporter

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
)

// Type is an element type, numbered as ONNX numbers it.
type Type = onnxpb.TensorProto_DataType

// Element types that the exporter uses.
const (
	Float32  = onnxpb.TensorProto_FLOAT
	Float16  = onnxpb.TensorProto_FLOAT16
	BFloat16 = onnxpb.TensorProto_BFLOAT16
	E8M0     = onnxpb.TensorProto_FLOAT8E8M0
	UInt8    = onnxpb.TensorProto_UINT8
	UInt16   = onnxpb.TensorProto_UINT16
	Int32    = onnxpb.TensorProto_INT32
	Int64    = onnxpb.TensorProto_INT64
	Bool     = onnxpb.TensorProto_BOOL
)

// typeSize holds the bytes of one element.
var typeSize = map[Type]int64{
	Float32: 4, Float16: 2, BFloat16: 2, E8M0: 1, UInt8: 1, UInt16: 2, Int32: 4, Int64: 8, Bool: 1,
}

// Dim is one dimension: a number, or a symbol for one that only a run knows.
type Dim struct {
	Size   int
	Symbol string
}

// N is a dimension of known size.
func N(size int) Dim { return Dim{Size: size} }

// Symbol is a dimension that a run decides.
func Symbol(name string) Dim { return Dim{Symbol: name} }

// Shape lists dimensions, outermost first.
type Shape []Dim

// Ns is a shape of known sizes.
func Ns(sizes ...int) Shape {
	shape := make(Shape, len(sizes))
	for i, size := range sizes {
		shape[i] = N(size)
	}
	return shape
}

func (d Dim) String() string {
	if d.Symbol != "" {
		return d.Symbol
	}
	return strconv.Itoa(d.Size)
}

func (s Shape) String() string {
	words := make([]string, len(s))
	for i, d := range s {
		words[i] = d.String()
	}
	return "[" + strings.Join(words, ", ") + "]"
}

// Value is an edge of the graph: what a node puts out and others take in. The
// zero Value stands for an optional input that is left out.
type Value struct{ *edge }

type edge struct {
	name  string
	named bool // the name is final: a weight, an input or a tap
	typ   Type
	shape Shape
	doc   string
}

// Type returns the element type.
func (v Value) Type() Type { return v.typ }

// Shape returns the dimensions.
func (v Value) Shape() Shape { return v.shape }

// Name returns the name that the value has in the file.
func (v Value) Name() string { return v.name }

// node is an operator in the graph. Its edges are pointers until the file is
// made, so that an edge can still be given a better name.
type node struct {
	op, domain, name, doc string
	in, out               []*edge
	attributes            []attribute
}

// attribute holds int64, float32, string, []int64 or *body.
type attribute struct {
	name  string
	value any
}

// body is a list of nodes with a namespace: the graph's, a loop's or a function's.
type body struct {
	nodes     []*node
	in, out   []*edge
	names     map[string]bool // shared with the loops inside, as ONNX asks for
	constants map[string]Value
	function  bool // constants must be nodes: functions hold no initializers
}

// Graph is an ONNX model while it is built.
//
// Stage code never checks errors: the first one sticks, and Graph.Err returns it.
type Graph struct {
	main         *body
	initializers []*initializer
	functions    []*function
	modular      bool // Scope.Call makes functions
	opsets       map[string]int64
	irVersion    int64

	functionNames map[string]*function

	dataSize int64 // bytes of the data file
	err      error
}

// NewGraph starts an empty graph of an operator set version and IR version.
func NewGraph(opset, irVersion int64) *Graph {
	return &Graph{
		main:      &body{names: map[string]bool{}, constants: map[string]Value{}},
		opsets:    map[string]int64{"": opset},
		irVersion: irVersion,

		functionNames: map[string]*function{},
	}
}

// Err returns the first error that building met.
func (g *Graph) Err() error { return g.err }

// Scope returns the outermost scope.
func (g *Graph) Scope() *Scope { return &Scope{graph: g, body: g.main} }

// Input declares a graph input.
func (g *Graph) Input(name string, typ Type, shape Shape, doc string) Value {
	v := Value{&edge{name: name, named: true, typ: typ, shape: shape, doc: doc}}
	g.main.reserve(name, g)
	g.main.in = append(g.main.in, v.edge)
	return v
}

// Output declares a graph output.
func (g *Graph) Output(v Value) { g.main.out = append(g.main.out, v.edge) }

// Import declares the version of an operator domain other than ONNX's own.
func (g *Graph) Import(domain string, version int64) { g.opsets[domain] = version }

// Scope is a place in the graph where nodes are added, and the prefix of their
// names. Every operator that the exporter uses is a method of it, which checks
// types and shapes as it builds.
type Scope struct {
	graph     *Graph
	body      *body
	path      string
	precision Precision
}

// Sub returns a scope inside this one.
func (s *Scope) Sub(name string) *Scope {
	sub := *s
	sub.path = join(s.path, name)
	return &sub
}

// Symbol is a dimension that has this size at this place of the graph only. A
// runtime may believe that equal symbols mean equal sizes, and reuse buffers.
func (s *Scope) Symbol(name string) Dim { return Symbol(join(s.path, name)) }

// Fail records an error, unless there is one already.
func (s *Scope) Fail(format string, arguments ...any) {
	if s.graph.err == nil {
		s.graph.err = fmt.Errorf("%s: %s", s.path, fmt.Sprintf(format, arguments...))
	}
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// unique returns the name, with a number if it is taken.
func (b *body) unique(name string) string {
	candidate := name
	for i := 2; b.names[candidate]; i++ {
		candidate = name + "_" + strconv.Itoa(i)
	}
	b.names[candidate] = true
	return candidate
}

func (b *body) reserve(name string, g *Graph) {
	if b.names[name] && g.err == nil {
		g.err = fmt.Errorf("two values are called %q", name)
	}
	b.names[name] = true
}

// Rename gives a value its final name. A value that has one already (it is an
// input, a weight or another tap) is passed through an Identity first.
func (s *Scope) Rename(v Value, name string) Value {
	if v.named {
		v = s.Identity(v)
	}
	s.body.reserve(name, s.graph)
	v.name, v.named = name, true
	return v
}

// Node adds any operator. The outputs' types and shapes are the caller's word.
func (s *Scope) Node(domain, op string, inputs []Value, attributes []attribute, outputs ...Value) []Value {
	n := &node{op: op, domain: domain, name: s.body.unique(join(s.path, op)), attributes: attributes}
	for _, v := range inputs {
		n.in = append(n.in, v.edge)
	}
	for len(n.in) > 0 && n.in[len(n.in)-1] == nil {
		n.in = n.in[:len(n.in)-1]
	}
	for i, v := range outputs {
		if v.name == "" {
			// Node and value names are separate namespaces in ONNX, so a node and
			// its first output may share one.
			v.name = n.name
			if i > 0 {
				v.name = s.body.unique(n.name + "." + strconv.Itoa(i))
			}
		}
		n.out = append(n.out, v.edge)
	}
	s.body.nodes = append(s.body.nodes, n)
	return outputs
}

// one adds an operator with one output.
func (s *Scope) one(op string, typ Type, shape Shape, inputs []Value, attributes ...attribute) Value {
	return s.Node("", op, inputs, attributes, output(typ, shape))[0]
}

func output(typ Type, shape Shape) Value { return Value{&edge{typ: typ, shape: shape}} }

// Attribute makes an attribute of a node; value is int64, float32, string or []int64.
func Attribute(name string, value any) attribute { return attribute{name, value} }

// Constants.

// Int64s is a constant vector.
func (s *Scope) Int64s(values ...int) Value {
	words := make([]string, len(values))
	data := make([]byte, 0, 8*len(values))
	for i, v := range values {
		words[i] = strconv.Itoa(v)
		data = appendUint64(data, uint64(v))
	}
	return s.constant("int64["+strings.Join(words, ",")+"]", Int64, Ns(len(values)), data)
}

// Int64 is a constant scalar (rank 0).
func (s *Scope) Int64(value int) Value {
	return s.constant("int64("+strconv.Itoa(value)+")", Int64, Shape{}, appendUint64(nil, uint64(value)))
}

// Int32 is a constant int32 scalar (rank 0).
func (s *Scope) Int32(value int) Value {
	return s.constant("int32("+strconv.Itoa(value)+")", Int32, Shape{}, appendUint32(nil, uint32(value)))
}

// Float is a constant float32 scalar (rank 0), rounded to nearest.
func (s *Scope) Float(value float64) Value {
	bits := math.Float32bits(float32(value))
	return s.constant("float32("+strconv.FormatFloat(value, 'g', -1, 64)+")", Float32, Shape{}, appendUint32(nil, bits))
}

// Floats is a constant float32 tensor under a name of its own.
func (s *Scope) Floats(name string, shape Shape, values []float32) Value {
	data := make([]byte, 0, 4*len(values))
	for _, v := range values {
		data = appendUint32(data, math.Float32bits(v))
	}
	return s.constant(name, Float32, shape, data)
}

// True is a constant boolean scalar.
func (s *Scope) True() Value { return s.constant("true", Bool, Shape{}, []byte{1}) }

// constant returns the constant of that name, which it makes at first use.
func (s *Scope) constant(name string, typ Type, shape Shape, data []byte) Value {
	if v, ok := s.body.constants[name]; ok {
		return v
	}
	var v Value
	if s.body.function {
		v = output(typ, shape)
		v.name, v.named = s.body.unique(name), true
		tensor := &initializer{edge: v.edge, source: Bytes(data)}
		n := &node{op: "Constant", name: v.name, out: []*edge{v.edge}, attributes: []attribute{{"value", tensor}}}
		// In front: a loop inside the function may be the first to use it.
		s.body.nodes = append([]*node{n}, s.body.nodes...)
	} else {
		v = s.graph.Weight(name, typ, shape, Bytes(data))
	}
	s.body.constants[name] = v
	return v
}

// Operators.

// Identity copies.
func (s *Scope) Identity(v Value) Value { return s.one("Identity", v.typ, v.shape, []Value{v}) }

// Cast converts the element type; floats round to nearest even.
func (s *Scope) Cast(v Value, to Type) Value {
	if v.typ == to {
		return v
	}
	return s.one("Cast", to, v.shape, []Value{v}, attribute{"to", int64(to)})
}

// broadcast returns the shape of an element-wise operator.
func (s *Scope) broadcast(op string, a, b Shape) Shape {
	long, short := a, b
	if len(long) < len(short) {
		long, short = short, long
	}
	shape := slices.Clone(long)
	for i, d := range short {
		j := len(long) - len(short) + i
		switch {
		case shape[j] == d || d == N(1):
		case shape[j] == N(1):
			shape[j] = d
		default:
			s.Fail("%s: shapes %v and %v do not broadcast", op, a, b)
		}
	}
	return shape
}

func (s *Scope) binary(op string, result Type, a, b Value) Value {
	if a.typ != b.typ {
		s.Fail("%s: %v and %v differ in type", op, a.typ, b.typ)
	}
	return s.one(op, result, s.broadcast(op, a.shape, b.shape), []Value{a, b})
}

// Element-wise operators of two values, with broadcasting.
func (s *Scope) Add(a, b Value) Value      { return s.binary("Add", a.typ, a, b) }
func (s *Scope) Subtract(a, b Value) Value { return s.binary("Sub", a.typ, a, b) }
func (s *Scope) Mul(a, b Value) Value      { return s.binary("Mul", a.typ, a, b) }
func (s *Scope) Div(a, b Value) Value      { return s.binary("Div", a.typ, a, b) }
func (s *Scope) Min(a, b Value) Value      { return s.binary("Min", a.typ, a, b) }
func (s *Scope) Max(a, b Value) Value      { return s.binary("Max", a.typ, a, b) }
func (s *Scope) And(a, b Value) Value      { return s.binary("And", Bool, a, b) }
func (s *Scope) Equal(a, b Value) Value    { return s.binary("Equal", Bool, a, b) }
func (s *Scope) Less(a, b Value) Value     { return s.binary("Less", Bool, a, b) }
func (s *Scope) GreaterOrEqual(a, b Value) Value {
	return s.binary("GreaterOrEqual", Bool, a, b)
}

func (s *Scope) unary(op string, v Value) Value { return s.one(op, v.typ, v.shape, []Value{v}) }

// Element-wise functions.
func (s *Scope) Sqrt(v Value) Value       { return s.unary("Sqrt", v) }
func (s *Scope) Reciprocal(v Value) Value { return s.unary("Reciprocal", v) }
func (s *Scope) Exp(v Value) Value        { return s.unary("Exp", v) }
func (s *Scope) Neg(v Value) Value        { return s.unary("Neg", v) }
func (s *Scope) Erf(v Value) Value        { return s.unary("Erf", v) }

// Where picks a where the condition holds, else b.
func (s *Scope) Where(condition, a, b Value) Value {
	if condition.typ != Bool || a.typ != b.typ {
		s.Fail("Where: condition %v, branches %v and %v", condition.typ, a.typ, b.typ)
	}
	shape := s.broadcast("Where", condition.shape, s.broadcast("Where", a.shape, b.shape))
	return s.one("Where", a.typ, shape, []Value{condition, a, b})
}

// Softmax runs over the last axis.
func (s *Scope) Softmax(v Value) Value {
	return s.one("Softmax", v.typ, v.shape, []Value{v}, attribute{"axis", int64(-1)})
}

// axis turns a negative axis into one from the front.
func (s *Scope) axis(op string, v Value, axis int) int {
	if axis < 0 {
		axis += len(v.shape)
	}
	if axis < 0 || axis >= len(v.shape) {
		s.Fail("%s: no axis %d in %v", op, axis, v.shape)
		return 0
	}
	return axis
}

// ReduceMean and ReduceSum go over one axis; keep leaves it as 1.
func (s *Scope) ReduceMean(v Value, axis int, keep bool) Value {
	return s.reduce("ReduceMean", v, axis, keep)
}
func (s *Scope) ReduceSum(v Value, axis int, keep bool) Value {
	return s.reduce("ReduceSum", v, axis, keep)
}
func (s *Scope) ReduceMax(v Value, axis int, keep bool) Value {
	return s.reduce("ReduceMax", v, axis, keep)
}

func (s *Scope) reduce(op string, v Value, axis int, keep bool) Value {
	if len(v.shape) == 0 {
		s.Fail("%s: a scalar has no axes", op)
		return v
	}
	axis = s.axis(op, v, axis)
	shape := slices.Clone(v.shape)
	kept := int64(0)
	if keep {
		shape[axis], kept = N(1), 1
	} else {
		shape = slices.Delete(shape, axis, axis+1)
	}
	return s.one(op, v.typ, shape, []Value{v, s.Int64s(axis)}, attribute{"keepdims", kept})
}

// MatMul multiplies the last two axes; earlier ones broadcast.
func (s *Scope) MatMul(a, b Value) Value {
	if len(a.shape) < 2 || len(b.shape) < 2 || a.shape[len(a.shape)-1] != b.shape[len(b.shape)-2] || a.typ != b.typ {
		s.Fail("MatMul: %v %v by %v %v", a.typ, a.shape, b.typ, b.shape)
		return a
	}
	lead := s.broadcast("MatMul", a.shape[:len(a.shape)-2], b.shape[:len(b.shape)-2])
	shape := append(slices.Clone(lead), a.shape[len(a.shape)-2], b.shape[len(b.shape)-1])
	return s.one("MatMul", a.typ, shape, []Value{a, b})
}

// Gemm is x·wᵀ + bias for x [rows, in], w [out, in] and bias [out], which may be
// left out. It takes a weight the way that checkpoints store it.
func (s *Scope) Gemm(x, w, bias Value) Value {
	if len(x.shape) != 2 || len(w.shape) != 2 || x.shape[1] != w.shape[1] || x.typ != w.typ {
		s.Fail("Gemm: %v %v by the transpose of %v %v", x.typ, x.shape, w.typ, w.shape)
		return x
	}
	inputs := []Value{x, w}
	if bias.edge != nil {
		if bias.typ != x.typ || !slices.Equal(bias.shape, w.shape[:1]) {
			s.Fail("Gemm: bias %v %v for %v outputs", bias.typ, bias.shape, w.shape[0])
		}
		inputs = append(inputs, bias)
	}
	return s.one("Gemm", x.typ, Shape{x.shape[0], w.shape[0]}, inputs, attribute{"transB", int64(1)})
}

// Transpose permutes the axes.
func (s *Scope) Transpose(v Value, order ...int) Value {
	shape := make(Shape, len(v.shape))
	perm := make([]int64, len(order))
	if len(order) != len(v.shape) {
		s.Fail("Transpose: order %v for %v", order, v.shape)
		return v
	}
	for i, axis := range order {
		shape[i], perm[i] = v.shape[s.axis("Transpose", v, axis)], int64(axis)
	}
	return s.one("Transpose", v.typ, shape, []Value{v}, attribute{"perm", perm})
}

// Reshape changes the shape; at most one dimension of the new one may be a
// symbol, and is computed.
func (s *Scope) Reshape(v Value, shape ...Dim) Value {
	sizes := make([]int, len(shape))
	symbols := 0
	for i, d := range shape {
		sizes[i] = d.Size
		if d.Symbol != "" {
			sizes[i] = -1
			symbols++
		}
	}
	if symbols > 1 {
		s.Fail("Reshape: %v has %d unknown dimensions", shape, symbols)
	}
	if have, want, ok := elements(v.shape, shape); ok && have != want {
		s.Fail("Reshape: %v has %d elements, %v has %d", v.shape, have, Shape(shape), want)
	}
	return s.one("Reshape", v.typ, shape, []Value{v, s.Int64s(sizes...)})
}

// elements counts both shapes where both are known; equal symbols cancel.
func elements(a, b Shape) (int, int, bool) {
	count := func(shape Shape) (int, map[string]int) {
		n, symbols := 1, map[string]int{}
		for _, d := range shape {
			if d.Symbol != "" {
				symbols[d.Symbol]++
			} else {
				n *= d.Size
			}
		}
		return n, symbols
	}
	na, sa := count(a)
	nb, sb := count(b)
	if len(sa) != len(sb) {
		return 0, 0, false
	}
	for symbol, times := range sa {
		if sb[symbol] != times {
			return 0, 0, false
		}
	}
	return na, nb, true
}

// Unsqueeze adds axes of size 1, counted in the result.
func (s *Scope) Unsqueeze(v Value, axes ...int) Value {
	shape := slices.Clone(v.shape)
	for _, axis := range axes {
		if axis < 0 || axis > len(shape) {
			s.Fail("Unsqueeze: axes %v for %v", axes, v.shape)
			return v
		}
		shape = slices.Insert(shape, axis, N(1))
	}
	return s.one("Unsqueeze", v.typ, shape, []Value{v, s.Int64s(axes...)})
}

// Squeeze drops axes of size 1.
func (s *Scope) Squeeze(v Value, axes ...int) Value {
	shape := Shape{}
	for i, d := range v.shape {
		if !slices.Contains(axes, i) {
			shape = append(shape, d)
		} else if d != N(1) {
			s.Fail("Squeeze: axis %d of %v is not 1", i, v.shape)
		}
	}
	return s.one("Squeeze", v.typ, shape, []Value{v, s.Int64s(axes...)})
}

// Slice takes every step-th element of one axis, from start up to end, of which
// the result has size many. End may be math.MaxInt64.
func (s *Scope) Slice(v Value, axis, start, end, step int, size Dim) Value {
	axis = s.axis("Slice", v, axis)
	shape := slices.Clone(v.shape)
	shape[axis] = size
	inputs := []Value{v, s.Int64s(start), s.Int64s(end), s.Int64s(axis)}
	if step != 1 {
		inputs = append(inputs, s.Int64s(step))
	}
	return s.one("Slice", v.typ, shape, inputs)
}

// SliceFrom drops the first elements of one axis; start is an int64 [1] value,
// counted from the end when negative.
func (s *Scope) SliceFrom(v Value, axis int, start Value, size Dim) Value {
	axis = s.axis("Slice", v, axis)
	shape := slices.Clone(v.shape)
	shape[axis] = size
	return s.one("Slice", v.typ, shape, []Value{v, start, s.Int64s(math.MaxInt64), s.Int64s(axis)})
}

// Concat joins along an axis; size is the result's dimension there.
func (s *Scope) Concat(axis int, size Dim, values ...Value) Value {
	axis = s.axis("Concat", values[0], axis)
	shape := slices.Clone(values[0].shape)
	for _, v := range values[1:] {
		for i := range shape {
			if len(v.shape) != len(shape) || v.typ != values[0].typ || i != axis && v.shape[i] != shape[i] {
				s.Fail("Concat on axis %d: %v %v with %v %v", axis, values[0].typ, shape, v.typ, v.shape)
				return values[0]
			}
		}
	}
	shape[axis] = size
	return s.one("Concat", values[0].typ, shape, values, attribute{"axis", int64(axis)})
}

// Gather takes slices of an axis by index; the indices' shape replaces the axis.
func (s *Scope) Gather(v Value, axis int, indices Value) Value {
	axis = s.axis("Gather", v, axis)
	shape := slices.Concat(v.shape[:axis], indices.shape, v.shape[axis+1:])
	return s.one("Gather", v.typ, shape, []Value{v, indices}, attribute{"axis", int64(axis)})
}

// GatherBatched takes v[t, indices[t, j]] for v [T, E, ...] and indices [T, k].
func (s *Scope) GatherBatched(v, indices Value) Value {
	if len(v.shape) < 2 || len(indices.shape) != 2 || v.shape[0] != indices.shape[0] {
		s.Fail("GatherND: %v by %v", v.shape, indices.shape)
		return v
	}
	shape := slices.Concat(indices.shape, v.shape[2:])
	return s.one("GatherND", v.typ, shape, []Value{v, s.Unsqueeze(indices, 2)}, attribute{"batch_dims", int64(1)})
}

// ScatterElements writes updates [T, k] at indices [T, k] along the last axis.
func (s *Scope) ScatterElements(v, indices, updates Value) Value {
	return s.one("ScatterElements", v.typ, v.shape, []Value{v, indices, updates}, attribute{"axis", int64(len(v.shape) - 1)})
}

// ScatterRows overwrites the rows of v [n, width] that rows [r] names by updates [r, width].
func (s *Scope) ScatterRows(v, rows, updates Value) Value {
	if len(v.shape) != 2 || len(updates.shape) != 2 || v.shape[1] != updates.shape[1] || rows.shape[0] != updates.shape[0] {
		s.Fail("ScatterND: %v, rows %v, updates %v", v.shape, rows.shape, updates.shape)
	}
	return s.one("ScatterND", v.typ, v.shape, []Value{v, s.Unsqueeze(rows, 1), updates})
}

// Expand broadcasts to a shape of known sizes.
func (s *Scope) Expand(v Value, sizes ...int) Value {
	return s.one("Expand", v.typ, s.broadcast("Expand", v.shape, Ns(sizes...)), []Value{v, s.Int64s(sizes...)})
}

// ExpandTo broadcasts to a shape that a run knows.
func (s *Scope) ExpandTo(v, shape Value, result Shape) Value {
	return s.one("Expand", v.typ, result, []Value{v, shape})
}

// Zeros makes a float32 tensor of a shape given as an int64 vector.
func (s *Scope) Zeros(shape Value, result Shape) Value {
	zero := &initializer{edge: &edge{typ: Float32, shape: Ns(1)}, source: Bytes(make([]byte, 4))}
	return s.one("ConstantOfShape", Float32, result, []Value{shape}, attribute{"value", zero})
}

// ShapeOf returns the dimensions as an int64 vector.
func (s *Scope) ShapeOf(v Value) Value {
	return s.one("Shape", Int64, Ns(len(v.shape)), []Value{v})
}

// SizeOf returns one dimension as an int64 vector of one element: a constant
// where it is known.
func (s *Scope) SizeOf(v Value, axis int) Value {
	axis = s.axis("Shape", v, axis)
	if d := v.shape[axis]; d.Symbol == "" {
		return s.Int64s(d.Size)
	}
	return s.one("Shape", Int64, Ns(1), []Value{v},
		attribute{"start", int64(axis)}, attribute{"end", int64(axis + 1)})
}

// Range counts from start up to end, both int64 scalars.
func (s *Scope) Range(start, end Value, size Dim) Value {
	return s.one("Range", Int64, Shape{size}, []Value{start, end, s.Int64(1)})
}

// TopK returns the k largest of the last axis, in descending order, ties by the
// lower index, and their int64 indices.
func (s *Scope) TopK(v Value, k int) (values, indices Value) {
	shape := slices.Clone(v.shape)
	shape[len(shape)-1] = N(k)
	out := s.Node("", "TopK", []Value{v, s.Int64s(k)},
		[]attribute{{"axis", int64(-1)}, {"largest", int64(1)}, {"sorted", int64(1)}},
		output(v.typ, shape), output(Int64, shape))
	return out[0], out[1]
}

// Unique returns the distinct elements in ascending order.
func (s *Scope) Unique(v Value, count Dim) Value {
	return s.one("Unique", v.typ, Shape{count}, []Value{v}, attribute{"sorted", int64(1)})
}

// Nonzero returns the positions of the true elements of a vector.
func (s *Scope) Nonzero(v Value, count Dim) Value {
	positions := s.one("NonZero", Int64, Shape{N(1), count}, []Value{v})
	return s.Reshape(positions, count)
}

// Loop runs a body trips times (an int64 scalar) and returns the final states.
// The body gets the iteration number (an int64 scalar) and the states, and
// returns the next ones.
func (s *Scope) Loop(name string, trips Value, states []Value, build func(s *Scope, iteration Value, states []Value) []Value) []Value {
	inner := s.Sub(name)
	inner.body = &body{names: s.body.names, constants: s.body.constants, function: s.body.function}
	declare := func(role string, typ Type, shape Shape) Value {
		v := Value{&edge{name: s.body.unique(join(inner.path, role)), named: true, typ: typ, shape: shape}}
		inner.body.in = append(inner.body.in, v.edge)
		return v
	}
	iteration := declare("iteration", Int64, Shape{})
	condition := declare("condition", Bool, Shape{})
	inputs := make([]Value, len(states))
	for i, state := range states {
		inputs[i] = declare("state", state.typ, state.shape)
	}
	// Constants of a function must stand outside of the loop; see constant.
	outside := s.body.nodes
	results := build(inner, iteration, inputs)
	if s.body.function {
		inner.hoistConstants(s.body, outside)
	}
	if len(results) != len(states) {
		s.Fail("Loop %s returns %d states of %d", name, len(results), len(states))
		return states
	}
	inner.body.out = []*edge{inner.Identity(condition).edge}
	outputs := make([]Value, len(states))
	for i, v := range results {
		if v.typ != states[i].typ || !slices.Equal(v.shape, states[i].shape) {
			s.Fail("Loop %s turns state %d from %v %v into %v %v", name, i, states[i].typ, states[i].shape, v.typ, v.shape)
		}
		inner.body.out = append(inner.body.out, v.edge)
		outputs[i] = output(v.typ, v.shape)
	}
	return s.Node("", "Loop", append([]Value{trips, s.True()}, states...), []attribute{{"body", inner.body}}, outputs...)
}

// hoistConstants moves the constants that a loop inside a function made to the
// function itself, where later nodes outside of the loop may share them.
func (s *Scope) hoistConstants(outer *body, nodes []*node) {
	var constants, rest []*node
	for _, n := range s.body.nodes {
		if n.op == "Constant" {
			constants = append(constants, n)
		} else {
			rest = append(rest, n)
		}
	}
	s.body.nodes = rest
	outer.nodes = append(constants, nodes...)
}

func appendUint32(data []byte, v uint32) []byte {
	return append(data, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
}

func appendUint64(data []byte, v uint64) []byte {
	return appendUint32(appendUint32(data, uint32(v)), uint32(v>>32))
}

// Into messages.

func (v *edge) info() *onnxpb.ValueInfoProto {
	shape := &onnxpb.TensorShapeProto{}
	for _, d := range v.shape {
		dim := &onnxpb.TensorShapeProto_Dimension{}
		if d.Symbol != "" {
			dim.Value = &onnxpb.TensorShapeProto_Dimension_DimParam{DimParam: d.Symbol}
		} else {
			dim.Value = &onnxpb.TensorShapeProto_Dimension_DimValue{DimValue: int64(d.Size)}
		}
		shape.Dim = append(shape.Dim, dim)
	}
	info := &onnxpb.ValueInfoProto{
		Name: proto.String(v.name),
		Type: &onnxpb.TypeProto{Value: &onnxpb.TypeProto_TensorType{TensorType: &onnxpb.TypeProto_Tensor{
			ElemType: proto.Int32(int32(v.typ)), Shape: shape,
		}}},
	}
	if v.doc != "" {
		info.DocString = proto.String(v.doc)
	}
	return info
}

func (n *node) message() *onnxpb.NodeProto {
	names := func(edges []*edge) []string {
		list := make([]string, len(edges))
		for i, e := range edges {
			if e != nil {
				list[i] = e.name
			}
		}
		return list
	}
	message := &onnxpb.NodeProto{
		Name: proto.String(n.name), OpType: proto.String(n.op),
		Input: names(n.in), Output: names(n.out),
	}
	if n.domain != "" {
		message.Domain = proto.String(n.domain)
	}
	if n.doc != "" {
		message.DocString = proto.String(n.doc)
	}
	for _, a := range n.attributes {
		message.Attribute = append(message.Attribute, a.message())
	}
	return message
}

func (a attribute) message() *onnxpb.AttributeProto {
	message := &onnxpb.AttributeProto{Name: proto.String(a.name)}
	switch value := a.value.(type) {
	case int64:
		message.Type, message.I = onnxpb.AttributeProto_INT.Enum(), proto.Int64(value)
	case float32:
		message.Type, message.F = onnxpb.AttributeProto_FLOAT.Enum(), proto.Float32(value)
	case string:
		message.Type, message.S = onnxpb.AttributeProto_STRING.Enum(), []byte(value)
	case []int64:
		message.Type, message.Ints = onnxpb.AttributeProto_INTS.Enum(), value
	case *initializer:
		message.Type, message.T = onnxpb.AttributeProto_TENSOR.Enum(), value.inline()
	case *body:
		message.Type, message.G = onnxpb.AttributeProto_GRAPH.Enum(), value.message(a.name)
	default:
		panic(fmt.Sprintf("attribute %s holds a %T", a.name, a.value)) // a bug in stage code
	}
	return message
}

func (b *body) message(name string) *onnxpb.GraphProto {
	message := &onnxpb.GraphProto{Name: proto.String(name)}
	boundary := map[*edge]bool{}
	for _, v := range b.in {
		message.Input = append(message.Input, v.info())
		boundary[v] = true
	}
	for _, v := range b.out {
		message.Output = append(message.Output, v.info())
		boundary[v] = true
	}
	for _, n := range b.nodes {
		message.Node = append(message.Node, n.message())
		for _, v := range n.out {
			// Shapes of every value, so that viewers show them and checkers compare
			// them with what they infer.
			if !boundary[v] {
				message.ValueInfo = append(message.ValueInfo, v.info())
			}
		}
	}
	return message
}

// message returns the whole model. Weights that do not fit inside refer to the
// data file, by the offsets that layOut gave them.
func (g *Graph) message(name string) *onnxpb.ModelProto {
	model := &onnxpb.ModelProto{
		IrVersion: proto.Int64(g.irVersion),
		Graph:     g.main.message(name),
	}
	for _, domain := range sortedKeys(g.opsets) {
		model.OpsetImport = append(model.OpsetImport, &onnxpb.OperatorSetIdProto{
			Domain: proto.String(domain), Version: proto.Int64(g.opsets[domain]),
		})
	}
	for _, w := range g.initializers {
		model.Graph.Initializer = append(model.Graph.Initializer, w.message())
	}
	for _, f := range g.functions {
		model.Functions = append(model.Functions, f.message(model.OpsetImport))
	}
	return model
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
