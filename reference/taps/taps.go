// Package taps is the registry of everything that can be observed inside a
// gpt-oss forward pass: names, order, shapes and kinds of values.
//
// The same names key the golden files, the outputs of exported ONNX graphs, the
// rows of reports and the text of errors. The names from input to mlp_fused are
// those of jax2onnx's harness, so that its transcripts can be read beside ours.
package taps

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/gptoss-conformance/gptoss/reference/config"
)

// Names of the taps outside the blocks.
const (
	Embedding = "embedding"
	FinalNorm = "final_norm"
	Logits    = "logits"
)

// Names of the taps inside a block, without its "block_N." scope.
const (
	Input             = "input"
	AttnNormed        = "attn_normed"
	Q                 = "q"
	K                 = "k"
	V                 = "v"
	QRot              = "q_rot"
	KRot              = "k_rot"
	AttnCore          = "attn_core" // before the output projection
	PostAttention     = "post_attention"
	MLPNormed         = "mlp_normed"
	GateLogits        = "mlp_gate_logits"
	ExpertIndices     = "mlp_expert_indices" // descending gate logit
	ExpertWeights     = "mlp_expert_weights"
	DenseGateWeights  = "mlp_dense_gate_weights" // zero where not chosen
	Prelinear         = "mlp_prelinear_outputs"  // interleaved, bias included
	Activated         = "mlp_activated_outputs"
	ExpertOutputs     = "mlp_expert_outputs" // bias included, not weighted
	Fused             = "mlp_fused"          // without the residual
	Output            = "output"
	blockScopePrefix  = "block_"
	blockScopeDivider = "."
)

// InBlock lists the taps of one block in execution order.
var InBlock = []string{
	Input, AttnNormed, Q, K, V, QRot, KRot, AttnCore, PostAttention,
	MLPNormed, GateLogits, ExpertIndices, ExpertWeights, DenseGateWeights,
	Prelinear, Activated, ExpertOutputs, Fused, Output,
}

// HiddenStates lists the taps of the residual stream inside a block.
var HiddenStates = []string{Input, PostAttention, Output}

// Block returns the full name of a block's tap: block_3.q_rot.
func Block(layer int, name string) string {
	return blockScopePrefix + strconv.Itoa(layer) + blockScopeDivider + name
}

// Split takes a full name apart. Taps outside the blocks have layer -1. It
// does not check that the name is registered; see [Known].
func Split(full string) (layer int, name string) {
	rest, ok := strings.CutPrefix(full, blockScopePrefix)
	if !ok {
		return -1, full
	}
	number, name, ok := strings.Cut(rest, blockScopeDivider)
	if !ok {
		return -1, full
	}
	n, err := strconv.Atoi(number)
	if err != nil || n < 0 || strconv.Itoa(n) != number {
		return -1, full
	}
	return n, name
}

// All lists every tap of a model in execution order.
func All(c config.Config) []string {
	names := make([]string, 0, 3+c.Layers*len(InBlock))
	names = append(names, Embedding)
	for layer := range c.Layers {
		for _, name := range InBlock {
			names = append(names, Block(layer, name))
		}
	}
	return append(names, FinalNorm, Logits)
}

// Known reports whether a full name is a tap of a model of this shape.
func Known(c config.Config, full string) bool {
	layer, name := Split(full)
	if layer < 0 {
		return name == Embedding || name == FinalNorm || name == Logits
	}
	return layer < c.Layers && slices.Contains(InBlock, name)
}

// Integer reports whether a tap holds integers (stored as I32) instead of reals.
func Integer(full string) bool {
	_, name := Split(full)
	return name == ExpertIndices
}

// Shape returns the shape of a tap for a number of tokens.
func Shape(c config.Config, full string, tokens int) ([]int, error) {
	if !Known(c, full) {
		return nil, fmt.Errorf("no tap is called %q in a model of %d layers", full, c.Layers)
	}
	switch _, name := Split(full); name {
	case Q, QRot:
		return []int{tokens, c.Heads, c.HeadDim}, nil
	case K, V, KRot:
		return []int{tokens, c.KVHeads, c.HeadDim}, nil
	case AttnCore:
		return []int{tokens, c.QueryWidth()}, nil
	case GateLogits, DenseGateWeights:
		return []int{tokens, c.Experts}, nil
	case ExpertIndices, ExpertWeights:
		return []int{tokens, c.ExpertsPerToken}, nil
	case Prelinear:
		return []int{tokens, c.ExpertsPerToken, 2 * c.IntermediateSize}, nil
	case Activated:
		return []int{tokens, c.ExpertsPerToken, c.IntermediateSize}, nil
	case ExpertOutputs:
		return []int{tokens, c.ExpertsPerToken, c.HiddenSize}, nil
	case Logits:
		return []int{tokens, c.VocabSize}, nil
	default:
		return []int{tokens, c.HiddenSize}, nil
	}
}
