package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/internal/strictjson"
	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Layouts, as Source.Layout has them.
const (
	OpenAI      = "openai"
	HuggingFace = "huggingface"
	Flax        = "flax"
	Equinox     = "equinox"
)

// checkAllBelow is the size up to which Open looks at every value. Scanning
// 256 MiB takes a tenth of a second; larger files are scanned by
// [Model.Check], and their small tensors at once.
const checkAllBelow = 256 << 20

// Open opens a checkpoint: a directory, one .safetensors file with a
// config.json beside it, or a directory of the Hugging Face hub's cache
// (models--NAME, with refs and snapshots). The layout is told by the names of
// the tensors.
//
// Every tensor's presence, dtype and shape is checked against the
// configuration; a tensor that the configuration does not call for is an error
// too, so that nothing is ignored silently. All that is wrong is in the error
// (see [IssuesError]). Small tensors, and everything in checkpoints of up to
// 256 MiB, are checked to be finite; call [Model.Check] for the rest.
//
// The weights stay in the mapped files until the model is closed.
func Open(path string) (*Model, error) {
	place, err := locate(path)
	if err != nil {
		return nil, err
	}
	return openSafetensors(path, place)
}

// place is where a checkpoint's files are.
type place struct {
	configFile string
	files      []string          // safetensors, sorted
	index      map[string]string // tensor name to file, nil without an index
	indexFile  string
}

const (
	configName  = "config.json"
	singleName  = "model.safetensors"
	indexName   = "model.safetensors.index.json"
	originalDir = "original" // OpenAI's layout inside a hub repository
)

// locate finds the files that belong to a path.
func locate(path string) (place, error) {
	info, err := os.Stat(path)
	if err != nil {
		return place{}, err
	}
	if !info.IsDir() {
		if !strings.HasSuffix(path, ".safetensors") {
			return place{}, fmt.Errorf("%s: not a checkpoint: expected a directory or a .safetensors file", path)
		}
		return place{configFile: filepath.Join(filepath.Dir(path), configName), files: []string{path}}, nil
	}
	directory, err := hubSnapshot(path)
	if err != nil {
		return place{}, err
	}
	p, err := locateIn(directory)
	if err != nil || len(p.files) > 0 {
		return p, err
	}
	// A hub download may hold OpenAI's files only, in their sub-directory.
	if p, err = locateIn(filepath.Join(directory, originalDir)); err == nil && len(p.files) > 0 {
		return p, nil
	}
	return place{}, fmt.Errorf("%s: no .safetensors files here", directory)
}

// locateIn lists the files of one directory. No files is no error.
func locateIn(directory string) (place, error) {
	entries, err := os.ReadDir(directory)
	if err != nil {
		return place{}, err
	}
	p := place{configFile: filepath.Join(directory, configName)}
	names := map[string]bool{}
	for _, e := range entries {
		if name := e.Name(); strings.HasSuffix(name, ".safetensors") && !strings.HasPrefix(name, ".") {
			names[name] = true
			p.files = append(p.files, filepath.Join(directory, name)) // ReadDir sorts
		}
	}
	if slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == indexName }) {
		p.indexFile = filepath.Join(directory, indexName)
		index, err := readIndex(p.indexFile)
		if err != nil {
			return place{}, err
		}
		// OpenAI's loader reads every file and knows no index; Hugging Face's
		// reads what the index names.
		if layoutOf(keys(index)) == HuggingFace {
			return p.indexed(directory, index, names)
		}
		return p, nil
	}
	// Without an index transformers reads model.safetensors and nothing else.
	if single := filepath.Join(directory, singleName); names[singleName] && len(p.files) > 1 {
		if f, err := tensor.OpenSafetensors(single); err == nil {
			defer f.Close()
			if layoutOf(f.Names()) == HuggingFace {
				p.files = []string{single}
			}
		}
	}
	return p, nil
}

// indexed narrows a place to the files that the index names.
func (p place) indexed(directory string, index map[string]string, there map[string]bool) (place, error) {
	p.files, p.index = nil, map[string]string{}
	seen := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(index)) {
		shard := index[name]
		if !there[shard] {
			return place{}, fmt.Errorf("%s: tensor %q is in %q, which is not in the directory", p.indexFile, name, shard)
		}
		file := filepath.Join(directory, shard)
		p.index[name] = file
		if !seen[shard] {
			seen[shard] = true
			p.files = append(p.files, file)
		}
	}
	if there[singleName] && !seen[singleName] {
		return place{}, fmt.Errorf("%s: the index names other files than %s, which is here too; remove one of them", p.indexFile, singleName)
	}
	slices.Sort(p.files)
	return p, nil
}

// maxIndexBytes bounds an index; that of gpt-oss-120b has about 60 kB.
const maxIndexBytes = 16 << 20

// readIndex reads the weight_map of a model.safetensors.index.json.
func readIndex(path string) (map[string]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxIndexBytes {
		return nil, fmt.Errorf("%s: not a regular file of at most %d bytes", path, maxIndexBytes)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	index, err := parseIndex(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return index, nil
}

func parseIndex(data []byte) (map[string]string, error) {
	r, err := strictjson.NewReader(data)
	if err != nil {
		return nil, err
	}
	index := map[string]string{}
	found := false
	err = r.Object(func(key string) error {
		if key != "weight_map" {
			_, err := r.Raw()
			return err
		}
		found = true
		return r.Object(func(name string) error {
			shard, err := r.String()
			if err != nil {
				return fmt.Errorf("weight_map: %q %w", name, err)
			}
			if err := checkShardName(shard); err != nil {
				return fmt.Errorf("weight_map: %q: %w", name, err)
			}
			index[name] = shard
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	if !found || len(index) == 0 {
		return nil, errors.New("has no weight_map")
	}
	return index, nil
}

// checkShardName refuses every name that is not a plain file name, so that an
// index can't make us read outside the directory. (The file itself may be a
// symbolic link: in the hub's cache all are.)
func checkShardName(name string) error {
	if len(name) > 255 || !strings.HasSuffix(name, ".safetensors") || strings.ContainsAny(name, "/\\\x00:") || strings.HasPrefix(name, ".") {
		return fmt.Errorf("%.60q is not the plain name of a .safetensors file", name)
	}
	return nil
}

// commit is what a hub cache calls its snapshots.
var commit = regexp.MustCompile(`^[0-9a-zA-Z_-]{1,64}$`)

// hubSnapshot returns the snapshot of a hub cache directory, or the directory
// itself if it is none.
func hubSnapshot(directory string) (string, error) {
	snapshots := filepath.Join(directory, "snapshots")
	if info, err := os.Stat(snapshots); err != nil || !info.IsDir() {
		return directory, nil
	}
	if _, err := os.Stat(filepath.Join(directory, configName)); err == nil {
		return directory, nil
	}
	if ref, err := os.ReadFile(filepath.Join(directory, "refs", "main")); err == nil {
		name := strings.TrimSpace(string(ref))
		if !commit.MatchString(name) {
			return "", fmt.Errorf("%s: does not name a commit", filepath.Join(directory, "refs", "main"))
		}
		return filepath.Join(snapshots, name), nil
	}
	entries, err := os.ReadDir(snapshots)
	if err != nil {
		return "", err
	}
	if len(entries) != 1 {
		return "", fmt.Errorf("%s: has %d snapshots and no refs/main; name one of them", directory, len(entries))
	}
	return filepath.Join(snapshots, entries[0].Name()), nil
}

// layoutOf tells the layout from the names of tensors, or "" if they are
// neither's.
func layoutOf(names []string) string {
	openai, huggingface := false, false
	for _, name := range names {
		switch {
		case strings.HasPrefix(name, "block.") || name == "embedding.weight" || name == "unembedding.weight" || name == "norm.scale":
			openai = true
		case strings.HasPrefix(name, "model.") || name == "lm_head.weight":
			huggingface = true
		}
	}
	switch {
	case openai && !huggingface:
		return OpenAI
	case huggingface && !openai:
		return HuggingFace
	}
	return ""
}

func openSafetensors(path string, at place) (_ *Model, err error) {
	l := &loader{tensors: map[string]located{}, used: map[string]bool{}, configFile: at.configFile}
	m := &Model{Source: Source{Path: path}, close: l.close}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for _, file := range at.files {
		if err := l.open(file); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(at.index)) {
		if got, ok := l.tensors[name]; !ok || got.file.Path() != at.index[name] {
			l.issue("%s: tensor %q should be in %s", at.indexFile, name, at.index[name])
		}
	}
	for _, name := range l.names {
		if _, ok := at.index[name]; !ok && at.index != nil {
			l.issue("%s: tensor %q is not in the index", l.tensors[name].file.Path(), name)
		}
	}

	m.Source.Layout = layoutOf(l.names)
	if m.Source.Layout == "" {
		return nil, fmt.Errorf("%s: the tensors have neither OpenAI's names (block.0.attn.qkv.weight) nor Hugging Face's (model.layers.0.self_attn.q_proj.weight)", path)
	}
	if m.Config, err = config.Read(at.configFile); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s: is missing; a checkpoint needs its configuration", at.configFile)
		}
		return nil, err
	}
	l.config = m.Config
	if m.Source.Layout == OpenAI {
		l.openAI(m)
	} else {
		l.huggingFace(m)
	}
	for _, name := range l.names {
		if !l.used[name] {
			l.issue("%s: tensor %q is unexpected: a model of %d layers in the %s layout has none of this name",
				l.tensors[name].file.Path(), name, l.config.Layers, m.Source.Layout)
		}
	}
	if err := l.result(); err != nil {
		return nil, err
	}
	m.tensors = l.infos()
	m.checks = l.checks
	if l.bytes <= checkAllBelow {
		if err := m.Check(context.Background()); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func keys(m map[string]string) []string {
	return slices.Collect(maps.Keys(m))
}
