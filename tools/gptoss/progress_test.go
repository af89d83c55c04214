package main

import (
	"bytes"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

func openToy(t *testing.T) *checkpoint.Model {
	t.Helper()
	m, err := checkpoint.Open(fixtures.Dir("toy"))
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// A log gets one line for each layer of a large model, and nothing of a small one.
func TestLayersInALog(t *testing.T) {
	m := openToy(t)
	var log bytes.Buffer
	small := newLayers(&log, "forward", m, 1)
	small.next()
	small.finish()
	assert.Empty(t, log.String())

	l := newLayers(&log, "forward", m, 2)
	l.lines = true
	for range 2 * len(m.Blocks) {
		l.next()
	}
	l.finish()
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	require.Len(t, lines, 2*m.Config.Layers)
	assert.Regexp(t, `^gptoss: forward: layer 1 of 6, 0\.00 of 0\.00 GB of weights in 0 s, about \d+ s left$`, lines[0])
	assert.Regexp(t, `^gptoss: forward: layer 6 of 6, `, lines[5])

	// The weights of two runs are those of the file twice, but for the embedding,
	// which is looked up, and the vectors.
	var file, embedding int64
	for _, tensor := range m.Tensors() {
		if len(tensor.Shape) > 1 && !strings.HasSuffix(tensor.Name, "bias") {
			file += tensor.Bytes
		}
		if tensor.Name == "embedding.weight" {
			embedding = tensor.Bytes
		}
	}
	assert.Equal(t, file-embedding, l.whole)

	l.after, l.whole, l.count = []int64{3e9, 6e9, 9e9}, 12e9, 4
	assert.Equal(t, "forward: layer 4 of 6, 15.00 of 24.00 GB of weights in 30 s, about 18 s left", l.line(15e9, 6, 30*time.Second))
	assert.Equal(t, "forward: layer 4, 15.00 GB of weights in 30 s", l.line(15e9, 0, 30*time.Second))
}

// Logits alone are judged by a run for the truth and one for each sample: the time
// left is reckoned from that.
func TestJudgingLogitsTakesARunForEachSample(t *testing.T) {
	m := openToy(t)
	tokens := []int32{3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97, 93, 23, 84, 62}
	results, err := reference.Run(t.Context(), m, tokens, reference.Options{Precision: reference.Float32})
	require.NoError(t, err)
	var blocks atomic.Int64
	ctx := conformance.WithProgress(t.Context(), func() { blocks.Add(1) })
	_, err = conformance.Judge(ctx, m, tokens, conformance.Subject{Precision: reference.Float32, Taps: results},
		conformance.JudgeOptions{Catalogue: []faults.Fault{}, Samples: 3})
	require.NoError(t, err)
	assert.EqualValues(t, 4*m.Config.Layers, blocks.Load())
}
