package conformance

import (
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// Stages in the order of the forward pass. Each has one file in every folder.
const (
	StageEmbedding = "embedding"
	StageRMSNorm   = "rmsnorm"
	StageRope      = "rope"
	StageAttention = "attention"
	StageGating    = "gating"
	StageExperts   = "experts"
	StageLogits    = "logits"
)

// check is what the judge knows about a tap: the stage that makes it, the taps
// that the stage reads, and how far rounding can move it.
type check struct {
	stage string
	// reads names the taps that the stage computes from, without their block.
	reads []string
	// bound gives, for every element of want, how far an implementation may be
	// from it when it starts from the same inputs.
	bound func(b bounding, want []float64) []float64
}

// checks is the registry of stages, keyed by tap without its block.
var checks = map[string]check{
	taps.Embedding:        {StageEmbedding, nil, boundEmbedding},
	taps.Input:            {StageLogits, []string{previousOutput}, boundCopy},
	taps.AttnNormed:       {StageRMSNorm, []string{taps.Input}, boundRMSNorm},
	taps.Q:                {StageAttention, []string{taps.AttnNormed}, boundQ},
	taps.K:                {StageAttention, []string{taps.AttnNormed}, boundK},
	taps.V:                {StageAttention, []string{taps.AttnNormed}, boundV},
	taps.QRot:             {StageRope, []string{taps.Q}, boundQRot},
	taps.KRot:             {StageRope, []string{taps.K}, boundKRot},
	taps.AttnCore:         {StageAttention, []string{taps.QRot, taps.KRot, taps.V}, boundAttnCore},
	taps.PostAttention:    {StageAttention, []string{taps.Input, taps.AttnCore}, boundPostAttention},
	taps.MLPNormed:        {StageRMSNorm, []string{taps.PostAttention}, boundRMSNorm},
	taps.GateLogits:       {StageGating, []string{taps.MLPNormed}, boundGateLogits},
	taps.ExpertIndices:    {StageGating, []string{taps.GateLogits}, nil}, // judged by margin: routing.go
	taps.ExpertWeights:    {StageGating, []string{taps.GateLogits, taps.ExpertIndices}, boundExpertWeights},
	taps.DenseGateWeights: {StageGating, []string{taps.ExpertIndices, taps.ExpertWeights}, boundCopy},
	taps.Prelinear:        {StageExperts, []string{taps.MLPNormed, taps.ExpertIndices}, boundPrelinear},
	taps.Activated:        {StageExperts, []string{taps.Prelinear}, boundActivated},
	taps.ExpertOutputs:    {StageExperts, []string{taps.Activated, taps.ExpertIndices}, boundExpertOutputs},
	taps.Fused:            {StageExperts, []string{taps.ExpertOutputs, taps.ExpertIndices, taps.ExpertWeights}, boundFused},
	taps.Output:           {StageExperts, []string{taps.PostAttention, taps.Fused}, boundOutput},
	taps.FinalNorm:        {StageRMSNorm, []string{previousOutput}, boundRMSNorm},
	taps.Logits:           {StageLogits, []string{taps.FinalNorm}, boundLogits},
}

// previousOutput stands for the residual stream as the part before left it.
const previousOutput = "previous output"

// StageOf returns the stage that makes a tap.
func StageOf(full string) string {
	_, name := taps.Split(full)
	return checks[name].stage
}

// readsOf returns the full names of the taps that a tap is computed from. The
// embedding is computed from the tokens alone.
func readsOf(c config.Config, full string) []string {
	layer, name := taps.Split(full)
	reads := make([]string, 0, 3)
	for _, read := range checks[name].reads {
		switch {
		case read == previousOutput:
			reads = append(reads, outputBefore(c, layer))
		case layer < 0:
			reads = append(reads, read)
		default:
			reads = append(reads, taps.Block(layer, read))
		}
	}
	return reads
}

// outputBefore returns the tap that holds the residual stream when a layer
// starts, or, for layer -1, when the last block is done.
func outputBefore(c config.Config, layer int) string {
	if layer < 0 {
		layer = c.Layers
	}
	if layer == 0 {
		return taps.Embedding
	}
	return taps.Block(layer-1, taps.Output)
}
