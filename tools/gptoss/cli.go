package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// Exit statuses. A shell script can tell a verdict from a mistake: 1 means
// that the work was done and its result is "fail".
const (
	exitPass        = 0
	exitFail        = 1
	exitInput       = 2   // bad usage or bad input; nothing was written
	exitInterrupted = 130 // 128 + SIGINT, as shells have it
)

// statusError is an error with an exit status of its own. See [verdictError].
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

// verdictError makes the command exit with status 1 and say one line on
// stderr: the work was done, and the answer is no.
func verdictError(format string, arguments ...any) error {
	return &statusError{exitFail, fmt.Errorf(format, arguments...)}
}

// run executes the command line and returns the exit status. It is main
// without the process, so that tests can call it.
//
// Every error is one line on stderr that starts with "gptoss: ". Its status is
// 2 unless the command returned a [verdictError], or the context was cancelled
// by Ctrl-C.
func run(ctx context.Context, commands []*cobra.Command, arguments []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:           "gptoss",
		Short:         "Inspect, run, export and judge gpt-oss models",
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(commands...)
	root.SetArgs(arguments)
	root.SetOut(stdout)
	root.SetErr(stderr)

	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitPass
	}
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		fmt.Fprintln(stderr, "gptoss: interrupted")
		return exitInterrupted
	}
	fmt.Fprintf(stderr, "gptoss: %s\n", oneLine(err.Error()))
	var withStatus *statusError
	if errors.As(err, &withStatus) {
		return withStatus.status
	}
	return exitInput
}

// checkpointFlags gives a command the flags that say how its checkpoint is
// opened; [openCheckpoint] takes what they hold.
func checkpointFlags(command *cobra.Command) *checkpoint.Options {
	var o checkpoint.Options
	command.Flags().StringVar(&o.Config, "config", "", "config.json, or its directory, instead of the configuration beside the weights")
	command.Flags().BoolVar(&o.UndoGateBias, "undo-gate-bias", false, "restore the gate bias that jax2onnx's Equinox loader changes")
	return &o
}

// openCheckpoint opens a checkpoint and passes its notes on to stderr.
func openCheckpoint(stderr io.Writer, path string, o *checkpoint.Options) (*checkpoint.Model, error) {
	model, err := checkpoint.OpenWith(path, checkpoint.Options{Config: configFile(o.Config), UndoGateBias: o.UndoGateBias})
	if err != nil {
		return nil, err
	}
	for _, note := range model.Notes {
		fmt.Fprintf(stderr, "gptoss: note: %s\n", note)
	}
	return model, nil
}

// configFile is the file that --config means: a directory stands for its
// config.json.
func configFile(path string) string {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return filepath.Join(path, fixtures.ConfigFile)
	}
	return path
}

// release closes what holds nothing but memory, unless the command is being
// interrupted: the end of the process gives gigabytes back faster.
func release(ctx context.Context, c io.Closer) {
	if ctx.Err() == nil {
		c.Close()
	}
}

// oneLine joins the lines of a message, because some libraries' errors have
// several (cobra's suggestions among them).
func oneLine(message string) string {
	var parts []string
	for line := range strings.Lines(message) {
		if line = strings.TrimSpace(line); line != "" {
			parts = append(parts, line)
		}
	}
	return strings.Join(parts, " ")
}
