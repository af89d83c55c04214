package reference

import (
	"context"
	"fmt"

	"github.com/gptoss-conformance/gptoss/conformance"
	model "github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// RunStage runs one stage function on inputs that are given to it.
func (i implementation) RunStage(ctx context.Context, in conformance.StageInput) (map[string]tensor.Tensor, error) {
	switch i.precision {
	case model.Float64:
		return runStage(ctx, in, i.precision, model.Exact())
	case model.Float32:
		return runStage(ctx, in, i.precision, model.Single())
	default:
		return runStage(ctx, in, i.precision, model.Short(i.precision.Format()))
	}
}

func runStage[F model.Float](ctx context.Context, in conformance.StageInput, p model.Precision, a model.Arithmetic[F]) (map[string]tensor.Tensor, error) {
	m := model.New(in.Model, a)
	s := stage[F]{StageInput: in, layer: m.Layer(ctx, in.Layer)}
	results := make(map[string]tensor.Tensor, len(in.Taps))
	for _, name := range in.Taps {
		if taps.Integer(name) {
			indices := m.Stages.Choose(s.layer, s.reals(taps.GateLogits))
			results[name] = tensor.FromInt32s([]int{len(indices) / in.Model.Config.ExpertsPerToken, in.Model.Config.ExpertsPerToken}, indices)
			continue
		}
		values := s.run(name)
		if s.err != nil {
			return nil, fmt.Errorf("stage of %s: %w", name, s.err)
		}
		full := name
		if name != taps.Embedding && name != taps.FinalNorm && name != taps.Logits {
			full = taps.Block(in.Layer, name)
		}
		shape, err := taps.Shape(in.Model.Config, full, 1)
		if err != nil {
			return nil, err
		}
		row := tensor.Tensor{Shape: shape}.Elements()
		if row == 0 || len(values)%row != 0 {
			return nil, fmt.Errorf("stage of %s: %d values do not divide into rows of %d", name, len(values), row)
		}
		shape[0] = len(values) / row
		results[name] = store(p, shape, values)
	}
	return results, s.err
}

// stage reads a stage's inputs; the first one that is missing or has the wrong
// type is kept in err.
type stage[F model.Float] struct {
	conformance.StageInput
	layer model.Layer[F]
	err   error
}

func (s *stage[F]) reals(name string) []F {
	t, ok := s.Inputs[name]
	if !ok {
		s.fail(fmt.Errorf("input %s is missing", name))
		return nil
	}
	wide, err := t.Float64s()
	if err != nil {
		s.fail(fmt.Errorf("input %s %w", name, err))
		return nil
	}
	values := make([]F, len(wide))
	for i, v := range wide {
		values[i] = F(v)
	}
	return values
}

func (s *stage[F]) indices() []int32 {
	t, ok := s.Inputs[taps.ExpertIndices]
	if !ok {
		s.fail(fmt.Errorf("input %s is missing", taps.ExpertIndices))
		return nil
	}
	values, err := t.Int32s()
	if err != nil {
		s.fail(fmt.Errorf("input %s %w", taps.ExpertIndices, err))
	}
	for _, v := range values {
		if v < 0 || int(v) >= s.Model.Config.Experts {
			s.fail(fmt.Errorf("input %s names expert %d of %d", taps.ExpertIndices, v, s.Model.Config.Experts))
			return nil
		}
	}
	return values
}

func (s *stage[F]) fail(err error) {
	if s.err == nil {
		s.err = err
	}
}

// run applies the stage that makes a tap. Inputs are read first: with one of
// them missing nothing is computed.
func (s *stage[F]) run(name string) []F {
	l, f := s.layer, s.layer.Stages
	inputs := map[string][]F{}
	for _, read := range conformance.Reads(name) {
		if !taps.Integer(read) {
			inputs[read] = s.reals(read)
		}
	}
	var indices []int32
	switch name {
	case taps.ExpertWeights, taps.DenseGateWeights, taps.Prelinear, taps.ExpertOutputs, taps.Fused:
		indices = s.indices()
	}
	if s.err != nil {
		return nil
	}
	switch name {
	case taps.Embedding:
		return f.Embed(l, s.Model.Embedding, s.Tokens)
	case taps.AttnNormed:
		return f.AttnNorm(l, inputs[taps.Input], l.Weights.AttnNorm)
	case taps.Q, taps.K, taps.V:
		q, k, v := f.QKV(l, inputs[taps.AttnNormed])
		return map[string][]F{taps.Q: q, taps.K: k, taps.V: v}[name]
	case taps.QRot:
		return f.RopeQuery(l, inputs[taps.Q], s.Positions)
	case taps.KRot:
		return f.RopeKey(l, inputs[taps.K], s.Positions)
	case taps.AttnCore:
		queries, keys := inputs[taps.QRot], inputs[taps.KRot]
		return f.Attention(l, model.AttentionInput[F]{
			Queries: queries, QueryCount: len(queries) / l.Config.QueryWidth(),
			Keys: keys, Values: inputs[taps.V], KeyCount: len(keys) / l.Config.KVWidth(),
		})
	case taps.PostAttention:
		return f.AttnResidual(l, inputs[taps.Input], nil, f.AttnOut(l, inputs[taps.AttnCore]))
	case taps.MLPNormed:
		return f.MLPNorm(l, inputs[taps.PostAttention], l.Weights.MLPNorm)
	case taps.GateLogits:
		return f.GateLogits(l, inputs[taps.MLPNormed])
	case taps.ExpertWeights:
		return f.Weigh(l, inputs[taps.GateLogits], indices)
	case taps.DenseGateWeights:
		return model.DenseGateWeights(l, indices, inputs[taps.ExpertWeights])
	case taps.Prelinear:
		return f.Prelinear(l, inputs[taps.MLPNormed], indices)
	case taps.Activated:
		return f.Activate(l, inputs[taps.Prelinear])
	case taps.ExpertOutputs:
		return f.ExpertOutputs(l, inputs[taps.Activated], indices)
	case taps.Fused:
		return f.Fuse(l, inputs[taps.ExpertOutputs], indices, inputs[taps.ExpertWeights])
	case taps.Output:
		return f.MLPResidual(l, inputs[taps.PostAttention], nil, inputs[taps.Fused])
	case taps.FinalNorm:
		return f.FinalNorm(l, inputs[taps.Output], s.Model.FinalNorm)
	case taps.Logits:
		return f.Unembed(l, inputs[taps.FinalNorm], s.Model.Unembedding)
	}
	s.fail(fmt.Errorf("no stage makes it"))
	return nil
}
