package golden

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Case is one stage on one set of inputs. Inputs are described and made by the
// counter generator; outputs are stored.
//
// Truth is the oracle's float64 result on the inputs after they were rounded to
// DType, so that a subject of that or a wider type starts from the same numbers.
type Case struct {
	Stage string `json:"-"`

	Name       string                     `json:"name"`
	About      string                     `json:"about"`
	DType      tensor.DType               `json:"dtype"` // F32 or BF16; generation has F64
	Parameters map[string]json.RawMessage `json:"parameters"`
	Inputs     map[string]Input           `json:"inputs"`
	File       string                     `json:"file"`
	SHA256     string                     `json:"sha256"`

	path string
}

// Input describes an array: its shape and how its values are drawn. Element i in
// C order of the whole shape depends on the seed, the counter's name and i alone.
//
// Exactly one of these is used:
//
//	values             the elements themselves
//	low, high, U8      low + word(i) mod (high-low+1)
//	low, high          low + (high-low)·uniform(i)
//	scale, mean        mean + scale·row_scales[row]·normal(i)
//
// computed in float64, rounded to float32 and then to the dtype.
type Input struct {
	DType     tensor.DType `json:"dtype"`
	Shape     []int        `json:"shape"`
	Seed      uint64       `json:"seed"`
	Counter   string       `json:"counter"`
	Rows      []int        `json:"rows"` // only these rows of the first axis are part of the case; nil: all
	Mean      float64      `json:"mean"`
	Scale     float64      `json:"scale"`
	RowScales []float64    `json:"row_scales"`
	Low       *float64     `json:"low"`
	High      float64      `json:"high"`
	Literal   []float64    `json:"values"`
}

// stages are the directories of single stages, in the order of the model.
var stages = []string{"rope", "rmsnorm", "attention", "gating", "experts", "logits", "generation"}

// Stages lists the stages that have cases.
func Stages() []string { return slices.Clone(stages) }

// Stage lists the cases of a stage. Their order is that of the manifest.
func Stage(stage string) ([]Case, error) {
	if !slices.Contains(stages, stage) {
		return nil, fmt.Errorf("no golden stage is called %q; there are %s", stage, strings.Join(stages, ", "))
	}
	dir := filepath.Join(root(), stage)
	var manifest struct {
		Cases []Case `json:"cases"`
	}
	if err := readJSON(filepath.Join(dir, ManifestFile), &manifest); err != nil {
		return nil, err
	}
	if len(manifest.Cases) == 0 {
		return nil, fmt.Errorf("%s lists no cases; make golden writes it", filepath.Join(dir, ManifestFile))
	}
	for i := range manifest.Cases {
		c := &manifest.Cases[i]
		c.Stage, c.path = stage, filepath.Join(dir, c.File)
	}
	return manifest.Cases, nil
}

// Truth reads the float64 outputs by name. Integers are I32.
func (c Case) Truth() (map[string]tensor.Tensor, error) { return c.outputs("float64") }

// Observed reads what the oracle itself gave in the case's own arithmetic
// (torch in float32 or bfloat16): one right implementation's rounding.
func (c Case) Observed() (map[string]tensor.Tensor, error) {
	switch c.DType {
	case tensor.F32:
		return c.outputs("torch.float32")
	case tensor.BF16:
		return c.outputs("torch.bfloat16")
	}
	return nil, fmt.Errorf("golden/%s: case %s has no other arithmetic than float64", c.Stage, c.Name)
}

func (c Case) outputs(group string) (map[string]tensor.Tensor, error) {
	all, err := load(c.path, c.SHA256)
	if err != nil {
		return nil, err
	}
	found := map[string]tensor.Tensor{}
	for name, t := range all {
		if short, ok := strings.CutPrefix(name, group+"/"); ok {
			found[short] = t
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s holds no output of %s; make golden writes it", c.path, group)
	}
	return found, nil
}

// Parameter decodes one of the case's parameters into a pointer. A case that
// lacks it is an error that lists what there is.
func (c Case) Parameter(name string, into any) error {
	raw, ok := c.Parameters[name]
	if !ok {
		return fmt.Errorf("golden/%s: case %s has no parameter %q; it has %v", c.Stage, c.Name, name, slices.Sorted(maps.Keys(c.Parameters)))
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("golden/%s: case %s, parameter %q: %w", c.Stage, c.Name, name, err)
	}
	return nil
}

// Input makes one of the case's inputs: its values (rounded to the input's
// dtype, widened to float64) and its shape, in which the first axis counts Rows.
func (c Case) Input(name string) ([]float64, []int, error) {
	in, ok := c.Inputs[name]
	if !ok {
		return nil, nil, fmt.Errorf("golden/%s: case %s has no input %q; it has %v", c.Stage, c.Name, name, slices.Sorted(maps.Keys(c.Inputs)))
	}
	values, shape, err := in.Values()
	if err != nil {
		return nil, nil, fmt.Errorf("golden/%s: case %s, input %q: %w", c.Stage, c.Name, name, err)
	}
	return values, shape, nil
}

// Values makes the rows of the input that are part of its case, rounded to the
// dtype and widened to float64.
func (in Input) Values() ([]float64, []int, error) {
	if len(in.Shape) == 0 {
		return nil, nil, fmt.Errorf("has no shape")
	}
	rows := in.Rows
	if rows == nil {
		rows = make([]int, in.Shape[0])
		for i := range rows {
			rows[i] = i
		}
	}
	width := 1
	for _, d := range in.Shape[1:] {
		width *= d
	}
	if in.Literal != nil && len(in.Literal) != in.Shape[0]*width {
		return nil, nil, fmt.Errorf("has %d values for the shape %v", len(in.Literal), in.Shape)
	}
	if in.RowScales != nil && len(in.RowScales) != in.Shape[0] {
		return nil, nil, fmt.Errorf("has %d row scales for the shape %v", len(in.RowScales), in.Shape)
	}
	round, err := rounding(in.DType)
	if err != nil {
		return nil, nil, err
	}
	g := fixtures.NewCounter(in.Seed, in.Counter)
	values := make([]float64, 0, len(rows)*width)
	for _, row := range rows {
		if row < 0 || row >= in.Shape[0] {
			return nil, nil, fmt.Errorf("has no row %d in the shape %v", row, in.Shape)
		}
		for i := row * width; i < (row+1)*width; i++ {
			values = append(values, round(in.draw(g, row, i)))
		}
	}
	return values, append([]int{len(rows)}, in.Shape[1:]...), nil
}

// draw returns element i, before rounding. The conversions keep Go from fusing
// products and sums, which Python does not do either.
func (in Input) draw(g fixtures.Counter, row, i int) float64 {
	switch {
	case in.Literal != nil:
		return in.Literal[i]
	case in.Low != nil && in.DType == tensor.U8:
		return *in.Low + float64(g.Word(uint64(i))%uint64(in.High-*in.Low+1))
	case in.Low != nil:
		return *in.Low + float64((in.High-*in.Low)*g.Uniform(uint64(i)))
	}
	scale := in.Scale
	if in.RowScales != nil {
		scale *= in.RowScales[row]
	}
	return in.Mean + float64(scale*g.Normal(uint64(i)))
}

// Bytes is Values for a U8 input.
func (in Input) Bytes() ([]byte, []int, error) {
	if in.DType != tensor.U8 {
		return nil, nil, fmt.Errorf("holds %s, not bytes", in.DType)
	}
	values, shape, err := in.Values()
	out := make([]byte, len(values))
	for i, v := range values {
		out[i] = byte(v)
	}
	return out, shape, err
}

func rounding(dtype tensor.DType) (func(float64) float64, error) {
	switch dtype {
	case tensor.F64, tensor.U8:
		return func(v float64) float64 { return v }, nil
	case tensor.F32:
		return func(v float64) float64 { return float64(float32(v)) }, nil
	case tensor.BF16:
		return func(v float64) float64 {
			return float64(tensor.BFloat16(tensor.ToBFloat16(float32(v))))
		}, nil
	}
	return nil, fmt.Errorf("has the dtype %q", dtype)
}
