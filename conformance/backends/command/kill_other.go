//go:build !unix

package command

import "os/exec"

// killGroup leaves it at killing the program itself, which is the default.
func killGroup(*exec.Cmd) {}
