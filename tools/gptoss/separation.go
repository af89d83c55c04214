package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// separationCommand measures how far the right implementations are from the
// faults, and puts the table into a document.
func separationCommand() *cobra.Command {
	var report, document string
	command := &cobra.Command{
		Use:   "separation --report build/report/report.json [--write conformance/README.md]",
		Short: "Measure how far apart right implementations and faults are, stage by stage",
		Long: `Measure, for every stage, the largest error ÷ bound of any right implementation (as
a report of the suite has it) and the smallest of any fault of the catalogue at its
own tap (measured here). Their quotient is the separation.

With --write the table replaces what stands in a document between the lines
` + separationBegin + ` and ` + separationEnd + `.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			table, err := separationTable(cmd.Context(), report)
			if err != nil {
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), table)
			if document == "" {
				return nil
			}
			return replaceBetween(cmd.Context(), document, table)
		},
	}
	command.Flags().StringVar(&report, "report", "build/report/report.json", "report.json of a run of the suite")
	command.Flags().StringVar(&document, "write", "", "document to put the table into")
	return command
}

// provingGround names the inputs that the faults are tried on.
var provingGround = []struct{ fixture, prompt string }{{"toy", "full"}, {"edge", "short"}}

func separationTable(ctx context.Context, path string) (string, error) {
	report, err := conformance.ReadReport(path)
	if err != nil {
		return "", err
	}
	if report.Verdict != conformance.Pass && report.Verdict != conformance.Partial {
		return "", fmt.Errorf("%s: its verdict is %s; separation is measured on a run in which all implementations are right", path, report.Verdict)
	}
	var ground []conformance.Ground
	for _, g := range provingGround {
		m, err := checkpoint.Open(fixtures.Dir(g.fixture))
		if err != nil {
			return "", err
		}
		defer m.Close()
		tokens, err := fixtures.Tokens(g.fixture, g.prompt)
		if err != nil {
			return "", err
		}
		ground = append(ground, conformance.Ground{Weights: m.Densify(256 << 20), Tokens: tokens})
	}
	var list []conformance.Separation
	for _, p := range []reference.Precision{reference.Float32, reference.BFloat16} {
		part, err := conformance.Separate(ctx, report, ground, p)
		if err != nil {
			return "", err
		}
		list = append(list, part...)
	}
	return conformance.SeparationTable(list), nil
}

// The lines of a document between which the table stands.
const (
	separationBegin = "<!-- separation: begin -->"
	separationEnd   = "<!-- separation: end -->"
)

func replaceBetween(ctx context.Context, path, text string) error {
	document, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(document), separationBegin)
	_, after, ok2 := strings.Cut(rest, separationEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s: it has no lines %s and %s to put the table between", path, separationBegin, separationEnd)
	}
	return atomicfile.Write(ctx, path, []byte(before+separationBegin+"\n\n"+text+"\n"+separationEnd+after))
}
