package exporter

import (
	"fmt"
	"math"
	"strconv"
	"strings"

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

func appendUint32(data []byte, v uint32) []byte {
	return append(data, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
}

func appendUint64(data []byte, v uint64) []byte {
	return appendUint32(appendUint32(data, uint32(v)), uint32(v>>32))
}
