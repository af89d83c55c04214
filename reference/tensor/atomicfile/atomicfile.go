// Package atomicfile writes files that are either complete or not there: data
// goes to a temporary name in the same directory, which is renamed at the end.
package atomicfile

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
)

// File is a file under a temporary name. It is an io.Writer and an io.WriterAt;
// writing fails once the context is cancelled.
type File struct {
	file *os.File
	path string
	ctx  context.Context
	done bool
}

// Create opens a temporary file that Commit renames to path. The caller must
// call Close, which does nothing after Commit and removes the file before.
func Create(ctx context.Context, path string) (*File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	directory, base := filepath.Split(path)
	for {
		// Not os.CreateTemp: its mode is 0600, and the umask can't be asked for.
		name := filepath.Join(directory, fmt.Sprintf(".%s.%08x.tmp", base, rand.Uint32()))
		file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return &File{file: file, path: path, ctx: ctx}, nil
	}
}

// Write appends.
func (f *File) Write(p []byte) (int, error) {
	if err := f.ctx.Err(); err != nil {
		return 0, err
	}
	return f.file.Write(p)
}

// WriteAt writes at an offset. Concurrent calls are safe where they don't overlap.
func (f *File) WriteAt(p []byte, offset int64) (int, error) {
	if err := f.ctx.Err(); err != nil {
		return 0, err
	}
	return f.file.WriteAt(p, offset)
}

// Name returns the temporary name.
func (f *File) Name() string { return f.file.Name() }

// Commit gives the file its final name, replacing what was there.
func (f *File) Commit() error {
	if err := f.ctx.Err(); err != nil {
		return err
	}
	if err := f.file.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.file.Name(), f.path); err != nil {
		return err
	}
	f.done = true
	return nil
}

// Close removes the temporary file unless it was committed.
func (f *File) Close() {
	if f.done {
		return
	}
	f.done = true
	f.file.Close()
	os.Remove(f.file.Name())
}

// Write writes a whole file at once.
func Write(ctx context.Context, path string, data []byte) error {
	f, err := Create(ctx, path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Commit()
}
