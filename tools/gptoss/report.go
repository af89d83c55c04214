package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// reportCommand prints a report of the suite.
func reportCommand() *cobra.Command {
	var markdown bool
	command := &cobra.Command{
		Use:   "report build/report/report.json",
		Short: "Print what a run of the suite found",
		Long: `Print what a run of the suite found: the table of stages and implementations,
and what went wrong.

The exit status is 0 for pass and partial, 1 for fail, 2 for error.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, arguments []string) error {
			report, err := conformance.ReadReport(arguments[0])
			if err != nil {
				return err
			}
			text := report.Text()
			if markdown {
				text = report.Markdown()
			}
			if _, err := fmt.Fprint(cmd.OutOrStdout(), text); err != nil {
				return err
			}
			switch report.Verdict {
			case conformance.Pass, conformance.Partial:
				return nil
			case conformance.Fail:
				return verdictError("the suite's verdict is fail")
			}
			return fmt.Errorf("the suite's verdict is %s", report.Verdict)
		},
	}
	command.Flags().BoolVar(&markdown, "markdown", false, "print markdown")
	return command
}
