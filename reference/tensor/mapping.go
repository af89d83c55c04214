package tensor

import (
	"fmt"
	"os"
	"sync"

	"github.com/edsrzf/mmap-go"
)

// Mapping is a file mapped into memory, read-only. Checkpoints are far larger
// than what may be read into memory; a mapped file is read where it is touched.
type Mapping struct {
	path string
	data mmap.MMap

	closeOnce sync.Once
	closeErr  error
}

// Map maps a regular file that is not empty.
func Map(path string) (*Mapping, error) {
	// Stat first: opening a pipe would wait for its writer.
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	if info.Size() == 0 {
		return nil, fmt.Errorf("%s: the file is empty", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := mmap.Map(file, mmap.RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: mapping the file: %w", path, err)
	}
	return &Mapping{path: path, data: data}, nil
}

// Path returns the name that the file was opened with.
func (m *Mapping) Path() string { return m.path }

// Bytes returns the file's content. It must not be used after Close.
func (m *Mapping) Bytes() []byte { return m.data }

// Size returns the bytes of the file.
func (m *Mapping) Size() int64 { return int64(len(m.data)) }

// Release tells the system that the pages read so far are not needed now. The
// bytes stay valid and come back from the page cache or the disk when they are
// touched; only the process's resident memory shrinks. It may be called at any
// time, also while others read.
func (m *Mapping) Release() { release(m.data) }

// Close unmaps the file. It may be called more than once.
func (m *Mapping) Close() error {
	m.closeOnce.Do(func() { m.closeErr = m.data.Unmap() })
	return m.closeErr
}
