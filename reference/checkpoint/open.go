package checkpoint

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/config/strictjson"
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

// Options say what a path alone does not.
type Options struct {
	// Config names the configuration file, instead of the one beside the weights.
	Config string
	// UndoGateBias repairs the router's bias of an Equinox checkpoint; see
	// [Model.Notes] and README.md. It is an error for the other layouts.
	UndoGateBias bool
}

// Open opens a checkpoint with the configuration that lies beside it. See
// [OpenWith].
func Open(path string) (*Model, error) { return OpenWith(path, Options{}) }

// OpenWith opens a checkpoint. The path is
//
//   - a directory, or one .safetensors file with a config.json beside it, in
//     OpenAI's or Hugging Face's layout, told apart by the tensors' names;
//   - a directory of the Hugging Face hub's cache (with refs and snapshots);
//   - a Flax bundle NAME.msgpack with NAME.config.json or
//     NAME.msgpack.config.json beside it;
//   - an Equinox file NAME.eqx with NAME.eqx.meta.json beside it;
//   - a directory with one file of the last two kinds.
//
// Every tensor's presence, dtype and shape is checked against the
// configuration; a tensor that the configuration does not call for is an error
// too, so that nothing is ignored silently. All that is wrong is in the error
// (see [IssuesError]). Small tensors, and everything in checkpoints of up to
// 256 MiB, are checked to be finite; call [Model.Check] for the rest.
//
// The weights stay in the mapped files until the model is closed.
func OpenWith(path string, o Options) (*Model, error) {
	at, err := locate(path)
	if err != nil {
		return nil, err
	}
	l := newLoader(at.configFile)
	m := &Model{Source: Source{Path: path}, close: l.close}
	switch {
	case at.bundle != "":
		err = l.openFlax(m, at.bundle, o)
	case at.leaves != "":
		err = l.openEquinox(m, at.leaves, o)
	default:
		err = l.openSafetensors(m, at, o)
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return m, nil
}

// place is where a checkpoint's files are.
type place struct {
	configFile string
	files      []string          // safetensors, sorted
	index      map[string]string // tensor name to file, nil without an index
	indexFile  string
	bundle     string // a Flax bundle, and nothing else
	leaves     string // an Equinox file, and nothing else
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
		switch filepath.Ext(path) {
		case flaxSuffix:
			return place{bundle: path}, nil
		case equinoxSuffix:
			return place{leaves: path}, nil
		case ".safetensors":
		default:
			return place{}, fmt.Errorf("%s: not a checkpoint: expected a directory or a file .safetensors, .msgpack or .eqx", path)
		}
		return place{configFile: filepath.Join(filepath.Dir(path), configName), files: []string{path}}, nil
	}
	directory, err := hubSnapshot(path)
	if err != nil {
		return place{}, err
	}
	p, err := locateIn(directory)
	if err != nil || len(p.files) > 0 || p.bundle != "" || p.leaves != "" {
		return p, err
	}
	// A hub download may hold OpenAI's files only, in their sub-directory.
	if p, err = locateIn(filepath.Join(directory, originalDir)); err == nil && len(p.files) > 0 {
		return p, nil
	}
	return place{}, fmt.Errorf("%s: no .safetensors, .msgpack or .eqx files here", directory)
}

// locateIn lists the files of one directory. No files is no error.
func locateIn(directory string) (place, error) {
	entries, err := os.ReadDir(directory)
	if err != nil {
		return place{}, err
	}
	p := place{configFile: filepath.Join(directory, configName)}
	names := map[string]bool{}
	var others []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext == flaxSuffix || ext == equinoxSuffix {
			others = append(others, filepath.Join(directory, e.Name()))
		}
		if name := e.Name(); strings.HasSuffix(name, ".safetensors") && !strings.HasPrefix(name, ".") {
			names[name] = true
			p.files = append(p.files, filepath.Join(directory, name)) // ReadDir sorts
		}
	}
	if len(p.files) == 0 && len(others) == 1 {
		if filepath.Ext(others[0]) == flaxSuffix {
			return place{bundle: others[0]}, nil
		}
		return place{leaves: others[0]}, nil
	}
	if len(p.files) == 0 && len(others) > 1 {
		return place{}, fmt.Errorf("%s: has %d checkpoints (%s, ...); name one of them", directory, len(others), filepath.Base(others[0]))
	}
	if slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == indexName }) {
		p.indexFile = filepath.Join(directory, indexName)
		index, err := readIndex(p.indexFile)
		if err != nil {
			return place{}, err
		}
		// OpenAI's loader reads every file and knows no index; Hugging Face's
		// reads what the index names.
		if layoutOf(slices.Collect(maps.Keys(index))) == HuggingFace {
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

func (l *loader) openSafetensors(m *Model, at place, o Options) error {
	if o.UndoGateBias {
		return fmt.Errorf("%s: only an Equinox file can have a gate bias to undo", m.Source.Path)
	}
	if o.Config != "" {
		l.configFile = o.Config
	}
	for _, file := range at.files {
		if err := l.open(file); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(at.index)) {
		if got, ok := l.tensors[name]; !ok || got.path != at.index[name] {
			l.issue("%s: tensor %q should be in %s", at.indexFile, name, at.index[name])
		}
	}
	for _, name := range l.names {
		if _, ok := at.index[name]; !ok && at.index != nil {
			l.issue("%s: tensor %q is not in the index", l.tensors[name].path, name)
		}
	}

	l.layout = layoutOf(l.names)
	if l.layout == "" {
		return fmt.Errorf("%s: the tensors have neither OpenAI's names (block.0.attn.qkv.weight) nor Hugging Face's (model.layers.0.self_attn.q_proj.weight)", m.Source.Path)
	}
	if err := l.readConfig(); err != nil {
		return err
	}
	if l.layout == OpenAI {
		l.openAI(m)
	} else {
		l.huggingFace(m)
	}
	return l.finish(m)
}

// readConfig reads the configuration file.
func (l *loader) readConfig() (err error) {
	if l.config, err = config.Read(l.configFile); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: is missing; a checkpoint needs its configuration", l.configFile)
	}
	return err
}
