package checkpoint

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// How experts can be written to Hugging Face's layout.
const (
	ExpertsMXFP4 = "mxfp4"
	ExpertsDense = "dense" // dequantized and transposed
)

// WriteOptions say how [Model.Write] writes. The zero value keeps every value.
type WriteOptions struct {
	// Experts is ExpertsMXFP4 or ExpertsDense. Empty: MXFP4 in OpenAI's and
	// Hugging Face's layouts. Flax and Equinox have dense experts only, OpenAI
	// MXFP4 only.
	Experts string
	// DType is BF16, F32 or F16 for all dense arrays, which must hold them
	// exactly. Empty: BF16 for every array that bfloat16 holds exactly, else F32;
	// Equinox: F32, because its loader wants the same everywhere and can't read
	// its own bfloat16 files back. Norm scales are F32 in Flax and Equinox.
	DType tensor.DType
	// Quantize rounds experts that are no MXFP4, instead of refusing them.
	Quantize bool
	// ShardBytes splits OpenAI's and Hugging Face's files before they grow larger
	// than this. 0: one file.
	ShardBytes int64
	// Progress, if not nil, is called by several goroutines with the bytes
	// written so far and in all.
	Progress func(written, total int64)
}

// Cut returns the model of the first layers. Closing either closes the files.
func (m *Model) Cut(layers int) (*Model, error) {
	if layers < 1 || layers > m.Config.Layers {
		return nil, fmt.Errorf("%s: has %d layers, so it can't be cut to %d", m.Source.Path, m.Config.Layers, layers)
	}
	cut := *m
	cut.Config.Layers, cut.Config.Sliding = layers, m.Config.Sliding[:layers]
	cut.Blocks = m.Blocks[:layers]
	return &cut, nil
}

// Write writes the model in a layout. The path is a directory for OpenAI and
// HuggingFace, and a file .msgpack or .eqx for Flax and Equinox, or a directory
// in which to put model.msgpack or model.eqx. Configurations are written beside
// the weights under the names that [OpenWith] finds.
//
// What the layout can't hold is an error. Nothing appears under its final name
// before everything is complete, and nothing is left behind on an error. Memory
// stays below 300 MiB whatever the checkpoint's size.
func (m *Model) Write(ctx context.Context, layout, path string, o WriteOptions) error {
	p := plan{Model: m, options: o}
	if err := p.check(layout); err != nil {
		return err
	}
	if err := p.chooseTypes(ctx, layout); err != nil {
		return err
	}
	var outputs []*output
	var items map[*output][]item
	var err error
	made, err := p.directory(layout, path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			for _, d := range made { // the innermost first; only if still empty
				os.Remove(d)
			}
		}
	}()
	switch layout {
	case OpenAI:
		outputs, items, err = p.openAI(path)
	case HuggingFace:
		outputs, items, err = p.huggingFace(path)
	case Flax:
		outputs, items, err = p.flax(path)
	case Equinox:
		outputs, items, err = p.equinox(path)
	}
	if err != nil {
		return err
	}
	w := writer{model: m, quantize: o.Quantize, progress: o.Progress}
	err = w.write(ctx, outputs, items)
	return err
}

// plan turns a model into tensors of a layout.
type plan struct {
	*Model
	options WriteOptions
	types   map[string]tensor.DType // of dense tensors, by canonical name
}

func (p *plan) check(layout string) error {
	o := p.options
	switch layout {
	case OpenAI:
		if o.Experts == ExpertsDense {
			return errors.New("OpenAI's layout has its experts in MXFP4 only")
		}
	case HuggingFace:
	case Flax, Equinox:
		if o.Experts == ExpertsMXFP4 {
			return fmt.Errorf("the %s layout has dense experts only", layout)
		}
		if o.ShardBytes != 0 {
			return fmt.Errorf("the %s layout is one file", layout)
		}
	default:
		return fmt.Errorf("no layout is called %q; there are %s, %s, %s and %s", layout, OpenAI, HuggingFace, Flax, Equinox)
	}
	if !slices.Contains([]string{"", ExpertsMXFP4, ExpertsDense}, o.Experts) {
		return fmt.Errorf("experts are %s or %s, not %q", ExpertsMXFP4, ExpertsDense, o.Experts)
	}
	if o.DType != "" && !isDense(o.DType) {
		return fmt.Errorf("weights are stored as %s, not %s", denseTypes, o.DType)
	}
	if o.ShardBytes < 0 {
		return errors.New("a shard can't have less than no bytes")
	}
	if p.mxfp4(layout) && (p.Config.HiddenSize%groupValues != 0 || p.Config.IntermediateSize%groupValues != 0) {
		return fmt.Errorf("MXFP4 needs widths that are multiples of %d, not %d and %d", groupValues, p.Config.HiddenSize, p.Config.IntermediateSize)
	}
	return nil
}

// mxfp4 reports whether the experts will be MXFP4.
func (p *plan) mxfp4(layout string) bool {
	return layout == OpenAI || layout == HuggingFace && p.options.Experts != ExpertsDense
}

// directory makes the directories that the files go to, and returns those that
// were not there. A directory that holds another checkpoint is refused: its
// files would be taken for parts of the new one.
func (p *plan) directory(layout, path string) (made []string, err error) {
	directory := path
	if layout == Flax || layout == Equinox {
		directory = filepath.Dir(filePath(layout, path))
	}
	for d := filepath.Clean(directory); ; d = filepath.Dir(d) {
		if info, err := os.Stat(d); err == nil {
			if !info.IsDir() {
				return nil, fmt.Errorf("%s: is not a directory", d)
			}
			break
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		made = append(made, d)
		if d == filepath.Dir(d) {
			break
		}
	}
	if err := os.MkdirAll(directory, 0o777); err != nil {
		return nil, err
	}
	if layout == OpenAI || layout == HuggingFace {
		entries, err := os.ReadDir(directory)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".safetensors") || e.Name() == indexName {
				return nil, fmt.Errorf("%s: holds a checkpoint already (%s); remove it or write elsewhere", directory, e.Name())
			}
		}
	}
	return made, nil
}

// filePath is where Flax's or Equinox's file goes.
func filePath(layout, path string) string {
	suffix := flaxSuffix
	if layout == Equinox {
		suffix = equinoxSuffix
	}
	if strings.HasSuffix(path, suffix) {
		return path
	}
	return filepath.Join(path, "model"+suffix)
}

// chooseTypes finds out how each dense tensor is stored: see WriteOptions.DType.
func (p *plan) chooseTypes(ctx context.Context, layout string) error {
	p.types = map[string]tensor.DType{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	exact := map[string]*atomic.Bool{}
	for _, t := range p.canonical() {
		name, _, _ := splitExpert(t.name)
		choice := p.options.DType
		if choice == "" && layout == Equinox {
			choice = tensor.F32
		}
		if choice != "" {
			p.types[name] = choice
			continue
		}
		if isExpert(name) && p.mxfp4(layout) {
			continue
		}
		if exact[name] == nil {
			exact[name] = new(atomic.Bool)
			exact[name].Store(true)
		}
		is := exact[name] // not the map, which this loop goes on writing
		group.Go(func() error {
			if is.Load() && !allBF16(ctx, t.matrix) {
				is.Store(false)
			}
			return ctx.Err()
		})
	}
	err := group.Wait()
	for name, is := range exact {
		p.types[name] = tensor.F32
		if is.Load() {
			p.types[name] = tensor.BF16
		}
	}
	return err
}

// splitExpert takes an expert's number off a canonical name.
func splitExpert(name string) (stem, expert string, ok bool) {
	at := strings.LastIndexByte(name, '.')
	if at > 0 && (strings.HasSuffix(name[:at], "_weight") || strings.HasSuffix(name[:at], "_bias")) {
		return name[:at], name[at+1:], true
	}
	return name, "", false
}

func isExpert(name string) bool { return strings.HasSuffix(name, "_weight") }

// allBF16 reports whether a matrix's values are all bfloat16.
func allBF16(ctx context.Context, m Matrix) bool {
	for _, part := range flatten([]Matrix{m}) {
		switch s := part.(type) {
		case BF16, MXFP4:
			continue
		case Transposed:
			if s.DType == tensor.BF16 {
				continue
			}
		case Chunked:
			if s.DType == tensor.BF16 {
				continue
			}
		}
		if stored, ok := asStored(part); ok {
			part = stored // in the order of the file, which is faster
		}
		rows, cols := part.Dims()
		step := max(tileValues/cols, 1)
		values := make([]float32, min(step, rows)*cols)
		for from := 0; from < rows && ctx.Err() == nil; from += step {
			n := min(step, rows-from)
			part.Rows(values, from, n)
			if !isBF16(values[:n*cols]) {
				return false
			}
		}
	}
	return true
}

// Makers of items. The canonical name says which type was chosen.

func (p *plan) matrix(name, canonical string, transposed bool, parts ...Matrix) item {
	rows := 0
	cols := 0
	for _, m := range parts {
		r, c := m.Dims()
		rows, cols = rows+r, c
	}
	shape := []int{rows, cols}
	if transposed {
		shape = []int{cols, rows}
	}
	return item{Spec: tensor.Spec{Name: name, DType: p.types[canonical], Shape: shape}, parts: parts, transposed: transposed}
}

func (p *plan) vector(name, canonical string, v []float32) item {
	i := p.matrix(name, canonical, false, Dense{1, len(v), v})
	i.Shape = []int{len(v)}
	return i
}

func (p *plan) vectors(name, canonical string, rows [][]float32) item {
	parts := make([]Matrix, len(rows))
	for i, v := range rows {
		parts[i] = Dense{1, len(v), v}
	}
	return p.matrix(name, canonical, false, parts...)
}

func (p *plan) experts(name, canonical string, transposed bool, parts []Matrix) item {
	i := p.matrix(name, canonical, transposed, parts...)
	rows, cols := parts[0].Dims()
	i.Shape = []int{len(parts), rows, cols}
	if transposed {
		i.Shape = []int{len(parts), cols, rows}
	}
	return i
}

func packedExperts(blocks, scales string, parts []Matrix) []item {
	rows, cols := parts[0].Dims()
	return []item{
		{Spec: tensor.Spec{Name: blocks, DType: tensor.U8, Shape: []int{len(parts), rows, cols / groupValues, groupBytes}}, parts: parts, scales: scales},
		{Spec: tensor.Spec{Name: scales, DType: tensor.U8, Shape: []int{len(parts), rows, cols / groupValues}}},
	}
}

func (p *plan) openAI(path string) ([]*output, map[*output][]item, error) {
	text, err := p.Config.MarshalOpenAI()
	if err != nil {
		return nil, nil, err
	}
	items := []item{p.matrix("embedding.weight", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		vector := func(name string, v []float32) { items = append(items, p.vector(name, name, v)) }
		matrix := func(name string, m Matrix) { items = append(items, p.matrix(name, name, false, m)) }
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		vector(attn+"norm.scale", b.AttnNorm)
		matrix(attn+"qkv.weight", b.QKV)
		vector(attn+"qkv.bias", b.QKVBias)
		vector(attn+"sinks", b.Sinks)
		matrix(attn+"out.weight", b.Out)
		vector(attn+"out.bias", b.OutBias)
		vector(mlp+"norm.scale", b.MLPNorm)
		matrix(mlp+"gate.weight", b.Gate)
		vector(mlp+"gate.bias", b.GateBias)
		items = append(items, packedExperts(mlp+"mlp1_weight.blocks", mlp+"mlp1_weight.scales", b.MLP1)...)
		items = append(items, p.vectors(mlp+"mlp1_bias", mlp+"mlp1_bias", b.MLP1Bias))
		items = append(items, packedExperts(mlp+"mlp2_weight.blocks", mlp+"mlp2_weight.scales", b.MLP2)...)
		items = append(items, p.vectors(mlp+"mlp2_bias", mlp+"mlp2_bias", b.MLP2Bias))
	}
	items = append(items, p.vector("norm.scale", "norm.scale", p.FinalNorm), p.matrix("unembedding.weight", "unembedding.weight", false, p.Unembedding))
	outputs, byFile, err := p.shards(path, items, "model--%05d-of-%05d.safetensors")
	return append(outputs, textFile(filepath.Join(path, configName), text)), byFile, err
}

func (p *plan) huggingFace(path string) ([]*output, map[*output][]item, error) {
	c := p.Config
	text, err := c.MarshalHuggingFace(p.mxfp4(HuggingFace))
	if err != nil {
		return nil, nil, err
	}
	items := []item{p.matrix("model.embed_tokens.weight", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		layer := fmt.Sprintf("model.layers.%d.", n)
		vector := func(name, canonical string, v []float32) {
			items = append(items, p.vector(layer+name, canonical, v))
		}
		matrix := func(name, canonical string, m Matrix) {
			items = append(items, p.matrix(layer+name, canonical, false, m))
		}
		vector("input_layernorm.weight", attn+"norm.scale", b.AttnNorm)
		from := 0
		for _, q := range []struct {
			name string
			rows int
		}{{"q_proj", c.QueryWidth()}, {"k_proj", c.KVWidth()}, {"v_proj", c.KVWidth()}} {
			matrix("self_attn."+q.name+".weight", attn+"qkv.weight", rowsOf(b.QKV, from, q.rows))
			vector("self_attn."+q.name+".bias", attn+"qkv.bias", b.QKVBias[from:from+q.rows])
			from += q.rows
		}
		vector("self_attn.sinks", attn+"sinks", b.Sinks)
		matrix("self_attn.o_proj.weight", attn+"out.weight", b.Out)
		vector("self_attn.o_proj.bias", attn+"out.bias", b.OutBias)
		vector("post_attention_layernorm.weight", mlp+"norm.scale", b.MLPNorm)
		matrix("mlp.router.weight", mlp+"gate.weight", b.Gate)
		vector("mlp.router.bias", mlp+"gate.bias", b.GateBias)
		for _, e := range []struct {
			name, canonical string
			parts           []Matrix
			bias            [][]float32
		}{{"gate_up_proj", "mlp1", b.MLP1, b.MLP1Bias}, {"down_proj", "mlp2", b.MLP2, b.MLP2Bias}} {
			name := layer + "mlp.experts." + e.name
			if p.mxfp4(HuggingFace) {
				items = append(items, packedExperts(name+"_blocks", name+"_scales", e.parts)...)
			} else {
				items = append(items, p.experts(name, mlp+e.canonical+"_weight", true, e.parts))
			}
			items = append(items, p.vectors(name+"_bias", mlp+e.canonical+"_bias", e.bias))
		}
	}
	items = append(items, p.vector("model.norm.weight", "norm.scale", p.FinalNorm), p.matrix("lm_head.weight", "unembedding.weight", false, p.Unembedding))

	outputs, byFile, err := p.shards(path, items, "model-%05d-of-%05d.safetensors")
	if err != nil {
		return nil, nil, err
	}
	if len(outputs) > 1 {
		index, err := makeIndex(outputs, byFile)
		if err != nil {
			return nil, nil, err
		}
		outputs = append(outputs, textFile(filepath.Join(path, indexName), index))
	}
	return append(outputs, textFile(filepath.Join(path, configName), text)), byFile, nil
}

// shards lays out as many safetensors files as are asked for. Blocks and scales
// stay together, because they are written together.
func (p *plan) shards(directory string, items []item, pattern string) ([]*output, map[*output][]item, error) {
	var parts [][]item
	var filled int64
	for at := 0; at < len(items); {
		n := 1
		if items[at].scales != "" {
			n = 2
		}
		var size int64
		for _, i := range items[at : at+n] {
			s, err := i.Size()
			if err != nil {
				return nil, nil, fmt.Errorf("tensor %q: %w", i.Name, err)
			}
			size += int64(s)
		}
		if len(parts) == 0 || p.options.ShardBytes > 0 && filled > 0 && filled+size > p.options.ShardBytes {
			parts, filled = append(parts, nil), 0
		}
		parts[len(parts)-1] = append(parts[len(parts)-1], items[at:at+n]...)
		filled += size
		at += n
	}
	// transformers refuses files that don't say what they were made for; OpenAI's
	// own files say the same.
	metadata := map[string]string{"format": "pt"}
	var outputs []*output
	byFile := map[*output][]item{}
	for n, part := range parts {
		name := singleName
		if len(parts) > 1 {
			name = fmt.Sprintf(pattern, n+1, len(parts))
		}
		specs := make([]tensor.Spec, len(part))
		for i := range part {
			specs[i] = part[i].Spec
		}
		header, offsets, err := tensor.SafetensorsHeader(specs, metadata)
		if err != nil {
			return nil, nil, err
		}
		o := &output{path: filepath.Join(directory, name)}
		o.put(header)
		for i, s := range specs {
			o.reserve(s.Name, int64(offsets[i+1]-offsets[i]))
		}
		outputs = append(outputs, o)
		byFile[o] = part
	}
	return outputs, byFile, nil
}

// makeIndex writes the index of several shards.
func makeIndex(outputs []*output, items map[*output][]item) ([]byte, error) {
	type metadata struct {
		Total int64 `json:"total_size"`
	}
	index := struct {
		Metadata metadata          `json:"metadata"`
		Map      map[string]string `json:"weight_map"`
	}{Map: map[string]string{}}
	for _, o := range outputs {
		for _, i := range items[o] {
			size, err := i.Size()
			if err != nil {
				return nil, err
			}
			index.Metadata.Total += int64(size)
			index.Map[i.Name] = filepath.Base(o.path)
		}
	}
	text, err := json.MarshalIndent(index, "", "  ")
	return append(text, '\n'), err
}

// textFile is a small file that is written with the others.
func textFile(path string, data []byte) *output {
	o := &output{path: path}
	o.put(data)
	return o
}

func (p *plan) flax(path string) ([]*output, map[*output][]item, error) {
	text, err := p.Config.MarshalOpenAI()
	if err != nil {
		return nil, nil, err
	}
	items := []item{p.matrix("embedding/embedding", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		to := fmt.Sprintf("block_%d/", n)
		items = append(items,
			normScale(p.vector(to+"attn/norm/scale", attn+"norm.scale", b.AttnNorm)),
			p.matrix(to+"attn/qkv/kernel", attn+"qkv.weight", true, b.QKV),
			p.vector(to+"attn/qkv/bias", attn+"qkv.bias", b.QKVBias),
			p.vector(to+"attn/sinks", attn+"sinks", b.Sinks),
			p.matrix(to+"attn/out/kernel", attn+"out.weight", true, b.Out),
			p.vector(to+"attn/out/bias", attn+"out.bias", b.OutBias),
			normScale(p.vector(to+"mlp/norm/scale", mlp+"norm.scale", b.MLPNorm)),
			p.matrix(to+"mlp/gate/kernel", mlp+"gate.weight", true, b.Gate),
			p.vector(to+"mlp/gate/bias", mlp+"gate.bias", b.GateBias),
			p.experts(to+"mlp/mlp1_weight", mlp+"mlp1_weight", false, b.MLP1),
			p.vectors(to+"mlp/mlp1_bias", mlp+"mlp1_bias", b.MLP1Bias),
			p.experts(to+"mlp/mlp2_weight", mlp+"mlp2_weight", false, b.MLP2),
			p.vectors(to+"mlp/mlp2_bias", mlp+"mlp2_bias", b.MLP2Bias),
		)
	}
	items = append(items, normScale(p.vector("norm/scale", "norm.scale", p.FinalNorm)), p.matrix("unembedding/kernel", "unembedding.weight", true, p.Unembedding))
	path = filePath(Flax, path)
	o, err := layOutMsgpack(path, items)
	if err != nil {
		return nil, nil, err
	}
	config := textFile(strings.TrimSuffix(path, flaxSuffix)+".config.json", text)
	return []*output{o, config}, map[*output][]item{o: items}, nil
}

// normScale stores a norm's scale as float32, as all implementations have it.
func normScale(i item) item {
	i.DType = tensor.F32
	return i
}

func (p *plan) equinox(path string) ([]*output, map[*output][]item, error) {
	if d := p.options.DType; d != "" && d != tensor.F32 && d != tensor.BF16 {
		return nil, nil, fmt.Errorf("jax2onnx's Equinox model has float32 or bfloat16 parameters, not %s", d)
	}
	c := p.Config
	c.NormEpsilon = 1e-5 // it is in the leaves, and not in the configuration
	configText, err := c.MarshalOpenAI()
	if err != nil {
		return nil, nil, err
	}
	paramType := "float32"
	if p.options.DType == tensor.BF16 {
		paramType = "bfloat16"
	}
	text, err := json.MarshalIndent(map[string]any{"config": json.RawMessage(configText), "param_dtype": paramType, "seed": 0}, "", "  ")
	if err != nil {
		return nil, nil, err
	}

	table := func(name string, shape []int, values []float32) item {
		t := tensor.FromFloat32s(shape, values)
		return item{Spec: tensor.Spec{Name: name, DType: t.DType, Shape: shape}, raw: t.Data}
	}
	epsilon := func(name string) item {
		return table(name, nil, []float32{float32(p.Config.NormEpsilon)})
	}
	inverse, concentration := ropeFrequencies(c)
	half := len(inverse)
	frequencies := make([]float32, half)
	for i, f := range inverse {
		frequencies[i] = float32(f)
	}
	cos, sin := make([]float32, c.InitialContextLength*half), make([]float32, c.InitialContextLength*half)
	for i := range cos {
		angle := float64(i/half) * inverse[i%half]
		cos[i], sin[i] = float32(math.Cos(angle)*concentration), float32(math.Sin(angle)*concentration)
	}

	items := []item{p.matrix("embedding.weight", "embedding.weight", false, p.Embedding)}
	for n, b := range p.Blocks {
		attn, mlp := fmt.Sprintf("block.%d.attn.", n), fmt.Sprintf("block.%d.mlp.", n)
		to := fmt.Sprintf("blocks.%d.", n)
		items = append(items,
			normScale(p.vector(to+"attn.norm.weight", attn+"norm.scale", b.AttnNorm)),
			epsilon(to+"attn.norm.eps"),
			table(to+"attn.rope._concentration", nil, []float32{float32(concentration)}),
			table(to+"attn.rope._inv_freq", []int{half}, frequencies),
			table(to+"attn.rope._cos_cache", []int{c.InitialContextLength, half}, cos),
			table(to+"attn.rope._sin_cache", []int{c.InitialContextLength, half}, sin),
			p.matrix(to+"attn.qkv.weight", attn+"qkv.weight", false, b.QKV),
			p.vector(to+"attn.qkv.bias", attn+"qkv.bias", b.QKVBias),
			p.matrix(to+"attn.out.weight", attn+"out.weight", false, b.Out),
			p.vector(to+"attn.out.bias", attn+"out.bias", b.OutBias),
			p.vector(to+"attn.sinks", attn+"sinks", b.Sinks),
			normScale(p.vector(to+"mlp.norm.weight", mlp+"norm.scale", b.MLPNorm)),
			epsilon(to+"mlp.norm.eps"),
			p.matrix(to+"mlp.gate.weight", mlp+"gate.weight", false, b.Gate),
			p.vector(to+"mlp.gate.bias", mlp+"gate.bias", b.GateBias),
			p.experts(to+"mlp.mlp1_weight", mlp+"mlp1_weight", false, b.MLP1),
			p.vectors(to+"mlp.mlp1_bias", mlp+"mlp1_bias", b.MLP1Bias),
			p.experts(to+"mlp.mlp2_weight", mlp+"mlp2_weight", false, b.MLP2),
			p.vectors(to+"mlp.mlp2_bias", mlp+"mlp2_bias", b.MLP2Bias),
		)
	}
	items = append(items, normScale(p.vector("norm.weight", "norm.scale", p.FinalNorm)), epsilon("norm.eps"),
		p.matrix("unembedding.weight", "unembedding.weight", false, p.Unembedding))

	path = filePath(Equinox, path)
	o := &output{path: path}
	for _, i := range items {
		head, err := tensor.NPYHead(i.Spec)
		if err != nil {
			return nil, nil, err
		}
		size, err := i.Size()
		if err != nil {
			return nil, nil, err
		}
		o.put(head)
		o.reserve(i.Name, int64(size))
	}
	meta := textFile(path+metaSuffix, append(text, '\n'))
	return []*output{o, meta}, map[*output][]item{o: items}, nil
}

// Flax's msgpack, laid out. Keys are sorted, as jax.tree_util sorts them, so
// that flax.serialization writes the same bytes when it has read them.

// maxFlaxArray is the size above which Flax stores an array in chunks
// (flax/serialization.py, MAX_CHUNK_SIZE).
const maxFlaxArray = 1 << 30

// node is a map of the bundle or one of its arrays.
type node struct {
	keys     []string
	children map[string]*node
	leaf     *item
}

func layOutMsgpack(path string, items []item) (*output, error) {
	root := &node{children: map[string]*node{}}
	for i := range items {
		at := root
		for key := range strings.SplitSeq(items[i].Name, "/") {
			child := at.children[key]
			if child == nil {
				child = &node{children: map[string]*node{}}
				at.children[key] = child
				at.keys = append(at.keys, key)
			}
			at = child
		}
		at.leaf = &items[i]
	}
	o := &output{path: path}
	return o, root.layOut(o)
}

func (n *node) layOut(o *output) error {
	if n.leaf != nil {
		return layOutArray(o, n.leaf.Spec)
	}
	slices.Sort(n.keys)
	o.put(mapHead(len(n.keys)))
	for _, key := range n.keys {
		o.put(textHead(key))
		if err := n.children[key].layOut(o); err != nil {
			return err
		}
	}
	return nil
}

// layOutArray writes an array's extension, in chunks if it is large.
func layOutArray(o *output, s tensor.Spec) error {
	size, err := s.Size()
	if err != nil {
		return fmt.Errorf("%q: %w", s.Name, err)
	}
	if size <= maxFlaxArray {
		return layOutPiece(o, s, s.Shape, size)
	}
	o.put(mapHead(3))
	o.put(append(textHead(chunkedKey), 0xc3)) // true
	o.put(textHead("shape"))
	o.put(mapHead(len(s.Shape)))
	for i, n := range s.Shape {
		o.put(append(textHead(fmt.Sprint(i)), integer(n)...))
	}
	o.put(textHead("chunks"))
	o.put(mapHead((size + maxFlaxArray - 1) / maxFlaxArray))
	for at := 0; at < size; at += maxFlaxArray {
		o.put(textHead(fmt.Sprint(at / maxFlaxArray)))
		n := min(maxFlaxArray, size-at)
		if err := layOutPiece(o, s, []int{n / s.DType.Size()}, n); err != nil {
			return err
		}
	}
	return nil
}

func layOutPiece(o *output, s tensor.Spec, shape []int, size int) error {
	name := ""
	for numpy, d := range flaxTypes {
		if d == s.DType {
			name = numpy
		}
	}
	if name == "" || len(shape) > 15 {
		return fmt.Errorf("%q: %s %v is not written by Flax", s.Name, s.DType, shape)
	}
	inner := []byte{0x93, 0x90 | byte(len(shape))} // arrays of 3 and of the shape's length
	for _, n := range shape {
		inner = append(inner, integer(n)...)
	}
	inner = append(append(inner, textHead(name)...), sized(0xc4, size)...)
	o.put(extHead(len(inner) + size))
	o.put(inner)
	o.reserve(s.Name, int64(size))
	return nil
}

// The smallest encodings, which Python's msgpack chooses.

func mapHead(n int) []byte {
	switch {
	case n < 16:
		return []byte{0x80 | byte(n)}
	case n < 1<<16:
		return []byte{0xde, byte(n >> 8), byte(n)}
	}
	return binary.BigEndian.AppendUint32([]byte{0xdf}, uint32(n))
}

func textHead(s string) []byte {
	if len(s) < 32 {
		return append([]byte{0xa0 | byte(len(s))}, s...)
	}
	return append(sized(0xd9, len(s)), s...)
}

// sized is a code for a length of 8 bits, or one of the next two for 16 and 32.
func sized(code byte, n int) []byte {
	switch {
	case n < 1<<8:
		return []byte{code, byte(n)}
	case n < 1<<16:
		return []byte{code + 1, byte(n >> 8), byte(n)}
	}
	return binary.BigEndian.AppendUint32([]byte{code + 2}, uint32(n))
}

func extHead(n int) []byte {
	if n <= 16 && n&(n-1) == 0 { // 1, 2, 4, 8, 16 have codes of their own
		return []byte{0xd4 + byte(math.Ilogb(float64(n))), extArray}
	}
	return append(sized(0xc7, n), extArray)
}

func integer(n int) []byte {
	if n < 128 {
		return []byte{byte(n)}
	}
	if n >= 1<<32 {
		return binary.BigEndian.AppendUint64([]byte{0xcf}, uint64(n))
	}
	return sized(0xcc, n)
}
