package main

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
)

// returning makes a sub-command "do" whose work ends with an error.
func returning(err error) []*cobra.Command {
	return []*cobra.Command{{
		Use:  "do",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return err },
	}}
}

func TestRunExitStatus(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, test := range []struct {
		name      string
		ctx       context.Context
		err       error
		arguments []string
		status    int
		stderr    string
	}{
		{"success", t.Context(), nil, []string{"do"}, 0, ""},
		{"bad input", t.Context(), errors.New("a.bin: too short"), []string{"do"}, 2, "gptoss: a.bin: too short\n"},
		{"several lines", t.Context(), errors.New("one\n\n  two\n"), []string{"do"}, 2, "gptoss: one two\n"},
		{"verdict", t.Context(), verdictError("%d of 3 stages fail", 2), []string{"do"}, 1, "gptoss: 2 of 3 stages fail\n"},
		{"interrupted", cancelled, context.Canceled, []string{"do"}, 130, "gptoss: interrupted\n"},
		{"unknown flag", t.Context(), nil, []string{"do", "--nope"}, 2, "gptoss: unknown flag: --nope\n"},
		{"unknown command", t.Context(), nil, []string{"nope"}, 2, "gptoss: unknown command \"nope\" for \"gptoss\"\n"},
		{"surplus argument", t.Context(), nil, []string{"do", "x"}, 2, "gptoss: unknown command \"x\" for \"gptoss do\"\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			status := run(test.ctx, returning(test.err), test.arguments, &stdout, &stderr)
			assert.Equal(t, test.status, status)
			assert.Equal(t, test.stderr, stderr.String())
		})
	}
}

func TestRunWithoutArgumentsShowsHelp(t *testing.T) {
	var stdout, stderr bytes.Buffer
	assert.Equal(t, 0, run(t.Context(), commands(), nil, &stdout, &stderr))
	assert.Contains(t, stdout.String(), "inspect")
	assert.Empty(t, stderr.String())
}
