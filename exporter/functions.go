package exporter

import (
	"strconv"

	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
)

// functionDomain is the domain of our model-local functions.
const functionDomain = "gptoss"

// function is a model-local function: nodes that are written once and called from
// several places.
type function struct {
	name, doc string
	body      *body
	content   []byte // what makes two functions the same
}

// parameter is a value that goes into a function, where the code that builds the
// function reads it.
type parameter struct {
	name  string
	value *Value
}

// Call adds what build makes: as it is, or, in a graph with functions, as a call
// of a function of that name. While the function is built, the parameters stand
// for its inputs; nothing else of the graph may be used.
//
// The same name may be called with different bodies, for layers with a window and
// without one say; each body becomes one function.
func (s *Scope) Call(name, doc string, parameters []parameter, build func(s *Scope) []Value) []Value {
	if !s.graph.modular {
		return build(s)
	}
	inner := *s
	inner.path = ""
	inner.body = &body{names: map[string]bool{}, constants: map[string]Value{}, function: true}
	var given []Value
	for _, p := range parameters {
		if p.value.edge == nil {
			continue // left out, and so is the input
		}
		outside := *p.value
		given = append(given, outside)
		formal := Value{&edge{name: p.name, named: true, typ: outside.typ, shape: outside.shape}}
		inner.body.reserve(p.name, s.graph)
		inner.body.in = append(inner.body.in, formal.edge)
		*p.value = formal
		defer func() { *p.value = outside }()
	}
	results := build(&inner)
	outputs := make([]Value, len(results))
	for i, v := range results {
		inner.body.out = append(inner.body.out, v.edge)
		outputs[i] = output(v.typ, v.shape)
	}
	f := s.graph.function(name, doc, inner.body)
	return s.Node(functionDomain, f.name, given, nil, outputs...)
}

// function returns the function with that body, which it registers at first use.
func (g *Graph) function(name, doc string, b *body) *function {
	f := &function{name: name, doc: doc, body: b}
	content, err := proto.MarshalOptions{Deterministic: true}.Marshal(f.message(nil))
	if err != nil {
		panic(err) // the message was just made
	}
	f.content = content
	for i := 2; ; i++ {
		other, taken := g.functionNames[f.name]
		if !taken {
			break
		}
		if string(other.content) == string(content) {
			return other
		}
		f.name = name + "_" + strconv.Itoa(i)
	}
	g.functionNames[f.name] = f
	g.functions = append(g.functions, f)
	g.Import(functionDomain, 1)
	return f
}

func (f *function) message(opsets []*onnxpb.OperatorSetIdProto) *onnxpb.FunctionProto {
	message := &onnxpb.FunctionProto{
		Domain: proto.String(functionDomain), Name: proto.String(f.name), DocString: proto.String(f.doc),
		OpsetImport: opsets,
	}
	if opsets == nil {
		message.Name = nil // for comparison
	}
	for _, v := range f.body.in {
		message.Input = append(message.Input, v.name)
	}
	for _, v := range f.body.out {
		message.Output = append(message.Output, v.name)
	}
	for _, n := range f.body.nodes {
		message.Node = append(message.Node, n.message())
	}
	return message
}
