//go:build !unix

package exporter

// checkSpace leaves the answer to the write.
func checkSpace(string, int64) error { return nil }
