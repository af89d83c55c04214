package main

import "syscall"

// hugePages asks for large pages, so that the measurement does not wait for the
// processor's tables of pages. It is no error if there are none.
func hugePages(buffer []byte) []byte {
	const adviseHugePages = 14 // MADV_HUGEPAGE of linux/mman.h
	_ = syscall.Madvise(buffer, adviseHugePages)
	return buffer
}
