//go:build unix

package exporter

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// checkSpace finds out before the work whether a file of that size fits the disk.
// It leaves the answer to the write where the file system does not say.
func checkSpace(dir string, size int64) error {
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) != nil {
		return nil
	}
	if free := uint64(s.Bavail) * uint64(s.Bsize); uint64(size) > free {
		const gigabyte = 1e9
		return fmt.Errorf("%s: the weights need %.1f GB and %.1f GB are free: packed experts need an eighth of dense float32 ones",
			dir, float64(size)/gigabyte, float64(free)/gigabyte)
	}
	return nil
}
