//go:build !amd64

package main

// available lists the instruction sets that have assembly here: none.
func available() []loops { return nil }
