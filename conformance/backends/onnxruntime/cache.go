package onnxruntime

import (
	"context"
	"errors"
	"fmt"
	"strings"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// cached is one tensor of a KV cache: an input that holds the past, and the
// output that holds the present, which is the next run's past.
type cached struct {
	ort.InputOutputInfo
	present string
	shape   ort.Shape // of an empty one
}

// Prefixes of the cache's names in other people's graphs: past_key_values.0.key
// becomes present.0.key (Hugging Face Optimum and onnxruntime-genai).
const (
	strangersPast    = "past_key_values."
	strangersPresent = "present."
)

// presentOf returns the name of the output that continues a past, and false if
// the name is not that of a past.
func presentOf(name string) (string, bool) {
	if rest, ok := strings.CutPrefix(name, strangersPast); ok {
		return strangersPresent + rest, true
	}
	layer, local := taps.Split(name)
	if layer < 0 {
		return "", false
	}
	switch local {
	case exporter.PastK:
		return taps.Block(layer, exporter.PresentK), true
	case exporter.PastV:
		return taps.Block(layer, exporter.PresentV), true
	}
	return "", false
}

// acceptCache checks a past and finds the shape of an empty one: the batch is 1,
// and the one other dimension that is not known, or the first, is the tokens.
func acceptCache(i ort.InputOutputInfo, outputs map[string]bool) (cached, error) {
	present, _ := presentOf(i.Name)
	if !outputs[present] {
		return cached{}, fmt.Errorf("input %s has no output %s that continues it", i.Name, present)
	}
	if i.OrtValueType != ort.ONNXTypeTensor || i.DataType != ort.TensorElementDataTypeFloat {
		return cached{}, fmt.Errorf("input %s holds %s: only a float32 cache can be empty in the runtime's binding", i.Name, typeName(i))
	}
	shape := i.Dimensions.Clone()
	unknown := -1
	for at, d := range shape {
		if d >= 0 {
			continue
		}
		if at == 0 && len(shape) == 4 {
			shape[0] = 1
			continue
		}
		if unknown >= 0 {
			return cached{}, fmt.Errorf("input %s has shape %v, of which more than the tokens is unknown", i.Name, i.Dimensions)
		}
		unknown = at
		shape[at] = 0
	}
	if unknown < 0 {
		return cached{}, fmt.Errorf("input %s has the fixed shape %v: an empty cache does not fit", i.Name, i.Dimensions)
	}
	return cached{i, present, shape}, nil
}

// empty makes the past of the first run.
func (c cached) empty() (ort.Value, error) { return ort.NewEmptyTensor[float32](c.shape) }

// HasCache reports whether the graph continues a sequence from a KV cache.
func (s *Session) HasCache() bool { return len(s.cache) > 0 }

// Decoding is a sequence that grows step by step. It keeps the cache between the
// steps; the session may serve several at a time.
type Decoding struct {
	session *Session
	past    []ort.Value
	length  int // tokens so far
}

// Decode starts a sequence. A graph without a cache is an error that wraps
// [errors.ErrUnsupported].
func (s *Session) Decode() (*Decoding, error) {
	if !s.HasCache() {
		return nil, fmt.Errorf("%s: the graph has no KV cache: export it with --kv-cache: %w", s.path, errors.ErrUnsupported)
	}
	d := &Decoding{session: s}
	for _, c := range s.cache {
		v, err := c.empty()
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		d.past = append(d.past, v)
	}
	return d, nil
}

// Length returns the number of tokens so far.
func (d *Decoding) Length() int { return d.length }

// Step appends tokens and returns their logits [tokens, vocab]. After an error
// the sequence is as it was before.
func (d *Decoding) Step(ctx context.Context, tokens []int32) (tensor.Tensor, error) {
	results, present, err := d.session.forward(ctx, tokens, d.length, d.past)
	if err != nil {
		return tensor.Tensor{}, err
	}
	d.session.release(d.past)
	d.past = present
	d.length += len(tokens)
	return results[taps.Logits], nil
}

// Close releases the cache.
func (d *Decoding) Close() error {
	past := d.past
	d.past = nil
	return d.session.release(past)
}
