// Command onnxruntime fetches the pinned ONNX Runtime shared library into the
// cache directory: pip downloads PyPI's wheel, the wheel is a zip, the library
// is one file of it. Both are checked by sha256. No Python package is installed.
//
// With ONNXRUNTIME_LIB set, or the right library in the cache, it does nothing.
// It prints the library's path.
package main

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime/library"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	path, err := fetch(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "onnxruntime: %v\n", err)
		os.Exit(2)
	}
	fmt.Println(path)
}

// fetch returns the path of the library, which it downloads first if need be.
func fetch(ctx context.Context) (string, error) {
	if os.Getenv(library.EnvLibrary) != "" {
		return library.Path()
	}
	pin, err := library.PinFor(runtime.GOOS, runtime.GOARCH)
	if err != nil {
		return "", err
	}
	target, err := library.CachedPath()
	if err != nil {
		return "", err
	}
	if library.Verify(target, pin.SHA256) == nil {
		return target, nil
	}

	pip, err := findPip(ctx)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return "", err
	}
	// Beside the target, so that the rename stays inside one file system.
	work, err := os.MkdirTemp(filepath.Dir(target), "fetch-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)

	fmt.Fprintf(os.Stderr, "fetching ONNX Runtime %s (about 27 MB) through pip\n", library.Version)
	wheel, err := download(ctx, pip, work, pin)
	if err != nil {
		return "", err
	}
	if err := library.Verify(wheel, pin.WheelSHA256); err != nil {
		return "", err
	}
	extracted := filepath.Join(work, "library")
	if err := extract(wheel, pin.Member, extracted); err != nil {
		return "", err
	}
	if err := library.Verify(extracted, pin.SHA256); err != nil {
		return "", err
	}
	return target, os.Rename(extracted, target)
}

// findPip returns a command that is pip. npm's onnxruntime-node would do in its
// place once it reaches the pinned version; until then pip is needed.
func findPip(ctx context.Context) ([]string, error) {
	for _, command := range [][]string{{"python3", "-m", "pip"}, {"pip3"}, {"pip"}, {"python", "-m", "pip"}} {
		if exec.CommandContext(ctx, command[0], append(command[1:], "--version")...).Run() == nil {
			return command, nil
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("found no pip (python3 -m pip, pip3, pip): install it, or set %s to an ONNX Runtime %s library"+
		" (npm's onnxruntime-node is pinned here only from that version on; 1.30 is too old)",
		library.EnvLibrary, library.Version)
}

// download returns the wheel's path. The platform and the interpreter are named,
// so that the file is the same whatever Python is on the machine.
func download(ctx context.Context, pip []string, dir string, pin library.Pin) (string, error) {
	arguments := append(pip[1:len(pip):len(pip)], "download", "--quiet", "--no-deps", "--only-binary=:all:",
		"--disable-pip-version-check", "--platform", pin.WheelTag, "--python-version", library.PythonTag,
		"--implementation", "cp", "--dest", dir, "onnxruntime=="+library.Version)
	command := exec.CommandContext(ctx, pip[0], arguments...)
	if output, err := command.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s failed: %w: %s", strings.Join(command.Args, " "), err, lastLine(output))
	}
	wheels, err := filepath.Glob(filepath.Join(dir, "onnxruntime-*.whl"))
	if err != nil {
		return "", err
	}
	if len(wheels) != 1 {
		return "", fmt.Errorf("pip download left %d wheels in %s, want 1", len(wheels), dir)
	}
	return wheels[0], nil
}

func lastLine(output []byte) string {
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	return lines[len(lines)-1]
}

func extract(wheel, member, target string) (err error) {
	archive, err := zip.OpenReader(wheel)
	if err != nil {
		return fmt.Errorf("%s: %w", wheel, err)
	}
	defer archive.Close()
	from, err := archive.Open(member)
	if err != nil {
		return fmt.Errorf("%s: %w", wheel, err)
	}
	defer from.Close()
	to, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	_, err = io.Copy(to, from)
	return err
}
