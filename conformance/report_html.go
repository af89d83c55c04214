package conformance

import (
	"bytes"
	_ "embed"
	"html/template"
	"math"
)

//go:embed report.html.tmpl
var pageSource string

var page = template.Must(template.New("report").Funcs(template.FuncMap{
	"ratio":   ratioText,
	"bar":     barWidth,
	"grouped": grouped,
	"stages":  func() []string { return Stages },
}).Parse(pageSource))

// HTML renders the report as one page without scripts or outside resources.
func (r Report) HTML() ([]byte, error) {
	type listed struct {
		Case
		Title, Explanation string
	}
	var failures []listed
	for _, c := range r.Failures() {
		failures = append(failures, listed{c, c.title(), c.explanation()})
	}
	errors := r.errorTable()
	var b bytes.Buffer
	err := page.Execute(&b, map[string]any{
		"Report": r, "Summary": r.summary(), "Rows": r.Rows(), "Failures": failures,
		"ErrorHead": errors[0], "Errors": errors[1:], "About": r.About.pairs(),
	})
	return b.Bytes(), err
}

// barWidth is the share of a cell, in percent, that its bar takes: the ratio on
// a logarithmic scale from 0.001 to 1.
func barWidth(ratio float64) float64 {
	if math.IsNaN(ratio) {
		return 100
	}
	if ratio <= 0 {
		return 0
	}
	return min(max(100*(1+math.Log10(ratio)/3), 0), 100)
}
