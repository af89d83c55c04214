// Command gptoss inspects, runs, exports and judges gpt-oss models. Run it
// without arguments for the list of what it can do.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// commands lists the sub-commands in the order of the help text. Each is made
// by one function in a file of its own name.
func commands() []*cobra.Command {
	return []*cobra.Command{
		inspectCommand(),
		forwardCommand(),
		exportCommand(),
		compareCommand(),
		promoteCommand(),
		judgeCommand(),
		routingCommand(),
		separationCommand(),
		reportCommand(),
		convertCommand(),
		probeCommand(),
		generateCommand(),
		answersCommand(),
		expandCommand(),
		synthesizeCommand(),
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := run(ctx, commands(), os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
