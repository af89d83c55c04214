package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// decoder gives the logits behind a growing text.
type decoder interface {
	// next takes the tokens that follow those that it has seen, and returns the
	// logits [vocabulary] behind the last.
	next(ctx context.Context, tokens []int32) ([]float32, error)
	vocabulary() int
	Close() error
}

// errGraphFull says that a graph of fixed length has no room for another token.
var errGraphFull = errors.New("the graph is full")

func openDecoder(ctx context.Context, o generateOptions, stderr io.Writer) (decoder, error) {
	precision, err := reference.ParsePrecision(o.precision)
	if err != nil {
		return nil, fmt.Errorf("--precision: %w", err)
	}
	if o.onnx != "" {
		return openGraph(ctx, o.onnx, o.read.Config)
	}
	path := o.checkpoint
	if fixtures.Compact(path) {
		cache, err := library.CacheDir()
		if err != nil {
			return nil, err
		}
		if path, err = fixtures.Expanded(ctx, path, cache); err != nil {
			return nil, err
		}
	}
	model, err := openCheckpoint(stderr, path, o.read)
	if err != nil {
		return nil, err
	}
	if o.backend == backendONNXRuntime {
		defer model.Close()
		return exportGraph(ctx, model, exporter.Options{
			Operators: o.exportedOperators(), Precision: exporter.Precision(precision), Functions: !o.expandFunctions,
		})
	}
	switch precision {
	case reference.Float32:
		return newReferenceDecoder(model, reference.Single()), nil
	case reference.Float64:
		return newReferenceDecoder(model, reference.Exact()), nil
	case reference.BFloat16:
		return newReferenceDecoder(model, reference.Short(precision.Format())), nil
	}
	return nil, errors.Join(fmt.Errorf("--precision: %s is for --backend onnxruntime", precision), model.Close())
}

// referenceDecoder runs the Go reference with a KV cache.
type referenceDecoder[F kernel.Float] struct {
	model reference.Model[F]
	cache reference.Cache[F]
}

func newReferenceDecoder[F kernel.Float](weights *checkpoint.Model, a reference.Arithmetic[F]) *referenceDecoder[F] {
	return newReferenceDecoderOf(reference.New(weights, a))
}

// newReferenceDecoderOf decodes with a model of any stages.
func newReferenceDecoderOf[F kernel.Float](model reference.Model[F]) *referenceDecoder[F] {
	// Only the last position's logits are asked for; a long prompt's would take
	// 0.8 MB a token.
	unembed := model.Stages.Unembed
	model.Stages.Unembed = func(l reference.Layer[F], x []F, w checkpoint.Matrix) []F {
		return unembed(l, x[len(x)-l.Config.HiddenSize:], w)
	}
	return &referenceDecoder[F]{model: model}
}

func (d *referenceDecoder[F]) next(ctx context.Context, tokens []int32) ([]float32, error) {
	logits, err := d.model.Forward(ctx, tokens, &d.cache, reference.Observer[F]{})
	if err != nil {
		return nil, err
	}
	out := make([]float32, len(logits))
	for i, v := range logits {
		out[i] = float32(v)
	}
	return out, nil
}

func (d *referenceDecoder[F]) vocabulary() int { return d.model.Weights.Config.VocabSize }
func (d *referenceDecoder[F]) Close() error    { return d.model.Weights.Close() }

// graphDecoder runs an ONNX graph: token by token if it has a KV cache, else
// over everything, every time.
type graphDecoder struct {
	session  *onnxruntime.Session
	config   config.Config
	decoding *onnxruntime.Decoding // nil: the graph has no cache
	tokens   []int32               // what the graph has seen
	work     string                // directory to remove, or empty
}

func newGraphDecoder(session *onnxruntime.Session, c config.Config, work string) (*graphDecoder, error) {
	d := &graphDecoder{session: session, config: c, work: work}
	if session.HasCache() {
		decoding, err := session.Decode()
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		d.decoding = decoding
	}
	return d, nil
}

func openGraph(ctx context.Context, path, configuration string) (decoder, error) {
	c, err := config.Read(configFile(configuration))
	if err != nil {
		return nil, err
	}
	session, err := onnxruntime.OpenContext(ctx, path, onnxruntime.Options{})
	if err != nil {
		return nil, err
	}
	return newGraphDecoder(session, c, "")
}

// exportedOperators are ONNX Runtime's own unless others are asked for: this is
// the runtime that has them.
func (o generateOptions) exportedOperators() exporter.Operators {
	if o.operators == "" {
		return exporter.OperatorsONNXRuntime
	}
	return exporter.Operators(o.operators)
}

// exportGraph exports the model with a KV cache to a temporary directory and opens
// the graph.
func exportGraph(ctx context.Context, model *checkpoint.Model, options exporter.Options) (decoder, error) {
	options.KVCache, options.LastLogitsOnly = true, true
	work, err := os.MkdirTemp("", "gptoss-generate-*")
	if err != nil {
		return nil, err
	}
	path := filepath.Join(work, "model.onnx")
	session, err := func() (*onnxruntime.Session, error) {
		if err := exporter.Export(ctx, model, path, options); err != nil {
			return nil, err
		}
		return onnxruntime.OpenContext(ctx, path, onnxruntime.Options{})
	}()
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(work))
	}
	return newGraphDecoder(session, model.Config, work)
}

func (d *graphDecoder) next(ctx context.Context, tokens []int32) ([]float32, error) {
	all := append(d.tokens, tokens...)
	if length := d.session.Length(); length > 0 && len(all) > length {
		if len(d.tokens) == 0 {
			return nil, fmt.Errorf("the prompt has %d tokens, and the graph is of fixed length %d: export a longer one, or a dynamic one", len(all), length)
		}
		return nil, fmt.Errorf("%w: its length is fixed at %d tokens", errGraphFull, length)
	}
	d.tokens = all
	if err := reference.CheckTokens(d.config, tokens); err != nil {
		return nil, err
	}
	t, err := d.run(ctx, tokens)
	if err != nil {
		return nil, err
	}
	logits, err := t.Float32s()
	if err != nil {
		return nil, fmt.Errorf("logits: %w", err)
	}
	// [tokens, vocabulary], or a graph with the last position's alone.
	if len(logits) == 0 || len(logits)%d.config.VocabSize != 0 {
		return nil, fmt.Errorf("the graph's logits have shape %v, and the configuration has a vocabulary of %d: they are of different models", t.Shape, d.config.VocabSize)
	}
	return logits[len(logits)-d.config.VocabSize:], nil
}

func (d *graphDecoder) run(ctx context.Context, tokens []int32) (tensor.Tensor, error) {
	if d.decoding != nil {
		return d.decoding.Step(ctx, tokens)
	}
	results, err := d.session.RunTaps(ctx, d.tokens, []string{taps.Logits})
	if err != nil {
		return tensor.Tensor{}, err
	}
	t, there := results[taps.Logits]
	if !there {
		return tensor.Tensor{}, errors.New("the graph puts out no logits")
	}
	return t, nil
}

func (d *graphDecoder) vocabulary() int { return d.config.VocabSize }

func (d *graphDecoder) Close() error {
	var err error
	if d.decoding != nil {
		err = d.decoding.Close()
	}
	err = errors.Join(err, d.session.Close())
	if d.work != "" {
		err = errors.Join(err, os.RemoveAll(d.work))
	}
	return err
}
