package conformance

import (
	"context"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Implementation is something that claims to be gpt-oss. Whole-model output is
// enough to take part; the small interfaces below unlock more tests.
//
// An implementation that cannot do what is asked of it returns an error that
// wraps [errors.ErrUnsupported]; the verdict is then "unsupported", where any
// other error is "error".
type Implementation interface {
	// Name identifies the implementation in test names, reports and file names:
	// letters, digits, dots and dashes.
	Name() string
	// Precision is the arithmetic that it computes in. Bounds depend on it.
	Precision() reference.Precision
	// Open loads the checkpoint in a directory (OpenAI's layout). The suite calls
	// it once per checkpoint and may use several instances at a time.
	Open(ctx context.Context, checkpointDir string) (Instance, error)
}

// Instance is an implementation with a checkpoint in it. The suite calls one
// method at a time.
type Instance interface {
	// Forward runs the model over tokens, from position 0, and returns at least
	// "logits" [tokens, vocab]. What else it returns under the registry's names
	// (package taps) is judged too. Any float storage type will do.
	Forward(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error)
	// Close releases the instance.
	Close() error
}

// Tapper is an [Instance] that can be asked for intermediate results.
type Tapper interface {
	// ForwardTaps is Forward with the results wanted, by registry name. A name
	// that it does not know may be left out of the answer: its stages are then
	// judged together with their neighbours.
	ForwardTaps(ctx context.Context, tokens []int32, names []string) (map[string]tensor.Tensor, error)
}

// Router is an [Instance] whose choice of experts can be forced, so that a
// different choice upstream does not hide what comes after it.
type Router interface {
	// ForwardRouted is ForwardTaps with the experts of every layer given:
	// [layers][tokens·k] indices. Their weights still come from the instance's
	// own gate logits.
	ForwardRouted(ctx context.Context, tokens []int32, routing [][]int32, names []string) (map[string]tensor.Tensor, error)
}

// Decoder is an [Instance] with a KV cache.
type Decoder interface {
	// Decode starts a sequence at position 0.
	Decode(ctx context.Context) (Decoding, error)
}

// Decoding is one sequence in progress.
type Decoding interface {
	// Step appends tokens to the sequence and returns their logits [tokens,
	// vocab]: many tokens for a prompt, one at a time after it.
	Step(ctx context.Context, tokens []int32) (tensor.Tensor, error)
	// Close releases the cache.
	Close() error
}

// StageRunner is an [Implementation] that can run one stage alone, on inputs
// that are given to it: without a checkpoint file, at any width.
type StageRunner interface {
	RunStage(ctx context.Context, in StageInput) (map[string]tensor.Tensor, error)
}

// StageInput is one stage with everything that it needs.
type StageInput struct {
	// Taps wanted, without their block: attn_core. They belong to one stage.
	Taps []string
	// Model has the configuration and, of the weights, those that the stage
	// reads; the others are nil.
	Model *checkpoint.Model
	// Layer is the block that the stage stands in. Its taps have no "block_N."
	// here, neither in Inputs nor in the answer.
	Layer int
	// Tokens is set for the embedding, Positions [tokens] for RoPE.
	Tokens    []int32
	Positions []int
	// Inputs are the taps that the stage reads, by name without the block.
	Inputs map[string]tensor.Tensor
}

// Reads lists the taps that a tap is computed from, all without their block.
// The embedding has none; where a stage reads the residual stream as the block
// before left it, that is taps.Output.
func Reads(name string) []string {
	reads := make([]string, 0, 3)
	for _, read := range checks[name].reads {
		if read == previousOutput {
			read = taps.Output
		}
		reads = append(reads, read)
	}
	return reads
}
