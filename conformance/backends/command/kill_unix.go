//go:build unix

package command

import (
	"os/exec"
	"syscall"
)

// killGroup makes cancelling end the program and everything that it started,
// which share a process group.
func killGroup(command *exec.Cmd) {
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
}
