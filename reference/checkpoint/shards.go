package checkpoint

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

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
