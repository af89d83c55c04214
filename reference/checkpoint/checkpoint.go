// Package checkpoint reads gpt-oss weights, in every layout that people have
// them, into one Model whose matrices are views of the mapped files.
package checkpoint

import (
	"slices"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Matrix is a weight matrix [rows, cols], rows being outputs: y = W·x.
//
// Every storage type that a checkpoint may have widens to float32 exactly, so
// float32 is the currency; a caller that computes in float64 widens further.
// Implementations are safe for concurrent use.
type Matrix interface {
	// Dims returns outputs and inputs.
	Dims() (rows, cols int)
	// Rows decodes rows [from, from+n) into dst, which holds n·cols elements.
	Rows(dst []float32, from, n int)
}

// Model is a checkpoint: the configuration and views of its weights. It stays
// valid until Close.
type Model struct {
	Config      config.Config
	Embedding   Matrix // [vocab, hidden]; a row is a token's vector
	Blocks      []Block
	FinalNorm   []float32 // [hidden]
	Unembedding Matrix    // [vocab, hidden], not tied to Embedding
	Source      Source    // where it came from
	Notes       []string  // what a user should know about the files, one line each

	tensors  []TensorInfo
	checks   []check
	mappings []*tensor.Mapping
	close    func() error
}

// Block is one transformer block's weights.
type Block struct {
	AttnNorm []float32 // [hidden]
	QKV      Matrix    // [heads·d + 2·kv_heads·d, hidden]: q, then k, then v
	QKVBias  []float32
	Sinks    []float32 // [heads], one logit per query head
	Out      Matrix    // [hidden, heads·d]
	OutBias  []float32 // [hidden]

	MLPNorm  []float32 // [hidden]
	Gate     Matrix    // [experts, hidden]
	GateBias []float32 // [experts]
	MLP1     []Matrix  // per expert [2·intermediate, hidden]: even rows glu, odd rows linear
	MLP1Bias [][]float32
	MLP2     []Matrix // per expert [hidden, intermediate]
	MLP2Bias [][]float32
}

// Source says where a model came from, for reports and errors.
type Source struct {
	Path   string
	Layout string // "openai", "huggingface", "flax", "equinox" or "generated"
}

// Tensors describes the tensors of the files, in file order. A model that was
// not opened from files has none.
func (m *Model) Tensors() []TensorInfo { return slices.Clone(m.tensors) }

// Weights returns how many numbers the model has.
func (m *Model) Weights() int64 {
	var total int64
	for _, t := range m.canonical() {
		rows, cols := t.matrix.Dims()
		total += int64(rows) * int64(cols)
	}
	return total
}

// Release shrinks the process's resident memory by the pages that were read so
// far; see [tensor.Mapping.Release].
func (m *Model) Release() {
	for _, mapping := range m.mappings {
		mapping.Release()
	}
}

// Close unmaps the files. The model's matrices must not be used afterwards.
func (m *Model) Close() error {
	if m.close == nil {
		return nil
	}
	return m.close()
}

// Dense is a matrix held in memory.
type Dense struct {
	RowCount, ColCount int
	Data               []float32 // row after row
}

// Dims returns outputs and inputs.
func (d Dense) Dims() (int, int) { return d.RowCount, d.ColCount }

// Rows copies rows [from, from+n) into dst.
func (d Dense) Rows(dst []float32, from, n int) {
	copy(dst[:n*d.ColCount], d.Data[from*d.ColCount:])
}
