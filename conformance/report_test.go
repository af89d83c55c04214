package conformance_test

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sebdah/goldie/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// sampleReport has a row of every kind: a pass, a fail with NaN, and an
// implementation that only puts out logits.
func sampleReport(t *testing.T) conformance.Report {
	t.Helper()
	r := conformance.NewRecorder()
	for i, stage := range conformance.Stages {
		r.Case(conformance.Case{
			Stage: stage, Implementation: "alpha", Precision: "float32", Fixture: "toy", Prompt: "full", Verdict: conformance.Pass,
			Findings: []conformance.Finding{{
				Tap: "logits", Stage: stage, Method: conformance.Isolated, Verdict: conformance.Pass, Ratio: math.Pow(10, -float64(i)), Of: 1000,
			}},
		})
	}
	r.Case(conformance.Case{
		Stage: "rope", Implementation: "beta", Precision: "bfloat16", Fixture: "toy", Prompt: "full", Verdict: conformance.Fail,
		Reason: "the first tap that is wrong is block_0.q_rot",
		Findings: []conformance.Finding{
			{Tap: "block_0.k_rot", Stage: "rope", Method: conformance.Isolated, Verdict: conformance.Pass, Ratio: 1, Of: 1280},
			{
				Tap: "block_0.q_rot", Stage: "rope", Method: conformance.Isolated, Verdict: conformance.Fail, Ratio: math.Inf(1), Over: 3, Of: 3840,
				Worst: &conformance.Worst{Index: []int{12, 0, 3}, Got: math.NaN(), Want: 0.25, Bound: 1e-6},
			},
		},
		Repeat: "go test -count=1 -run '^TestRope$/^toy$/^full$/^beta$' ./conformance", Tensors: "build/report/failures/beta.toy.full.safetensors",
	})
	r.Case(conformance.Case{
		Stage: "logits", Implementation: "gamma", Fixture: "toy", Prompt: "full", Verdict: conformance.Pass,
		Findings: []conformance.Finding{{Tap: "logits", Stage: "logits", Method: conformance.FreeRunning, Verdict: conformance.Pass, Ratio: 0.31, Of: 10240}},
	})
	r.Case(conformance.Case{Stage: "rope", Implementation: "gamma", Fixture: "toy", Prompt: "full", Verdict: conformance.Unsupported, Reason: "no tap"})
	r.Run(conformance.RunRecord{
		Implementation: "alpha", Fixture: "toy", Prompt: "full", Tokens: 40, Verdict: conformance.Pass,
		Errors: map[string]conformance.Number{"logits": 1.2e-6, "hidden states": 3e-6, "block debug": 4e-6},
	})
	r.Run(conformance.RunRecord{
		Implementation: "beta", Fixture: "toy", Prompt: "full", Tokens: 40, Verdict: conformance.Fail, FirstDivergence: "block_0.q_rot",
		Unexercised: []string{"the sliding window (40 tokens, window 128)"},
		Errors:      map[string]conformance.Number{"logits": conformance.Number(math.NaN()), "hidden states": 3e-2},
	})
	report := r.Report(conformance.About{
		Suite: "v1.0.0", Command: "go test ./conformance", Date: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Go: "go1.26.0", Platform: "linux/amd64", CPU: "A Processor", Cores: 4, ONNXRuntime: "1.32.0",
	})
	report.About.Seconds = 61
	return report
}

func TestReportText(t *testing.T) {
	report := sampleReport(t)
	golden := goldie.New(t, goldie.WithFixtureDir("testdata"), goldie.WithNameSuffix(""))
	golden.Assert(t, "report.txt", []byte(report.Text()))
	golden.Assert(t, "report.md", []byte(report.Markdown()))
	page, err := report.HTML()
	require.NoError(t, err)
	golden.Assert(t, "report.html", page)
}

func TestReportSurvivesJSON(t *testing.T) {
	report := sampleReport(t)
	dir := filepath.Join(t.TempDir(), "report")
	require.NoError(t, report.Write(t.Context(), dir))
	again, err := conformance.ReadReport(filepath.Join(dir, conformance.ReportJSON))
	require.NoError(t, err)
	// NaN differs from itself: compare what both print.
	assert.Equal(t, report.Text(), again.Text())
	assert.Equal(t, report.Markdown(), again.Markdown())
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, entries, 3, "nothing else is left behind")
}

func TestReadReportRefusesOtherFiles(t *testing.T) {
	for name, text := range map[string]string{"no verdict": `{}`, "another word": `{"verdict":"great"}`, "no JSON": `pass`} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "report.json")
			require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
			_, err := conformance.ReadReport(path)
			assert.ErrorContains(t, err, path)
		})
	}
	_, err := conformance.ReadReport(filepath.Join(t.TempDir(), "report.json"))
	assert.ErrorContains(t, err, "make conformance")
}

// every gives one implementation a case with one verdict in each stage.
func every(word conformance.Word) []conformance.Case {
	var cases []conformance.Case
	for _, stage := range conformance.Stages {
		cases = append(cases, conformance.Case{Stage: stage, Implementation: "it", Fixture: "toy", Prompt: "full", Verdict: word})
	}
	return cases
}

func TestReportVerdict(t *testing.T) {
	with := func(stage string, word conformance.Word) []conformance.Case {
		cases := every(conformance.Pass)
		for i := range cases {
			if cases[i].Stage == stage {
				cases[i].Verdict = word
			}
		}
		return cases
	}
	onlyShort := []conformance.RunRecord{{Implementation: "it", Prompt: "one", Unexercised: []string{"the window (1 token)"}}}
	both := append(onlyShort, conformance.RunRecord{Implementation: "it", Prompt: "full"})
	for _, test := range []struct {
		name      string
		cases     []conformance.Case
		runs      []conformance.RunRecord
		selection string
		want      conformance.Word
	}{
		{name: "everything passes", cases: every(conformance.Pass), want: conformance.Pass},
		{name: "nothing ran", want: conformance.Error},
		{name: "one stage did not run", cases: every(conformance.Pass)[1:], want: conformance.Partial},
		{name: "one case fails", cases: with("rope", conformance.Fail), want: conformance.Fail},
		{name: "an engine broke", cases: with("rope", conformance.Error), want: conformance.Error},
		{name: "a stage is unsupported", cases: with("rope", conformance.Unsupported), want: conformance.Partial},
		{name: "a stage was skipped", cases: with("rope", conformance.Skipped), want: conformance.Partial},
		{name: "no KV cache", cases: with("generation", conformance.Unsupported), want: conformance.Pass},
		{name: "only some tests ran", cases: every(conformance.Pass), selection: "TestRope", want: conformance.Partial},
		{name: "a short prompt alone", cases: every(conformance.Pass), runs: onlyShort, want: conformance.Partial},
		{name: "a short prompt and a long one", cases: every(conformance.Pass), runs: both, want: conformance.Pass},
		{name: "a run fails in no stage", cases: every(conformance.Pass), runs: []conformance.RunRecord{{Implementation: "it", Verdict: conformance.Fail}}, want: conformance.Fail},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := conformance.NewRecorder()
			for _, c := range test.cases {
				r.Case(c)
			}
			for _, run := range test.runs {
				r.Run(run)
			}
			report := r.Report(conformance.About{Selection: test.selection})
			assert.Equal(t, test.want, report.Verdict, report.Reasons)
			if test.want != conformance.Pass {
				assert.NotEmpty(t, report.Reasons)
			}
		})
	}
}

func TestFindingJSONKeepsEveryField(t *testing.T) {
	f := conformance.Finding{
		Tap: "logits", Stage: "logits", Method: conformance.Span, From: []string{"final_norm"}, Verdict: conformance.Fail,
		Ratio: math.Inf(1), Over: 2, Of: 3, Reason: "why", Worst: &conformance.Worst{Index: []int{1}, Got: math.Inf(-1), Want: 1, Bound: 0.5},
	}
	text, err := json.Marshal(f)
	require.NoError(t, err)
	var again conformance.Finding
	require.NoError(t, json.Unmarshal(text, &again))
	assert.Equal(t, f, again)
}
