package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// oracleRun asks one of the real implementations (tools/oracles/run.py) to run
// a checkpoint.
type oracleRun struct {
	Implementation string
	Precision      reference.Precision
	Checkpoint     string // directory in OpenAI's or Hugging Face's layout
	Tokens         []int32
	Layers         int  // 0: all
	Correct        bool // Flax and Equinox: mend their known faults

	InjectLayer int            // the block that gets Inject
	Inject      *tensor.Tensor // nil: the whole model runs from the tokens
}

// oracleResult is what it put out.
type oracleResult struct {
	Taps     map[string]tensor.Tensor
	Packages map[string]string // name to version
}

// runOracle runs the implementation in the Python environment that `make
// oracles` sets up. It blocks until the process has ended, and ends it when the
// context is cancelled.
func runOracle(ctx context.Context, o oracleRun) (oracleResult, error) {
	root, err := oraclesRoot()
	if err != nil {
		return oracleResult{}, err
	}
	python := filepath.Join(root, "build", "oracles", "bin", "python")
	if _, err := os.Stat(python); errors.Is(err, fs.ErrNotExist) {
		return oracleResult{}, fmt.Errorf("%s is not there: run `make oracles`", python)
	}
	scratch, err := os.MkdirTemp("", "gptoss-probe-")
	if err != nil {
		return oracleResult{}, err
	}
	defer os.RemoveAll(scratch)

	tokens, err := json.Marshal(o.Tokens)
	if err != nil {
		return oracleResult{}, err
	}
	tokenFile, output := filepath.Join(scratch, "tokens.json"), filepath.Join(scratch, "output.safetensors")
	if err := os.WriteFile(tokenFile, tokens, 0o644); err != nil {
		return oracleResult{}, err
	}
	arguments := []string{
		filepath.Join(root, "tools", "oracles", "run.py"), "--implementation", o.Implementation, "--precision", string(o.Precision),
		"--checkpoint", o.Checkpoint, "--tokens", tokenFile, "--taps", "all", "--output", output,
	}
	if o.Layers > 0 {
		arguments = append(arguments, "--max-layers", strconv.Itoa(o.Layers))
	}
	if o.Correct {
		arguments = append(arguments, "--correct-window")
	}
	if o.Inject != nil {
		file := filepath.Join(scratch, "input.safetensors")
		named := []tensor.Named{{Name: taps.Block(o.InjectLayer, taps.Input), Tensor: *o.Inject}}
		if err := tensor.WriteSafetensors(file, named, nil); err != nil {
			return oracleResult{}, err
		}
		arguments = append(arguments, "--inject", file)
	}

	process := exec.CommandContext(ctx, python, arguments...)
	process.Cancel = func() error { return process.Process.Signal(syscall.SIGTERM) }
	process.WaitDelay = 5 * time.Second // then it is killed
	var stderr bytes.Buffer
	process.Stderr = &stderr
	if err := process.Run(); err != nil {
		if ctx.Err() != nil {
			return oracleResult{}, ctx.Err()
		}
		return oracleResult{}, fmt.Errorf("%s did not run (%w): %s", o.Implementation, err, lastLine(stderr.String()))
	}
	return readOracle(output)
}

// readOracle reads what run.py wrote.
func readOracle(path string) (oracleResult, error) {
	file, err := tensor.OpenSafetensors(path)
	if err != nil {
		return oracleResult{}, err
	}
	defer file.Close()
	var result oracleResult
	if err := json.Unmarshal([]byte(file.Metadata()["versions"]), &result.Packages); err != nil {
		return oracleResult{}, fmt.Errorf("%s: metadata: %w", path, err)
	}
	result.Taps, err = readTensors(path)
	return result, err
}

// oraclesRoot finds the source tree that holds tools/oracles: around the working
// directory, or where this program was compiled.
func oraclesRoot() (string, error) {
	here, err := os.Getwd()
	if err != nil {
		return "", err
	}
	_, source, _, _ := runtime.Caller(0)
	for _, start := range []string{here, filepath.Dir(source)} {
		for dir := start; ; dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "tools", "oracles", "run.py")); err == nil {
				return dir, nil
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", errors.New("tools/oracles is not there: run the command inside the repository")
}

// lastLine is where Python says what went wrong.
func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
