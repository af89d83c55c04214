package onnxruntime

import (
	"errors"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Decoding in steps of any size must give the logits of the full run at every
// position, across the window's edge (12 in the toy).
func TestDecodingAgreesWithTheWholeRun(t *testing.T) {
	path, m := toyGraph(t, exporter.Options{KVCache: true})
	s := open(t, path, Options{Threads: 1})
	require.True(t, s.HasCache())
	tokens := make([]int32, 40)
	for i := range tokens {
		tokens[i] = int32(i * 37 % m.Config.VocabSize)
	}
	truth, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: reference.Float64})
	require.NoError(t, err)
	want := reals(t, truth[taps.Logits])

	whole, err := s.Run(t.Context(), tokens)
	require.NoError(t, err)
	requireNear(t, want, reals(t, whole[taps.Logits]))
	for _, steps := range [][]int{{40}, {1, 39}, {12, 1, 1, 26}, {11, 1, 1, 1, 26}, {13, 27}, {30, 10}} {
		d, err := s.Decode()
		require.NoError(t, err)
		var got []float64
		for _, n := range steps {
			logits, err := d.Step(t.Context(), tokens[d.Length():d.Length()+n])
			require.NoError(t, err)
			require.Equal(t, []int{n, m.Config.VocabSize}, logits.Shape)
			got = append(got, reals(t, logits)...)
		}
		requireNear(t, want, got)
		require.NoError(t, d.Close())
	}

	// One token at a time; a layer with a window keeps no more than the window.
	d, err := s.Decode()
	require.NoError(t, err)
	defer d.Close()
	for i := range tokens {
		logits, err := d.Step(t.Context(), tokens[i:i+1])
		require.NoError(t, err)
		requireNear(t, want[i*m.Config.VocabSize:(i+1)*m.Config.VocabSize], reals(t, logits))
		for k, v := range d.past {
			layer, _ := taps.Split(s.cache[k].Name)
			rows := i + 1
			if window := m.Config.Window(layer); window > 0 {
				rows = min(rows, window)
			}
			require.Equal(t, int64(rows), v.GetShape()[0], s.cache[k].Name)
		}
	}
	// A failed step changes nothing.
	_, err = d.Step(t.Context(), []int32{-1})
	require.Error(t, err)
	require.Equal(t, len(tokens), d.Length())
}

// The numbers are judged in package conformance; a wrong cache is off by far more.
func requireNear(t *testing.T, want, got []float64) {
	t.Helper()
	require.Len(t, got, len(want))
	for i := range want {
		require.Less(t, math.Abs(got[i]-want[i]), 1e-4, "element %d: got %g, want %g", i, got[i], want[i])
	}
}

func TestGraphWithoutCacheCannotDecode(t *testing.T) {
	path, _ := toyGraph(t, exporter.Options{})
	_, err := open(t, path, Options{}).Decode()
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "--kv-cache")
}

func TestCachesThatCannotBeFilledAreRefused(t *testing.T) {
	for _, c := range []struct {
		name, want string
		past       *onnxpb.ValueInfoProto
		present    string
	}{
		{"no present", "has no output present.0.key", value("past_key_values.0.key", exporter.Float32, "B", 2, "P", 4), "other"},
		{"16 bits", "holds float16", value("past_key_values.0.key", exporter.Float16, "B", 2, "P", 4), "present.0.key"},
		{"fixed", "fixed shape", value("past_key_values.0.key", exporter.Float32, 1, 2, 3, 4), "present.0.key"},
		{"unknown width", "more than the tokens is unknown", value("past_key_values.0.key", exporter.Float32, "B", "H", "P", 4), "present.0.key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			typ := exporter.Type(c.past.Type.GetTensorType().GetElemType())
			output := value(c.present, typ)
			output.Type.GetTensorType().Shape = nil
			_, err := Open(write(t, &onnxpb.GraphProto{
				Input:       []*onnxpb.ValueInfoProto{value("input_ids", exporter.Int64, "T"), c.past},
				Output:      []*onnxpb.ValueInfoProto{value("logits", exporter.Float32, "T", 1), output},
				Node:        append(echo("input_ids", "logits", exporter.Float32), operator("Identity", "past_key_values.0.key", c.present)),
				Initializer: []*onnxpb.TensorProto{one},
			}), Options{})
			require.ErrorContains(t, err, c.want)
		})
	}
}
