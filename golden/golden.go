// Package golden reads the tensors that the real implementations made: whole
// runs under model/FIXTURE and single stages under STAGE.
//
// Nothing here is made by the code that it tests. Every directory has a
// manifest.json that names the oracle, its version, its arithmetic, the command
// and the sha256 of each file, which is checked whenever a file is read. `make
// golden` writes all of it again (tools/oracles); README.md describes the files.
package golden

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// ManifestFile is the name of a directory's manifest.
const ManifestFile = "manifest.json"

// Manifest describes golden/model/FIXTURE.
type Manifest struct {
	Fixture          string `json:"fixture"`
	CheckpointSHA256 string `json:"checkpoint_sha256"` // of the fixture's model.safetensors
	SpreadSHA256     string `json:"spread_sha256"`     // of spread.json
	Runs             []Run  `json:"runs"`
}

// Run is one run of one implementation, in one file.
type Run struct {
	File           string            `json:"file"`
	Implementation string            `json:"implementation"` // torch, transformers, flax, equinox
	Corrected      bool              `json:"corrected"`      // known faults of the implementation mended
	Precision      string            `json:"precision"`      // arithmetic: float64, float32, bfloat16
	Prompt         string            `json:"prompt"`
	Tokens         []int32           `json:"tokens"`
	StoredRows     []int             `json:"rows"` // nil: every token's; else see Rows
	Packages       map[string]string `json:"packages"`
	Command        string            `json:"command"`
	LogitsMaxError float64           `json:"logits_max_error"` // max |Δ| of the logits against torch in float64
	SHA256         string            `json:"sha256"`

	path string
}

// Name is the implementation's name, with ".corrected" if its known faults were
// mended before the run.
func (r Run) Name() string {
	if r.Corrected {
		return r.Implementation + ".corrected"
	}
	return r.Implementation
}

// Rows returns which tokens the rows of a tensor of this run belong to: all of
// them, or those in StoredRows.
func (r Run) Rows(t tensor.Tensor) []int {
	if r.StoredRows != nil && len(t.Shape) > 0 && t.Shape[0] == len(r.StoredRows) {
		return r.StoredRows
	}
	all := make([]int, len(r.Tokens))
	for i := range all {
		all[i] = i
	}
	return all
}

// Load reads the run's tensors under the registry's names.
func (r Run) Load() (map[string]tensor.Tensor, error) { return load(r.path, r.SHA256) }

// Models lists the fixtures that have golden runs.
func Models() []string {
	found, _ := filepath.Glob(filepath.Join(root(), "model", "*", ManifestFile)) // the pattern is well-formed
	names := make([]string, len(found))
	for i, path := range found {
		names[i] = filepath.Base(filepath.Dir(path))
	}
	slices.Sort(names)
	return names
}

// Runs lists the golden runs on a fixture.
func Runs(fixture string) ([]Run, error) {
	dir := filepath.Join(root(), "model", fixture)
	var m Manifest
	if err := readJSON(filepath.Join(dir, ManifestFile), &m); err != nil {
		return nil, err
	}
	if len(m.Runs) == 0 {
		return nil, fmt.Errorf("%s lists no runs; make golden writes it", filepath.Join(dir, ManifestFile))
	}
	for i := range m.Runs {
		m.Runs[i].path = filepath.Join(dir, m.Runs[i].File)
	}
	return m.Runs, nil
}

// Model reads the run of an implementation (torch, transformers, flax.corrected,
// ...; see [Run.Name]) in a precision on a fixture's prompt "full".
func Model(fixture, implementation, precision string) (map[string]tensor.Tensor, Run, error) {
	return Prompt(fixture, implementation, precision, "full")
}

// Prompt is Model for another prompt of the fixture.
func Prompt(fixture, implementation, precision, prompt string) (map[string]tensor.Tensor, Run, error) {
	runs, err := Runs(fixture)
	if err != nil {
		return nil, Run{}, err
	}
	var have []string
	for _, r := range runs {
		if r.Name() == implementation && r.Precision == precision && r.Prompt == prompt {
			tensors, err := r.Load()
			return tensors, r, err
		}
		have = append(have, r.Name()+" "+r.Precision+" "+r.Prompt)
	}
	return nil, Run{}, fmt.Errorf("golden/model/%s has no run of %s in %s on prompt %s; it has %s",
		fixture, implementation, precision, prompt, strings.Join(have, ", "))
}

// root is this package's directory in the source tree.
func root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(file)
}

// missing turns "no such file" into what to do about it.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w; make golden writes it", err)
	}
	return err
}

func readJSON(path string, into any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return missing(err)
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// load reads a safetensors file into memory after checking its digest.
func load(path, digest string) (map[string]tensor.Tensor, error) {
	if err := checkDigest(path, digest); err != nil {
		return nil, err
	}
	file, err := tensor.OpenSafetensors(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	tensors := map[string]tensor.Tensor{}
	for _, name := range file.Names() {
		t, _ := file.Tensor(name)
		t.Data = slices.Clone(t.Data) // the mapping ends with this function
		tensors[name] = t
	}
	return tensors, nil
}

func checkDigest(path, digest string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return missing(err)
	}
	if sum := sha256.Sum256(text); hex.EncodeToString(sum[:]) != digest {
		return fmt.Errorf("%s is not the file that its manifest describes (sha256 %x, want %s); make golden writes both", path, sum, digest)
	}
	return nil
}
