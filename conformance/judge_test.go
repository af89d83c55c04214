package conformance_test

import (
	"encoding/binary"
	"maps"
	"math"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// judged judges the reference's own float32 output after a change to it.
func judged(t *testing.T, p *proving, precision reference.Precision, o conformance.JudgeOptions, change func(map[string]tensor.Tensor)) (*conformance.Verdict, error) {
	t.Helper()
	var results map[string]tensor.Tensor
	if precision == reference.Float32 {
		results = tapsOf(t, reference.New(p.weights, reference.Single()), p.tokens)
	} else {
		results = tapsOf(t, reference.New(p.weights, reference.Short(precision.Format())), p.tokens)
	}
	change(results)
	return conformance.Judge(t.Context(), p.weights, p.tokens, conformance.Subject{Precision: precision, Taps: results}, o)
}

// only keeps some taps.
func only(names ...string) func(map[string]tensor.Tensor) {
	return func(results map[string]tensor.Tensor) {
		maps.DeleteFunc(results, func(name string, _ tensor.Tensor) bool {
			_, tap := taps.Split(name)
			return !slices.Contains(names, tap)
		})
	}
}

// TestAnySubsetOfTapsPasses: a right implementation passes whatever it puts out,
// in every arithmetic.
func TestAnySubsetOfTapsPasses(t *testing.T) {
	p := provingGround(t)[0]
	subsets := map[string][]string{
		"logits":         {taps.Logits},
		"hidden states":  {taps.Input, taps.PostAttention, taps.Output},
		"block outputs":  {taps.Output, taps.Logits},
		"jax2onnx":       {taps.Input, taps.PostAttention, taps.Output, taps.MLPNormed, taps.GateLogits, taps.ExpertIndices, taps.ExpertWeights, taps.DenseGateWeights, taps.Prelinear, taps.Activated, taps.ExpertOutputs, taps.Fused},
		"attention":      {taps.QRot, taps.KRot, taps.V, taps.AttnCore},
		"routing only":   {taps.ExpertIndices},
		"weights":        {taps.ExpertWeights, taps.Logits},
		"gaps in blocks": {taps.Q, taps.AttnCore, taps.GateLogits, taps.Fused},
		"everything":     append([]string{taps.Embedding, taps.FinalNorm, taps.Logits}, taps.InBlock...),
	}
	for name, subset := range subsets {
		for _, precision := range []reference.Precision{reference.Float32, reference.BFloat16, reference.Float16} {
			t.Run(name+"/"+string(precision), func(t *testing.T) {
				t.Parallel()
				v, err := judged(t, p, precision, conformance.JudgeOptions{Catalogue: []faults.Fault{}}, only(subset...))
				require.NoError(t, err)
				assert.Equal(t, conformance.Pass, v.Word, "%s", v.Reason)
			})
		}
	}
}

// TestCoarserStorage: float32 results stored as bfloat16 are judged as that.
func TestCoarserStorage(t *testing.T) {
	p := provingGround(t)[0]
	v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{Catalogue: []faults.Fault{}}, stored(t, tensor.FromBFloat16s))
	require.NoError(t, err)
	assert.Equal(t, conformance.Pass, v.Word, "%s", v.Reason)
}

// stored changes the storage of every tap of reals.
func stored(t *testing.T, as func(shape []int, values []float32) tensor.Tensor) func(map[string]tensor.Tensor) {
	return func(results map[string]tensor.Tensor) {
		for name, r := range results {
			if !taps.Integer(name) {
				values, err := r.Float32s()
				require.NoError(t, err)
				results[name] = as(r.Shape, values)
			}
		}
	}
}

// TestCoarserLogitsAccuseNobody: storing logits in a short format moves them by
// more than some faults do. Chance has to be measured on what was stored as well.
// On the fixtures themselves a faint fault's difference is above that, so a smaller
// checkpoint stands beside them: 16 bits move its logits by up to 7.5 of what
// swiglu-clamps-glu-below does.
func TestCoarserLogitsAccuseNobody(t *testing.T) {
	for _, p := range append(provingGround(t)[:2], faintGround(t)) {
		for name, as := range map[string]func([]int, []float32) tensor.Tensor{"F16": tensor.FromFloat16s, "BF16": tensor.FromBFloat16s} {
			t.Run(p.fixture+"/"+name, func(t *testing.T) {
				t.Parallel()
				v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{}, func(results map[string]tensor.Tensor) {
					only(taps.Logits)(results)
					stored(t, as)(results)
				})
				require.NoError(t, err)
				assert.NotEqual(t, conformance.Fail, v.Word, "%s", v.Reason)
			})
		}
	}
}

// faintGround is a generated checkpoint with two experts of five, a window of three
// and a prompt of two tokens in turn, on which some faults do next to nothing.
func faintGround(t *testing.T) *proving {
	t.Helper()
	c := config.Config{
		Layers: 5, Experts: 5, ExpertsPerToken: 2, VocabSize: 199, HiddenSize: 64, IntermediateSize: 64,
		HeadDim: 16, Heads: 6, KVHeads: 3, SlidingWindow: 3, Sliding: config.Alternating(5),
		InitialContextLength: 4096, RopeTheta: 150000, RopeScalingFactor: 32, RopeNTKAlpha: 1, RopeNTKBeta: 32,
		SwiGLULimit: 7, SwiGLUAlpha: config.OpenAISwiGLUAlpha, NormEpsilon: config.OpenAINormEpsilon,
	}
	dir := t.TempDir()
	require.NoError(t, fixtures.Synthesize(t.Context(), c, 1000, fixtures.Healthy, dir))
	weights, err := checkpoint.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { weights.Close() })
	return &proving{fixture: "faint", prompt: "alternating", weights: weights, tokens: slices.Repeat([]int32{5, 6}, 10)}
}

// TestFloat16CannotHoldWhatIsSmall: a subject in bfloat16 whose taps were stored
// as float16 has lost its smallest values to float16's range, and is right.
func TestFloat16CannotHoldWhatIsSmall(t *testing.T) {
	p := provingGround(t)[1] // edge: embeddings down to 2^-10, scales down to 1/8
	for _, precision := range []reference.Precision{reference.Float32, reference.BFloat16} {
		v, err := judged(t, p, precision, conformance.JudgeOptions{Catalogue: []faults.Fault{}}, stored(t, tensor.FromFloat16s))
		require.NoError(t, err)
		assert.NotEqual(t, conformance.Fail, v.Word, "%s: %s", precision, v.Reason)
	}
}

// TestBatchOfOne: many implementations put a batch dimension before everything.
func TestBatchOfOne(t *testing.T) {
	p := provingGround(t)[0]
	v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{Catalogue: []faults.Fault{}}, func(results map[string]tensor.Tensor) {
		for name, r := range results {
			r.Shape = append([]int{1}, r.Shape...)
			results[name] = r
		}
	})
	require.NoError(t, err)
	assert.Equal(t, conformance.Pass, v.Word, "%s", v.Reason)
}

// TestIndicesOfOneByte: no model of the family has more than 256 experts.
func TestIndicesOfOneByte(t *testing.T) {
	p := provingGround(t)[0]
	v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{Catalogue: []faults.Fault{}}, func(results map[string]tensor.Tensor) {
		for name, r := range results {
			if !taps.Integer(name) {
				continue
			}
			indices, err := r.Int32s()
			require.NoError(t, err)
			bytes := make([]byte, len(indices))
			for i, e := range indices {
				bytes[i] = byte(e)
			}
			results[name] = tensor.Tensor{DType: tensor.U8, Shape: r.Shape, Data: bytes}
		}
	})
	require.NoError(t, err)
	assert.Equal(t, conformance.Pass, v.Word, "%s", v.Reason)
}

// TestAnUnknownMistakeIsNotNamed: bounds that are widened for hypotheses must not
// make any fault of the catalogue explain a mild mistake that is not in it.
func TestAnUnknownMistakeIsNotNamed(t *testing.T) {
	p := provingGround(t)[0]
	m := reference.New(p.weights, reference.Short(reference.BFloat16.Format()))
	softmax := m.Stages.Softmax
	m.Stages.Softmax = func(l reference.Layer[float64], scores []float64, sink float64) { softmax(l, scores, sink+0.1) }
	v, err := conformance.Judge(t.Context(), p.weights, p.tokens,
		conformance.Subject{Precision: reference.BFloat16, Taps: tapsOf(t, m, p.tokens)}, conformance.JudgeOptions{Samples: 3})
	require.NoError(t, err)
	require.Equal(t, conformance.Fail, v.Word)
	assert.Equal(t, "block_0.attn_core", v.FirstDivergence)
	assert.Less(t, v.Stages[conformance.StageAttention], 4.0, "no mild mistake: choose another")
	assert.Equal(t, "none", v.Diagnosis.ID(), "%s", v.Diagnosis)
}

// TestMalformedSubjectsFail: what is not a number, or not of its shape, fails
// before anything is compared, and the verdict says which tensor it is.
func TestMalformedSubjectsFail(t *testing.T) {
	p := provingGround(t)[0]
	const tap = "block_1.attn_core"
	put := func(value float32) func(map[string]tensor.Tensor) {
		return func(results map[string]tensor.Tensor) {
			r := results[tap]
			r.Data = slices.Clone(r.Data)
			binary.LittleEndian.PutUint32(r.Data[4*77:], math.Float32bits(value))
			results[tap] = r
		}
	}
	reshape := func(shape ...int) func(map[string]tensor.Tensor) {
		return func(results map[string]tensor.Tensor) {
			r := results[tap]
			r.Shape = shape
			results[tap] = r
		}
	}
	width := p.weights.Config.QueryWidth()
	indices := "block_0." + taps.ExpertIndices
	for name, c := range map[string]struct {
		change func(map[string]tensor.Tensor)
		at     string
		says   string
	}{
		"NaN":         {put(float32(math.NaN())), tap, "NaN at [0 77]"},
		"infinite":    {put(float32(math.Inf(-1))), tap, "-Inf at [0 77]"},
		"transposed":  {reshape(width, len(p.tokens)), tap, "it is transposed"},
		"wrong shape": {reshape(len(p.tokens)*width/2, 2), tap, "shape is"},
		"last row":    {reshape(1, width), tap, "a row for every token is needed"},
		"padded":      {reshape(len(p.tokens), width+8), tap, "cut the padding off"},
		"flat":        {reshape(len(p.tokens) * width), tap, "shape is"},
		"batch of 2":  {reshape(2, len(p.tokens), width), tap, "shape is"},
		"short data":  {func(r map[string]tensor.Tensor) { x := r[tap]; x.Data = x.Data[:100]; r[tap] = x }, tap, "bytes do not fit"},
		"integers": {func(r map[string]tensor.Tensor) {
			r[tap] = tensor.FromInt32s(r[tap].Shape, make([]int32, r[tap].Elements()))
		}, tap, "not reals"},
		"real indices": {func(r map[string]tensor.Tensor) {
			r[indices] = tensor.FromFloat32s(r[indices].Shape, make([]float32, r[indices].Elements()))
		}, indices, "not integers"},
		"expert that is not there": {func(r map[string]tensor.Tensor) {
			x, _ := r[indices].Int32s()
			x[5] = int32(p.weights.Config.Experts)
			r[indices] = tensor.FromInt32s(r[indices].Shape, x)
		}, indices, "expert 8 at [1 1]"},
		"expert twice": {func(r map[string]tensor.Tensor) {
			x, _ := r[indices].Int32s()
			x[1] = x[0]
			r[indices] = tensor.FromInt32s(r[indices].Shape, x)
		}, indices, "twice for token 0"},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{}, c.change)
			require.NoError(t, err)
			assert.Equal(t, conformance.Fail, v.Word)
			assert.Equal(t, c.at, v.FirstDivergence)
			assert.Contains(t, v.Reason, c.says)
			for _, f := range v.Findings {
				assert.Equal(t, conformance.Form, f.Method, "numbers were compared")
			}
		})
	}
}

// TestQuestionsThatMakeNoSense are errors, not verdicts.
func TestQuestionsThatMakeNoSense(t *testing.T) {
	p := provingGround(t)[0]
	_, err := judged(t, p, reference.Float32, conformance.JudgeOptions{}, func(r map[string]tensor.Tensor) {
		logits := r[taps.Logits]
		clear(r)
		r["lm_head"] = logits
	})
	assert.ErrorContains(t, err, `"lm_head"`)
	_, err = judged(t, p, reference.Float32, conformance.JudgeOptions{}, func(r map[string]tensor.Tensor) { clear(r) })
	assert.ErrorContains(t, err, "it is empty")

	for _, tokens := range [][]int32{nil, {-1}, {int32(p.weights.Config.VocabSize)}} {
		_, err := conformance.Judge(t.Context(), p.weights, tokens, conformance.Subject{Precision: reference.Float32}, conformance.JudgeOptions{})
		assert.Error(t, err, "tokens %v", tokens)
	}
}

// TestOneElementIsEnough: a single wrong element of a single tap fails, there.
func TestOneElementIsEnough(t *testing.T) {
	p := provingGround(t)[0]
	for _, name := range []string{"embedding", "block_0.q_rot", "block_1.mlp_gate_logits", "block_2.mlp_activated_outputs", "final_norm", "logits"} {
		v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{}, func(r map[string]tensor.Tensor) {
			values, err := r[name].Float32s()
			require.NoError(t, err)
			values[13] += 0.01
			r[name] = tensor.FromFloat32s(r[name].Shape, values)
		})
		require.NoError(t, err)
		assert.Equal(t, conformance.Fail, v.Word)
		assert.Equal(t, name, v.FirstDivergence, "%s", v.Reason)
		assert.Equal(t, "none", v.Diagnosis.ID(), "%s: no fault of the catalogue does this", name)
	}
}

// TestUnexplainedFlipFails: an expert that the subject's own logits pass over by a
// wide margin is a fault, at the choice itself.
func TestUnexplainedFlipFails(t *testing.T) {
	p := provingGround(t)[0]
	const name = "block_1." + taps.ExpertIndices
	v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{Catalogue: []faults.Fault{}}, func(r map[string]tensor.Tensor) {
		indices, err := r[name].Int32s()
		require.NoError(t, err)
		for e := range int32(p.weights.Config.Experts) {
			if !slices.Contains(indices[12:16], e) { // token 3 of four experts each
				indices[12] = e
				break
			}
		}
		r[name] = tensor.FromInt32s(r[name].Shape, indices)
	})
	require.NoError(t, err)
	assert.Equal(t, conformance.Fail, v.Word)
	assert.Equal(t, name, v.FirstDivergence, "%s", v.Reason)
	assert.Equal(t, 1, v.Routing[1].Unexplained)
}

// TestShortInputIsPartial: a pass on an input that leaves the window unused is
// not a pass.
func TestShortInputIsPartial(t *testing.T) {
	p := provingGround(t)[0]
	p.tokens = p.tokens[:p.weights.Config.SlidingWindow]
	v, err := judged(t, p, reference.Float32, conformance.JudgeOptions{}, func(map[string]tensor.Tensor) {})
	require.NoError(t, err)
	assert.Equal(t, conformance.Partial, v.Word)
	assert.Contains(t, v.Unexercised[0], "sliding window")
}

// TestFaultsBelowTheNoiseAreNotClaimed: from logits alone in bfloat16 an eps of
// 1e-6 on toy's healthy activations can't be seen, and the verdict says so.
func TestFaultsBelowTheNoiseAreNotClaimed(t *testing.T) {
	p := provingGround(t)[0]
	f, ok := faults.ByID("rmsnorm-eps-1e-6")
	require.True(t, ok)
	for name, model := range map[string]reference.Model[float64]{
		"right": reference.New(p.weights, reference.Short(reference.BFloat16.Format())),
		"wrong": faults.Apply(f, reference.New(p.weights, reference.Short(reference.BFloat16.Format()))),
	} {
		results := tapsOf(t, model, p.tokens)
		v, err := conformance.Judge(t.Context(), p.weights, p.tokens,
			conformance.Subject{Precision: reference.BFloat16, Taps: map[string]tensor.Tensor{taps.Logits: results[taps.Logits]}}, conformance.JudgeOptions{})
		require.NoError(t, err)
		assert.Equal(t, conformance.Partial, v.Word, "%s: %s", name, v.Reason)
		assert.Contains(t, v.Indistinguish, "rmsnorm-eps-1e-6", name)
		assert.NotContains(t, v.Indistinguish, "window-one-too-many", name)
	}
}

// TestMoreTapsForgiveNothing: a fault that the logits alone give away does not pass
// because hidden states come with them, each of which is as near to the one before
// as rounding allows. A right subject passes with them as without.
func TestMoreTapsForgiveNothing(t *testing.T) {
	p := provingGround(t)[0]
	f, ok := faults.ByID("topk-not-renormalized")
	require.True(t, ok)
	right := reference.New(p.weights, reference.Short(reference.BFloat16.Format()))
	for _, beside := range [][]string{
		{},
		{taps.Output, taps.FinalNorm},
		{taps.Input, taps.PostAttention, taps.Output, taps.FinalNorm},
		{taps.ExpertIndices, taps.Output, taps.FinalNorm},
	} {
		judge := func(m reference.Model[float64]) *conformance.Verdict {
			results := tapsOf(t, m, p.tokens)
			only(append(beside, taps.Logits)...)(results)
			v, err := conformance.Judge(t.Context(), p.weights, p.tokens,
				conformance.Subject{Precision: reference.BFloat16, Taps: results}, conformance.JudgeOptions{})
			require.NoError(t, err)
			return v
		}
		v := judge(faults.Apply(f, right))
		assert.Equal(t, conformance.Fail, v.Word, "beside %v", beside)
		if assert.NotNil(t, v.Diagnosis, "beside %v", beside) {
			assert.Equal(t, f.ID, v.Diagnosis.ID(), "beside %v", beside)
		}
		v = judge(right)
		assert.NotEqual(t, conformance.Fail, v.Word, "beside %v: %s", beside, v.Reason)
	}
}

// TestGreedyTokens: generated tokens and their log-probabilities are enough to
// tell right from wrong, and often which wrong.
func TestGreedyTokens(t *testing.T) {
	p := provingGround(t)[0]
	prompt := p.tokens[:20]
	generate := func(m reference.Model[float32], n int) conformance.Greedy {
		g := conformance.Greedy{Precision: reference.Float32}
		tokens := slices.Clone(prompt)
		for range n {
			logits, err := m.Forward(t.Context(), tokens, nil, reference.Observer[float32]{})
			require.NoError(t, err)
			row := logits[len(logits)-p.weights.Config.VocabSize:]
			best := reference.TopK(row, 1)[0]
			sum := 0.0
			for _, x := range row {
				sum += math.Exp(float64(x - row[best]))
			}
			g.Tokens, g.LogProbs = append(g.Tokens, best), append(g.LogProbs, -math.Log(sum))
			tokens = append(tokens, best)
		}
		return g
	}
	right := generate(reference.New(p.weights, reference.Single()), 16)
	v, err := conformance.JudgeGreedy(t.Context(), p.weights, prompt, right, conformance.JudgeOptions{})
	require.NoError(t, err)
	assert.NotEqual(t, conformance.Fail, v.Word, "%s", v.Reason)

	for _, id := range []string{"window-one-too-many", "sinks-dropped", "swiglu-alpha-1"} {
		f, ok := faults.ByID(id)
		require.True(t, ok)
		v, err := conformance.JudgeGreedy(t.Context(), p.weights, prompt,
			generate(faults.Apply(f, reference.New(p.weights, reference.Single())), 16), conformance.JudgeOptions{})
		require.NoError(t, err)
		assert.Equal(t, conformance.Fail, v.Word, id)
		assert.Equal(t, id, v.Diagnosis.ID())
	}

	right.LogProbs[3] = math.NaN()
	v, err = conformance.JudgeGreedy(t.Context(), p.weights, prompt, right, conformance.JudgeOptions{})
	require.NoError(t, err)
	assert.Equal(t, conformance.Fail, v.Word)
	right.LogProbs = right.LogProbs[:3]
	_, err = conformance.JudgeGreedy(t.Context(), p.weights, prompt, right, conformance.JudgeOptions{})
	assert.Error(t, err)
}
