package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// inspectCommand shows what a checkpoint is.
func inspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect PATH",
		Short: "Show a checkpoint's layout, configuration, tensors and digest",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, arguments []string) error {
			return errors.New("inspect is not there yet")
		},
	}
}
