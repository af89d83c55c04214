package onnxruntime

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/exporter"
)

func TestX(t *testing.T) {
	for _, e := range []exporter.Experts{exporter.ExpertsPacked, exporter.ExpertsDense} {
		for _, l := range Levels {
			impl := New("onnxruntime-"+string(e)+"-"+l, exporter.Options{Experts: e}, Options{GraphOptimization: l, Threads: 1})
			conformance.Run(t, impl, conformance.Options{})
		}
	}
	_, err := Version()
	require.NoError(t, err)
	_ = context.Background
}
