package conformance

import (
	"fmt"
	"math"
	"strings"
	"unicode/utf8"
)

// Text renders the report for a terminal: the table, and what went wrong.
func (r Report) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "gpt-oss conformance: %s\n%s\n\n", strings.ToUpper(string(r.Verdict)), r.summary())
	b.WriteString("Worst error as a fraction of its bound / cases. At most 1 passes.\n\n")
	align(&b, r.table())
	for i, c := range r.Failures() {
		if i == 0 {
			b.WriteString("\n")
		}
		if i == listedFailures {
			fmt.Fprintf(&b, "... and %d more: %s has them all\n", len(r.Failures())-i, ReportHTML)
			break
		}
		fmt.Fprintf(&b, "%s: %s\n", c.title(), c.explanation())
		if c.Repeat != "" {
			fmt.Fprintf(&b, "    %s\n", c.Repeat)
		}
	}
	if r.Verdict != Pass {
		b.WriteString("\n")
		for i, why := range r.Reasons {
			if i == listedFailures {
				fmt.Fprintf(&b, "... and %d more\n", len(r.Reasons)-i)
				break
			}
			fmt.Fprintf(&b, "not a pass: %s\n", why)
		}
	}
	return b.String()
}

// listedFailures keeps a terminal readable when everything fails.
const listedFailures = 12

// Markdown renders the report for a pull request or a repository page.
func (r Report) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# gpt-oss conformance: %s\n\n%s.\n\n", r.Verdict, r.summary())
	for _, why := range r.Reasons {
		fmt.Fprintf(&b, "- not a pass: %s\n", why)
	}
	if len(r.Reasons) > 0 {
		b.WriteString("\n")
	}
	b.WriteString("Each cell: worst error as a fraction of its bound / cases. At most 1 passes.\n\n")
	pipes(&b, r.table())
	if rows := r.errorTable(); len(rows) > 1 {
		b.WriteString("\n## Absolute differences\n\nThe largest anywhere, from OpenAI's torch model in float64. They decide nothing.\n\n")
		pipes(&b, rows)
	}
	if failures := r.Failures(); len(failures) > 0 {
		b.WriteString("\n## Failures\n")
		for _, c := range failures {
			fmt.Fprintf(&b, "\n### %s\n\n%s\n", c.title(), c.explanation())
			if c.Repeat != "" {
				fmt.Fprintf(&b, "\n    %s\n", c.Repeat)
			}
			if c.Tensors != "" {
				fmt.Fprintf(&b, "\nIts tensors: `%s`\n", c.Tensors)
			}
		}
	}
	b.WriteString("\n## Environment\n\n")
	for _, pair := range r.About.pairs() {
		fmt.Fprintf(&b, "- %s: %s\n", pair[0], pair[1])
	}
	return b.String()
}

// summary is one line: how much was compared.
func (r Report) summary() string {
	comparisons, elements := r.Comparisons()
	return fmt.Sprintf("%s, %s, %s compared element by element (%s) in %s",
		count(len(r.Rows()), "implementation"), count(len(r.Cases), "case"),
		count(comparisons, "tensor"), grouped(elements), duration(r.About.Seconds))
}

func duration(seconds float64) string {
	if seconds < 90 {
		return fmt.Sprintf("%.0f s", seconds)
	}
	return fmt.Sprintf("%.0f min %02.0f s", math.Floor(seconds/60), math.Mod(seconds, 60))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return grouped(n) + " " + what + "s"
}

// grouped writes 1,234,567.
func grouped(n int) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// table has a head and a row for each implementation.
func (r Report) table() [][]string {
	head := append(append([]string{"implementation"}, Stages...), "verdict")
	rows := [][]string{head}
	for _, row := range r.Rows() {
		cells := []string{row.Implementation}
		for _, stage := range Stages {
			cell, seen := row.Cells[stage]
			if !seen {
				cells = append(cells, "-")
				continue
			}
			cells = append(cells, cell.String())
		}
		rows = append(rows, append(cells, string(row.Verdict)))
	}
	return rows
}

// String is a cell's text: 0.31/15 for a pass, and the word for anything else.
func (c Cell) String() string {
	switch c.Verdict {
	case Pass, Partial:
		return fmt.Sprintf("%s/%d", ratioText(c.Ratio), c.Cases)
	case Fail:
		return fmt.Sprintf("FAIL %s/%d", ratioText(c.Ratio), c.Cases)
	case Error:
		return fmt.Sprintf("ERROR /%d", c.Cases)
	}
	return string(c.Verdict)
}

// ratioText is a ratio in as few characters as say something.
func ratioText(ratio float64) string {
	switch {
	case ratio == 0:
		return "0"
	case math.IsNaN(ratio) || math.IsInf(ratio, 0):
		return fmt.Sprint(ratio)
	case ratio < 0.001 || ratio >= 1000:
		return fmt.Sprintf("%.0e", ratio)
	case ratio > 1 && ratio < 1.05:
		return "1.05" // rounding turns no fail into a pass
	case ratio < 1 && ratio > 0.99:
		return "0.99" // nor the other way
	}
	return fmt.Sprintf("%.2g", ratio)
}

// errorTable has a row for each implementation and fixture: the largest
// absolute differences over its prompts.
func (r Report) errorTable() [][]string {
	type key struct{ implementation, fixture string }
	groups := []string{GroupLogits, GroupHiddenStates, GroupBlockDebug}
	worst := map[key]map[string]float64{}
	var order []key
	for _, run := range r.Runs {
		if len(run.Errors) == 0 {
			continue
		}
		k := key{run.Implementation, run.Fixture}
		if worst[k] == nil {
			worst[k] = map[string]float64{}
			order = append(order, k)
		}
		for group, e := range run.Errors {
			worst[k][group] = math.Max(worst[k][group], float64(e)) // NaN is the largest
		}
	}
	rows := [][]string{append([]string{"implementation", "fixture"}, groups...)}
	for _, k := range order {
		row := []string{k.implementation, k.fixture}
		for _, group := range groups {
			text := "-"
			if e, ok := worst[k][group]; ok {
				text = fmt.Sprintf("%.1e", e)
			}
			row = append(row, text)
		}
		rows = append(rows, row)
	}
	return rows
}

// title names a case the way that its test is named.
func (c Case) title() string {
	return strings.Join([]string{c.Stage, c.Fixture, c.Prompt, c.Implementation}, "/")
}

// explanation says what is wrong with a case.
func (c Case) explanation() string {
	var parts []string
	if c.Reason != "" {
		parts = append(parts, c.Reason)
	}
	if worst := c.Worst(); worst != nil && worst.Verdict != Pass {
		parts = append(parts, worst.String())
		failed := 0
		for _, f := range c.Findings {
			if f.Verdict != Pass {
				failed++
			}
		}
		if failed > 1 {
			parts = append(parts, fmt.Sprintf("%d of %d comparisons of this case are not a pass", failed, len(c.Findings)))
		}
	}
	if len(parts) == 0 {
		return string(c.Verdict)
	}
	return strings.Join(parts, "; ")
}

// pairs lists what identifies a run.
func (a About) pairs() [][2]string {
	pairs := [][2]string{
		{"suite", a.Suite}, {"command", "`" + a.Command + "`"}, {"selection", a.Selection},
		{"date", a.Date.UTC().Format("2006-01-02 15:04 MST")}, {"Go", a.Go}, {"platform", a.Platform},
		{"CPU", a.CPU}, {"cores", fmt.Sprint(a.Cores)}, {"ONNX Runtime", a.ONNXRuntime},
	}
	known := pairs[:0]
	for _, pair := range pairs {
		if pair[1] != "" {
			known = append(known, pair)
		}
	}
	return known
}

// align writes rows in columns: the first to the left, the others to the right.
func align(b *strings.Builder, rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i == 0 {
				b.WriteString(cell + pad)
			} else {
				b.WriteString("  " + pad + cell)
			}
		}
		b.WriteString("\n")
	}
}

// pipes writes rows as a markdown table.
func pipes(b *strings.Builder, rows [][]string) {
	for i, row := range rows {
		b.WriteString("| " + strings.Join(row, " | ") + " |\n")
		if i == 0 {
			b.WriteString("|---" + strings.Repeat("|---:", len(row)-1) + "|\n")
		}
	}
}
