package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference/tensor/atomicfile"
)

// routingCommand reports how a subject's choice of experts compares with the
// float64 truth, layer by layer and flip by flip.
func routingCommand() *cobra.Command {
	var subject subjectFlags
	var output string
	command := &cobra.Command{
		Use:   "routing --checkpoint PATH --tokens IDS (--tensors FILE | --onnx M.onnx) --precision P",
		Short: "Report which tokens went to other experts, and whether rounding explains it",
		Long: `Report, layer by layer, how often a subject chose the experts that the float64
truth chooses, and say for every token that went elsewhere why that is allowed or
not. The subject needs the tap mlp_expert_indices; with mlp_normed or
mlp_gate_logits beside it the margins are sharp.

The exit status is 0 if every difference is explained, 1 if not, 2 for an error.`,
		Example: `  gptoss routing --checkpoint fixtures/toy --tokens ids.json --tensors mine.safetensors --precision bfloat16 --output routing.md`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, m, err := subject.judge(cmd, conformance.JudgeOptions{Catalogue: []faults.Fault{}})
			if m != nil {
				defer m.Close()
			}
			if err != nil {
				return err
			}
			if len(v.Routing) == 0 {
				if v.Word == conformance.Fail {
					return verdictError("%s fails: %s", subject.name(), v.Reason)
				}
				return fmt.Errorf("%s: it has no tensor block_N.mlp_expert_indices, so there is no routing to report", subject.name())
			}
			report := routingReport(subject, v)
			if output == "" {
				_, err = io.WriteString(cmd.OutOrStdout(), report)
			} else {
				err = atomicfile.Write(cmd.Context(), output, []byte(report))
			}
			if err != nil {
				return err
			}
			if n := unexplained(v); n > 0 {
				return verdictError("%d tokens went to other experts than rounding explains", n)
			}
			return nil
		},
	}
	subject.register(command)
	command.Flags().StringVar(&output, "output", "", "write the report to this file instead of standard output")
	return command
}

func unexplained(v *conformance.Verdict) int {
	n := 0
	for _, layer := range v.Routing {
		n += layer.Unexplained
	}
	return n
}

// routingReport is the report as markdown.
func routingReport(subject subjectFlags, v *conformance.Verdict) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Routing of %s\n\n", subject.name())
	fmt.Fprintf(&b, "Checkpoint %s, arithmetic %s, against float64.\n\n", subject.checkpoint, subject.precision)
	b.WriteString("| layer | tokens | same experts | explained | unexplained | smallest margin | largest weight difference |\n")
	b.WriteString("|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, l := range v.Routing {
		fmt.Fprintf(&b, "| %d | %d | %.1f %% | %d | %d | %.3g | %s |\n", l.Layer, l.Tokens,
			100*float64(l.Matched)/float64(l.Tokens), l.Explained, l.Unexplained, l.MinMargin, orDash(l.WeightDelta))
	}
	b.WriteString("\nThe margin is between the lowest gate logit chosen and the highest passed over, in the truth; the weight difference is over the tokens that went to the same experts.\n")
	if !anyFlips(v) {
		b.WriteString("\nEvery token went to the truth's experts.\n")
		return b.String()
	}
	b.WriteString("\n## Tokens that went elsewhere\n\n")
	b.WriteString("| layer | token | chosen | passed over | margin | allowed | verdict | why |\n")
	b.WriteString("|---:|---:|---:|---:|---:|---:|---|---|\n")
	for _, l := range v.Routing {
		for _, f := range l.Flips {
			verdict := "explained"
			if !f.Explained {
				verdict = "**fault**"
			}
			fmt.Fprintf(&b, "| %d | %d | %d | %d | %.3g | %.3g | %s | %s |\n", l.Layer, f.Token, f.Chosen, f.PassedOver, f.Margin, f.Allowed, verdict, f.Why)
		}
	}
	b.WriteString("\nThe margin here is that of the subject's own input to the router, in float64; what is allowed is how far the two logits may be off together in its arithmetic.\n")
	return b.String()
}

func anyFlips(v *conformance.Verdict) bool {
	for _, l := range v.Routing {
		if len(l.Flips) > 0 {
			return true
		}
	}
	return false
}

func orDash(x float64) string {
	if x == 0 {
		return "–"
	}
	return fmt.Sprintf("%.3g", x)
}
