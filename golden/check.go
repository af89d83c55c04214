package golden

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ReadManifest reads the manifest of a fixture's runs.
func ReadManifest(fixture string) (Manifest, error) {
	var m Manifest
	err := readJSON(filepath.Join(root(), "model", fixture, ManifestFile), &m)
	return m, err
}

// CheckFile compares a file's sha256 (in hexadecimal) with the one on record.
func CheckFile(path, digest string) error { return checkDigest(path, digest) }

// Check verifies every manifest under golden/: each file that it lists is there
// with its digest, and no tensor file is there that no manifest lists.
func Check() error {
	listed := map[string]string{} // path -> digest
	for _, fixture := range Models() {
		m, err := ReadManifest(fixture)
		if err != nil {
			return err
		}
		dir := filepath.Join(root(), "model", fixture)
		listed[filepath.Join(dir, SpreadFile)] = m.SpreadSHA256
		for _, r := range m.Runs {
			listed[filepath.Join(dir, r.File)] = r.SHA256
		}
	}
	for _, name := range sampled() {
		samples, err := ReadSamples(name)
		if err != nil {
			return err
		}
		for file, digest := range samples.SHA256 {
			listed[filepath.Join(samples.dir, file)] = digest
		}
	}
	for _, stage := range Stages() {
		cases, err := Stage(stage)
		if err != nil {
			return err
		}
		for _, c := range cases {
			if c.File != "" {
				listed[c.path] = c.SHA256
			}
		}
	}
	var problems []error
	for path, digest := range listed {
		if err := checkDigest(path, digest); err != nil {
			problems = append(problems, err)
		}
	}
	dirs := []string{filepath.Join(root(), "model")}
	for _, stage := range Stages() {
		dirs = append(dirs, filepath.Join(root(), stage))
	}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || filepath.Ext(path) != ".safetensors" {
				return err
			}
			if _, ok := listed[path]; !ok {
				problems = append(problems, fmt.Errorf("%s is in no manifest; make golden would not have left it", path))
			}
			return nil
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}
