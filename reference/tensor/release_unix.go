//go:build unix

package tensor

import "golang.org/x/sys/unix"

// release drops the pages of a mapped file. It is a hint: an error does no harm.
func release(data []byte) { _ = unix.Madvise(data, unix.MADV_DONTNEED) }
