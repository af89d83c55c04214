package golden

import (
	"fmt"
	"path/filepath"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// SamplesFile is the manifest of a run at full width, of which only samples are
// kept (tools/oracles/stream.py).
const SamplesFile = "samples.json"

// Samples describes golden/model/twolayer and golden/model/full: runs of OpenAI's
// torch model on a checkpoint that `gptoss synthesize` makes. Of the
// experts everything is kept, of gate logits some rows (tokens), of the residual
// stream and the logits some rows and columns.
type Samples struct {
	Digest     string            `json:"digest"` // of the checkpoint
	Layers     int               `json:"layers"`
	Tokens     []int32           `json:"tokens"`
	Rows       []int             `json:"rows"`
	GateRows   []int             `json:"gate_rows"`
	Columns    []int             `json:"columns"`    // of the residual stream
	Vocabulary []int             `json:"vocabulary"` // columns of the logits
	Packages   map[string]string `json:"packages"`
	Command    string            `json:"command"`
	SHA256     map[string]string `json:"sha256"` // by file

	dir string
}

// ReadSamples reads the manifest of a run at full width.
func ReadSamples(name string) (Samples, error) {
	s := Samples{dir: filepath.Join(root(), "model", name)}
	return s, readJSON(filepath.Join(s.dir, SamplesFile), &s)
}

// Load reads torch's run in a precision: tensors under the registry's names.
func (s Samples) Load(precision string) (map[string]tensor.Tensor, error) {
	file := "torch." + precision + ".safetensors"
	digest, ok := s.SHA256[file]
	if !ok {
		return nil, fmt.Errorf("%s lists no %s; %s makes it", filepath.Join(s.dir, SamplesFile), file, s.Command)
	}
	return load(filepath.Join(s.dir, file), digest)
}

// sampled lists the runs at full width.
func sampled() []string {
	found, _ := filepath.Glob(filepath.Join(root(), "model", "*", SamplesFile)) // the pattern is well-formed
	names := make([]string, len(found))
	for i, path := range found {
		names[i] = filepath.Base(filepath.Dir(path))
	}
	return names
}
