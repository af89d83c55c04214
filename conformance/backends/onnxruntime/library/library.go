// Package library says where the ONNX Runtime shared library is, and which one
// is the right one. The fetcher (tools/onnxruntime) and the backend share it,
// so that they cannot disagree.
package library

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// Version is the pinned release. Results move with the runtime's version, and
// 1.32 is the first whose QMoE operator computes on MXFP4 bytes on a CPU.
const Version = "1.32.0"

// Environment variables that are read here.
const (
	EnvLibrary = "ONNXRUNTIME_LIB" // a library that is already on the machine, of any version
	EnvCache   = "GPTOSS_CACHE"    // the cache directory, in place of the user's
)

// Pin describes the shared library inside PyPI's wheel for one platform.
type Pin struct {
	WheelTag    string // platform tag, as pip download wants it
	WheelSHA256 string
	Member      string // path inside the wheel
	SHA256      string // of the member
}

// PythonTag is the interpreter whose wheel is fetched. The shared library is the
// same file in the wheels of all of them; one must be named for pip to choose.
const PythonTag = "3.12"

// pins holds what `pip download onnxruntime==1.32.0` gave and `sha256sum` printed
// for it, by GOOS/GOARCH.
var pins = map[string]Pin{
	"linux/amd64": {
		WheelTag:    "manylinux_2_28_x86_64",
		WheelSHA256: "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
		Member:      "onnxruntime/capi/libonnxruntime.so.1.32.0",
		SHA256:      "6c1585d1bbf45b0712ea4a21b705c5fcb4ba04ff2e30f1fbf81a49faf658638f",
	},
	"linux/arm64": {
		WheelTag:    "manylinux_2_28_aarch64",
		WheelSHA256: "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
		Member:      "onnxruntime/capi/libonnxruntime.so.1.32.0",
		SHA256:      "49852228a93995158b2a813d4df487d47a1b76b0eaa894507ef49e91b6d7954a",
	},
	"darwin/arm64": {
		WheelTag:    "macosx_14_0_arm64",
		WheelSHA256: "d52510bbbcc880c13b826f7d75cdf33ac5cf0bb864d960000fc29ce73f0cb83e",
		Member:      "onnxruntime/capi/libonnxruntime.1.32.0.dylib",
		SHA256:      "fa585fabbea65b823b9a8f7e27d46aee3989d1be7e36b528203d3a1fd613aae7",
	},
}

// PinFor returns the pin of a platform. A platform without a wheel is an error
// that names the way around.
func PinFor(goos, goarch string) (Pin, error) {
	pin, ok := pins[goos+"/"+goarch]
	if !ok {
		return Pin{}, fmt.Errorf("PyPI has no ONNX Runtime %s wheel for %s/%s: set %s to a library of your own",
			Version, goos, goarch, EnvLibrary)
	}
	return pin, nil
}

// CacheDir returns the suite's cache directory: GPTOSS_CACHE, else "gptoss" in
// the user's cache directory.
func CacheDir() (string, error) {
	if dir := os.Getenv(EnvCache); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("%w: set %s", err, EnvCache)
	}
	return filepath.Join(dir, "gptoss"), nil
}

// CachedPath returns where the fetcher puts the library of this platform. The
// path holds the version, so that checkouts with other pins do not fight.
func CachedPath() (string, error) {
	pin, err := PinFor(runtime.GOOS, runtime.GOARCH)
	if err != nil {
		return "", err
	}
	dir, err := CacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "onnxruntime-"+Version, filepath.Base(pin.Member)), nil
}

// Path returns the library to load: ONNXRUNTIME_LIB if that is set, else the
// fetched one. A missing file is an error that says what to run.
func Path() (string, error) {
	if path := os.Getenv(EnvLibrary); path != "" {
		if err := regularFile(path); err != nil {
			return "", fmt.Errorf("%s: %w", EnvLibrary, err)
		}
		return path, nil
	}
	path, err := CachedPath()
	if err != nil {
		return "", err
	}
	if err := regularFile(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("ONNX Runtime %s is not at %s: run `make onnxruntime`, or set %s",
				Version, path, EnvLibrary)
		}
		return "", err
	}
	return path, nil
}

func regularFile(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", path)
	}
	return nil
}

// Verify compares a file's sha256, in hex, with the one wanted.
func Verify(path, want string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != want {
		return fmt.Errorf("%s has sha256 %s, want %s", path, got, want)
	}
	return nil
}
