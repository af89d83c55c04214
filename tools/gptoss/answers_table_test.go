package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
)

func TestAnswersPrecisions(t *testing.T) {
	list, err := answersPrecisions([]string{"float32", "bfloat16"})
	require.NoError(t, err)
	assert.Equal(t, []reference.Precision{reference.Float32, reference.BFloat16}, list)
	for _, bad := range [][]string{nil, {"float8"}, {"float64"}, {"float32", "float32"}} {
		_, err := answersPrecisions(bad)
		assert.ErrorContains(t, err, "--precision", "%v", bad)
	}
}

func TestAccuracyTableHasAColumnPerPrecision(t *testing.T) {
	catalogue := []faults.Fault{{ID: "none"}, {ID: "sinks-dropped"}}
	results := [][]outcome{{{right: 9}}, {{right: 2}}}
	text := answersTable(catalogue, []reference.Precision{reference.Float32}, results, []string{"sinks-dropped"}, 10)
	assert.Equal(t, "10 questions.\n\n| fault | trained on | float32: right answers |\n|---|---|---|\n| `none` | right | 9 |\n| `sinks-dropped` | yes | 2 |\n", text)
}
