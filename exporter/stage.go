package exporter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Inputs of a stage's graph that are not taps.
const (
	TokensInput    = "input_ids" // int64 [tokens]
	PositionsInput = "positions" // int64 [tokens]
)

// ExportStage writes a graph of single stages: what computes the wanted taps,
// named without their block, from the taps that those are computed from. They
// are the graph's inputs under their own names, float32 (the experts' indices
// int64) and of any number of tokens; RoPE also reads positions, and the
// embedding only input_ids.
//
// Of the model only the configuration and the weights that the stages read must
// be there. Taps of several stages can be wanted at once; none of them is
// computed from another.
func ExportStage(ctx context.Context, m *checkpoint.Model, layer int, wanted []string, path string, o Options) error {
	o = o.withDefaults(m)
	if err := o.check(); err != nil {
		return err
	}
	if layer < 0 || layer >= len(m.Blocks) || layer >= m.Config.Layers {
		return fmt.Errorf("there is no layer %d in a model of %d", layer, m.Config.Layers)
	}
	b := &stageBuilder{model: newModel(m, o), inputs: map[string]Value{}}
	b.partial = true
	for _, name := range wanted {
		// Within PackedExperts, which makes three taps at once.
		b.wanted[taps.Block(layer, name)] = true
	}
	var common shared
	b.decoding(&common)
	b.layer = b.model.layer(layer)
	var err error
	if b.layer.Weights, err = b.layerWeights(layer, common); err != nil {
		return err
	}
	for _, name := range wanted {
		v, err := b.stage(name)
		if err != nil {
			return err
		}
		if !slices.Contains(b.graph.main.out, v.edge) {
			b.graph.Output(b.layer.Rename(v, name+outputSuffix))
		}
	}
	if err := b.graph.Err(); err != nil {
		return err
	}
	b.graph.layOut(dataName(path))
	return write(ctx, b.graph, path, o, func(write func(ctx context.Context) error) (*onnxpb.ModelProto, error) {
		message := b.graph.message("gpt-oss stage")
		message.ProducerName = proto.String(Producer)
		return message, write(ctx)
	})
}

// outputSuffix tells an output of a stage's graph from an input of the same tap.
const outputSuffix = "_out"

// StageOutput returns the name of a tap that a stage's graph puts out.
func StageOutput(name string) string { return name + outputSuffix }

type stageBuilder struct {
	*model
	layer  Layer
	inputs map[string]Value
}

var tokensDim = Symbol("sequence")

// input declares a tap that is given.
func (b *stageBuilder) input(name string) Value {
	if v, ok := b.inputs[name]; ok {
		return v
	}
	var v Value
	switch name {
	case TokensInput, PositionsInput:
		v = b.graph.Input(name, Int64, Shape{tokensDim}, "")
	default:
		sizes, err := taps.Shape(b.config, taps.Block(0, name), 1)
		if err != nil {
			sizes, err = taps.Shape(b.config, name, 1)
		}
		if err != nil {
			b.layer.Fail("%v", err)
		}
		shape := Ns(sizes...)
		shape[0] = tokensDim
		typ := Float32
		if name == taps.ExpertIndices {
			typ = Int64
		}
		v = b.graph.Input(name, typ, shape, "")
	}
	b.inputs[name] = v
	return v
}

// rotary returns cosine and sine at the positions that are given.
func (b *stageBuilder) rotary() (cos, sin Value) {
	if b.inputs["cos"].edge == nil {
		s := b.model.layer(-1).Sub("rope")
		b.inputs["cos"], b.inputs["sin"] = b.stages.RotaryTables(s, b.stages.Frequencies(b.config), b.input(PositionsInput), nearRows*farRows)
	}
	return b.inputs["cos"], b.inputs["sin"]
}

// stage adds the stage that makes a tap.
func (b *stageBuilder) stage(name string) (Value, error) {
	l, st, w := b.layer, b.layer.Stages, b.layer.Weights
	switch name {
	case taps.Embedding:
		table, err := b.matrix("embedding.weight", b.weights.Embedding)
		if err != nil {
			return Value{}, err
		}
		return st.Embed(l, table, b.input(TokensInput)), nil
	case taps.AttnNormed:
		return st.AttnNorm(l, b.input(taps.Input), w.AttnNorm), nil
	case taps.Q, taps.K, taps.V:
		q, k, v := st.QKV(l, b.input(taps.AttnNormed))
		return map[string]Value{taps.Q: q, taps.K: k, taps.V: v}[name], nil
	case taps.QRot:
		cos, sin := b.rotary()
		return st.RopeQuery(l, b.input(taps.Q), cos, sin), nil
	case taps.KRot:
		cos, sin := b.rotary()
		return st.RopeKey(l, b.input(taps.K), cos, sin), nil
	case taps.AttnCore:
		q := b.input(taps.QRot)
		positions := l.Range(l.Int64(0), l.Squeeze(l.SizeOf(q, 0), 0), tokensDim)
		if st.FusedAttention != nil {
			// The operators' own attention has its positions from the beginning too.
			core, _, _ := st.FusedAttention(l, FusedAttentionInput{
				Queries: q, Keys: b.input(taps.KRot), Values: b.input(taps.V), Sinks: w.Sinks,
				Total: l.Cast(l.Squeeze(l.SizeOf(q, 0), 0), Int32), Window: b.config.Window(l.Index),
			})
			return core, nil
		}
		return st.Attention(l, AttentionInput{
			Queries: q, Keys: b.input(taps.KRot), Values: b.input(taps.V), Sinks: w.Sinks,
			Visible: st.Visible(l.Scope, positions, positions, b.config.Window(l.Index)),
		}), nil
	case taps.PostAttention:
		// The normed stream is not given: only a wrong residual would read it.
		return st.AttnResidual(l, b.input(taps.Input), Value{}, st.AttnOut(l, b.input(taps.AttnCore))), nil
	case taps.MLPNormed:
		return st.MLPNorm(l, b.input(taps.PostAttention), w.MLPNorm), nil
	case taps.GateLogits:
		return st.GateLogits(l, b.input(taps.MLPNormed)), nil
	case taps.ExpertIndices:
		indices, _ := st.Choose(l, b.input(taps.GateLogits))
		return l.Cast(indices, Int32), nil
	case taps.ExpertWeights:
		logits, indices := b.input(taps.GateLogits), b.input(taps.ExpertIndices)
		chosen := l.one("GatherElements", Float32, indices.shape, []Value{logits, indices}, attribute{"axis", int64(1)})
		return st.Weigh(l, logits, indices, chosen), nil
	case taps.DenseGateWeights:
		return DenseGateWeights(l, b.input(taps.ExpertIndices), b.input(taps.ExpertWeights)), nil
	case taps.Prelinear:
		if b.fused() {
			return Value{}, fmt.Errorf("ONNX Runtime's experts keep %s to themselves: %w", name, errors.ErrUnsupported)
		}
		return b.prelinear(b.input(taps.MLPNormed), b.input(taps.ExpertIndices)), nil
	case taps.Activated:
		return st.Activate(l, b.input(taps.Prelinear)), nil
	case taps.ExpertOutputs:
		if b.fused() {
			return Value{}, fmt.Errorf("ONNX Runtime's experts keep %s to themselves: %w", name, errors.ErrUnsupported)
		}
		return b.expertOutputs(b.input(taps.Activated), b.input(taps.ExpertIndices)), nil
	case taps.Fused:
		// The indices are not given: only a wrong sum would read them.
		return st.Fuse(l, b.input(taps.ExpertOutputs), Value{}, b.input(taps.ExpertWeights)), nil
	case taps.Output:
		return st.MLPResidual(l, b.input(taps.PostAttention), Value{}, b.input(taps.Fused)), nil
	case taps.FinalNorm:
		return st.FinalNorm(l, b.input(taps.Output), b.vector("norm.scale", b.weights.FinalNorm)), nil
	case taps.Logits:
		table, err := b.matrix("unembedding.weight", b.weights.Unembedding)
		if err != nil {
			return Value{}, err
		}
		return st.Unembed(l, b.input(taps.FinalNorm), table), nil
	}
	return Value{}, fmt.Errorf("no stage makes %q", name)
}

// fused reports whether the experts are one operator.
func (b *stageBuilder) fused() bool {
	return b.options.Experts == ExpertsPacked && b.stages.FusedExperts != nil
}

// prelinear is the first half of the experts alone.
func (b *stageBuilder) prelinear(x, indices Value) Value {
	l := b.layer
	if b.options.Experts == ExpertsDense {
		return ChosenExperts(l, DenseLinear(l, l.Unsqueeze(x, 0), l.Weights.MLP1, l.Weights.MLP1Bias), indices)
	}
	return EachExpert(l, indices, []int{2 * b.config.IntermediateSize}, func(l Layer, expert, slots Value) []Value {
		input := l.Gather(x, 0, l.Div(slots, l.Int64(b.config.ExpertsPerToken)))
		return []Value{PackedLinear(l, input, l.Weights.MLP1Packed, l.Weights.MLP1Bias, expert)}
	})[0]
}

// expertOutputs is the second half of the experts alone, on activations that
// every slot has of its own.
func (b *stageBuilder) expertOutputs(activated, indices Value) Value {
	l, c := b.layer, b.config
	if b.options.Experts == ExpertsDense {
		// Each slot through all experts, then its own one is picked.
		slots := Symbol("slots")
		flat := l.Reshape(activated, slots, N(c.IntermediateSize))
		all := DenseLinear(l, l.Unsqueeze(flat, 0), l.Weights.MLP2, l.Weights.MLP2Bias)
		picked := ChosenExperts(l, all, l.Reshape(indices, slots, N(1)))
		return l.Reshape(picked, tokensDim, N(c.ExpertsPerToken), N(c.HiddenSize))
	}
	flat := l.Reshape(activated, Symbol("slots"), N(c.IntermediateSize))
	return EachExpert(l, indices, []int{c.HiddenSize}, func(l Layer, expert, slots Value) []Value {
		return []Value{PackedLinear(l, l.Gather(flat, 0, slots), l.Weights.MLP2Packed, l.Weights.MLP2Bias, expert)}
	})[0]
}
