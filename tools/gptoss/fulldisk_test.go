//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/config"
)

// Variables that make the test binary be the program, on a disk on which no file
// can grow beyond a limit.
const (
	childArguments = "GPTOSS_TEST_ARGUMENTS"
	childLimit     = "GPTOSS_TEST_FILE_LIMIT"
)

// TestMain is the program itself where a test has started it as such.
func TestMain(m *testing.M) {
	text := os.Getenv(childArguments)
	if text == "" {
		os.Exit(m.Run())
	}
	var arguments []string
	limit, err := strconv.ParseUint(os.Getenv(childLimit), 10, 64)
	if err = errors.Join(err, json.Unmarshal([]byte(text), &arguments)); err != nil {
		panic(err)
	}
	// A write beyond the limit is cut short or fails (EFBIG), as on a full disk,
	// wherever the process runs; ignoring the signal leaves it at that.
	signal.Ignore(syscall.SIGXFSZ)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: limit, Max: limit}); err != nil {
		panic(err)
	}
	os.Exit(run(context.Background(), commands(), arguments, os.Stdout, os.Stderr))
}

// onSmallDisk runs the program where no file can have more bytes than the limit.
func onSmallDisk(t *testing.T, limit int64, arguments []string) (status int, stderr string) {
	t.Helper()
	text, err := json.Marshal(arguments)
	require.NoError(t, err)
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childArguments+"="+string(text), childLimit+"="+strconv.FormatInt(limit, 10))
	var errs bytes.Buffer
	child.Stderr = &errs
	err = child.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return child.ProcessState.ExitCode(), errs.String()
}

// directory stands for the content of one.
const directory = "(directory)"

// content returns every file and directory below dir.
func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || entry.IsDir() {
			found[name] = directory
			return err
		}
		data, err := os.ReadFile(path)
		found[name] = string(data)
		return err
	}))
	return found
}

// A disk that runs full in the middle of any output gives one line and status 2,
// and leaves nothing of the new output and all of the older one.
func TestFullDisk(t *testing.T) {
	graph := exportFixture(t, "toy", exporter.Options{})
	transcript := filepath.Join(t.TempDir(), "toy.md")
	status, _, stderr := runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", graph, "--tokens", someTokens, "--transcript", transcript)
	require.Zero(t, status, stderr)
	toy := fixtures.Dir("toy")
	// A graph that is larger than its weights fails after them.
	c, err := config.Read(filepath.Join(toy, fixtures.ConfigFile))
	require.NoError(t, err)
	c.Layers, c.Sliding, c.Experts, c.ExpertsPerToken, c.VocabSize, c.HiddenSize = 8, config.Alternating(8), 2, 1, 64, 32
	narrow := filepath.Join(t.TempDir(), "narrow")
	require.NoError(t, fixtures.Synthesize(t.Context(), c, 1, fixtures.Healthy, narrow))
	for _, c := range []struct {
		name      string
		output    string // in a directory that has an older one
		fresh     bool   // an older one is refused: there is none
		arguments func(output string) []string
	}{
		{"forward", "o.safetensors", false, func(o string) []string {
			return []string{"forward", "--checkpoint", toy, "--tokens", someTokens, "--taps", "all", "--output", o}
		}},
		{"export", "m.onnx", false, func(o string) []string {
			return []string{"export", "--checkpoint", toy, "--force", "--output", o}
		}},
		{"export graph", "m.onnx", false, func(o string) []string {
			return []string{"export", "--checkpoint", narrow, "--emit-block-debug", "--sequence-length", "8", "--force", "--output", o}
		}},
		{"convert openai", "o", true, func(o string) []string {
			return []string{"convert", "--from", toy, "--to", "openai", "--output", o}
		}},
		{"convert huggingface", "o", true, func(o string) []string {
			return []string{"convert", "--from", toy, "--to", "huggingface", "--output", o}
		}},
		{"convert flax", "o.msgpack", false, func(o string) []string {
			return []string{"convert", "--from", toy, "--to", "flax", "--output", o}
		}},
		{"convert equinox", "o.eqx", false, func(o string) []string {
			return []string{"convert", "--from", toy, "--to", "equinox", "--output", o}
		}},
		{"synthesize", "o", true, func(o string) []string {
			return []string{"synthesize", "--config", filepath.Join(toy, fixtures.ConfigFile), "--output", o}
		}},
		{"expand", "o", true, func(o string) []string {
			return []string{"expand", "--from", fixtures.Dir("canary"), "--output", o}
		}},
		{"compare", "t.md", false, func(o string) []string {
			return []string{"compare", "--checkpoint", toy, "--onnx", graph, "--tokens", someTokens, "--transcript", o}
		}},
		{"judge", "v.json", false, func(o string) []string {
			return []string{"judge", "--checkpoint", toy, "--onnx", graph, "--tokens", someTokens, "--json", o}
		}},
		{"promote", "artifact", false, func(o string) []string {
			return []string{"promote", "--onnx", graph, "--transcript", transcript, "--force", "--directory", filepath.Dir(o), "--name", filepath.Base(o)}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			arguments := c.arguments(filepath.Join(dir, c.output))
			status, stderr := onSmallDisk(t, 1<<40, arguments)
			require.Zero(t, status, stderr)
			written := content(t, dir)
			// Files of several sizes are written: each must fail in its middle.
			limits := map[int64]bool{0: true}
			for _, text := range written {
				if text != directory {
					limits[int64(len(text))/2], limits[int64(len(text))-1] = true, true
				}
			}
			for limit := range limits {
				dir := t.TempDir()
				older := map[string]string{}
				for name, text := range written {
					if !c.fresh && text != directory {
						older[name] = "older"
					}
				}
				requireOlderSurvives(t, limit, dir, older, c.arguments(filepath.Join(dir, c.output)))
			}
		})
	}
}

func requireOlderSurvives(t *testing.T, limit int64, dir string, older map[string]string, arguments []string) {
	t.Helper()
	for name, text := range older {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	}
	before := content(t, dir)
	status, stderr := onSmallDisk(t, limit, arguments)
	assert.Equal(t, exitInput, status, "limit %d", limit)
	assert.True(t, strings.HasPrefix(stderr, "gptoss: ") && strings.Count(stderr, "\n") == 1, "limit %d: stderr is %q", limit, stderr)
	assert.Contains(t, stderr, "file too large")
	assert.Equal(t, before, content(t, dir), "limit %d: %s", limit, stderr)
}
