package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/fixtures"
)

// expandCommand writes a trained fixture as a usual checkpoint.
func expandCommand() *cobra.Command {
	var from, output string
	command := &cobra.Command{
		Use:   "expand --from DIR --output DIR",
		Short: "Write a trained fixture with all rows of its vocabulary",
		Long: `Write a trained fixture (fixtures/capitals, fixtures/canary) as a usual checkpoint
in OpenAI's layout. The committed one stores only the rows of the vocabulary that
it was trained on; other programs want all of them.`,
		Example: "  gptoss expand --from fixtures/canary --output canary",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if entries, err := os.ReadDir(output); err == nil && len(entries) > 0 {
				return fmt.Errorf("--output: %s is there already, and not empty", output)
			} else if err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("--output: %w", err)
			}
			if err := fixtures.Expand(cmd.Context(), from, output); err != nil {
				return err
			}
			_, err := io.WriteString(cmd.OutOrStdout(), filepath.Join(output, fixtures.WeightsFile)+"\n")
			return err
		},
	}
	flags := command.Flags()
	flags.StringVar(&from, "from", "", "checkpoint with the used rows only")
	flags.StringVar(&output, "output", "", "directory to write")
	for _, name := range []string{"from", "output"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was defined above
		}
	}
	return command
}
