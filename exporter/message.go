package exporter

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
)

// What a graph becomes: ONNX's protocol buffer messages.

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
