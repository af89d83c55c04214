package conformance_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/onnxruntime"
	"github.com/gptoss-conformance/gptoss/conformance/backends/recorded"
	backend "github.com/gptoss-conformance/gptoss/conformance/backends/reference"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
)

// reportDir is where a run of this package's tests leaves its report.
var reportDir = filepath.Join("..", "build", "report")

var (
	recorder = conformance.NewRecorder()
	// suite judges everything that this repository can run on its own. The tests
	// of all stages share it, so that every whole run is made once.
	suite = conformance.NewSuite(conformance.Options{
		Recorder: recorder,
		Failures: filepath.Join(reportDir, "failures"),

		Select:            inDefaultTier,
		WithoutHypotheses: true, // the faults' own test weighs them
	}, implementations()...)
)

// implementations lists what is judged in the default tier: the reference in
// each arithmetic, what the real implementations put out when the goldens were
// made, and ONNX graphs that are exported on the spot.
func implementations() []conformance.Implementation {
	list := []conformance.Implementation{
		backend.New(reference.Float64),
		backend.New(reference.Float32),
		backend.New(reference.BFloat16),
	}
	for _, name := range []string{"torch", "transformers"} {
		list = append(list, recorded.Golden(name, reference.Float32), recorded.Golden(name, reference.BFloat16))
	}
	for _, name := range []string{"flax.corrected", "equinox.corrected"} {
		list = append(list, recorded.Golden(name, reference.Float32))
	}
	for _, experts := range []exporter.Experts{exporter.ExpertsPacked, exporter.ExpertsDense} {
		for _, level := range onnxruntime.Levels {
			list = append(list, graph(experts, level))
		}
		list = append(list, staticGraph{graph(experts, onnxruntime.OptimizeAll), experts})
	}
	return append(list,
		onnxruntime.New("onnxruntime-packed-cache", exporter.Options{KVCache: true}, onnxruntime.Options{Threads: 1}),
		onnxruntime.New("onnxruntime-own-operators", exporter.Options{Operators: exporter.OperatorsONNXRuntime}, onnxruntime.Options{Threads: 1}))
}

// graph exports with dynamic length and runs at one level of ONNX Runtime's own
// optimization. One thread: the suite runs several cases side by side.
func graph(experts exporter.Experts, level string) conformance.Implementation {
	return onnxruntime.New(fmt.Sprintf("onnxruntime-%s-%s", experts, level),
		exporter.Options{Experts: experts}, onnxruntime.Options{GraphOptimization: level, Threads: 1})
}

// staticGraph exports with the length of a fixture's longest prompt.
type staticGraph struct {
	conformance.Implementation
	experts exporter.Experts
}

func (s staticGraph) Name() string { return fmt.Sprintf("onnxruntime-%s-static", s.experts) }

func (s staticGraph) Open(ctx context.Context, dir string) (conformance.Instance, error) {
	prompts, err := fixtures.Prompts(filepath.Base(dir))
	if err != nil {
		return nil, err
	}
	longest := 0
	for _, p := range prompts {
		longest = max(longest, len(p.Tokens))
	}
	return onnxruntime.New(s.Name(), exporter.Options{Experts: s.experts, SequenceLength: longest},
		onnxruntime.Options{Threads: 1}).Open(ctx, dir)
}

// inDefaultTier keeps the default tier short. toy runs every prompt on
// everything. Of the others' prompts, those that add nothing to what toy shows
// are left out, and of the ONNX graphs, only those with the runtime's default
// optimization run them.
func inDefaultTier(i conformance.Implementation, fixture, prompt string) bool {
	switch {
	case fixture == "toy":
		return true
	case strings.HasPrefix(i.Name(), "onnxruntime") && !strings.HasSuffix(i.Name(), onnxruntime.OptimizeAll):
		return fixture == "edge" && prompt == "short"
	case fixture == "toy128" && strings.HasPrefix(i.Name(), "onnxruntime"):
		return prompt == "one" || prompt == "full"
	case fixture == "toy128":
		return prompt == "one" || prompt == "window+1" || prompt == "full"
	}
	return true
}

func TestMain(m *testing.M) {
	flag.Parse()
	// The judge makes and drops many small arrays; memory is cheaper than the time
	// to collect them so often.
	debug.SetGCPercent(400)
	// Nothing of an earlier run may pass for this one's.
	if err := os.RemoveAll(reportDir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	status := m.Run()
	if err := finish(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		status = max(status, 1)
	}
	os.Exit(status)
}

// minimumCases is what every implementation must have had of every stage but
// generation: the prompts of toy that the recordings cover.
const minimumCases = 5

// finish writes the report. When all tests ran, it must say pass, and nothing
// may be missing from it.
func finish() error {
	closed := suite.Close()
	if flag.Lookup("test.list").Value.String() != "" {
		return closed
	}
	report := recorder.Report(about())
	problems := []error{closed, report.Write(context.Background(), reportDir)}
	if report.About.Selection != "" {
		return errors.Join(problems...)
	}
	if report.Verdict != conformance.Pass {
		problems = append(problems, fmt.Errorf("the report's verdict is %s: %s", report.Verdict, strings.Join(report.Reasons, "; ")))
	}
	rows := report.Rows()
	if len(rows) != len(implementations()) {
		problems = append(problems, fmt.Errorf("%d implementations were judged, of %d", len(rows), len(implementations())))
	}
	for _, row := range rows {
		for _, stage := range conformance.Stages {
			if n := row.Cells[stage].Cases; n < minimumCases && stage != conformance.StageGeneration {
				problems = append(problems, fmt.Errorf("%s had %d cases of %s, fewer than %d", row.Implementation, n, stage, minimumCases))
			}
		}
	}
	return errors.Join(problems...)
}

func about() conformance.About {
	return conformance.About{
		Suite:       firstLine("git", "describe", "--always", "--dirty", "--tags"),
		Command:     "go test ./conformance",
		Selection:   selection(),
		Date:        time.Now().UTC(),
		Go:          runtime.Version(),
		Platform:    runtime.GOOS + "/" + runtime.GOARCH,
		CPU:         cpu(),
		Cores:       runtime.NumCPU(),
		ONNXRuntime: onnxRuntimeVersion(),
	}
}

func onnxRuntimeVersion() string {
	version, err := onnxruntime.Version()
	if err != nil {
		return "missing"
	}
	return version
}

// selection says which tests were asked for; empty means all.
func selection() string {
	selected := flag.Lookup("test.run").Value.String()
	if skipped := flag.Lookup("test.skip").Value.String(); skipped != "" {
		selected = strings.TrimSpace(selected + " (without " + skipped + ")")
	}
	return selected
}

// firstLine is a program's output, or "unknown": a report without it is still one.
func firstLine(program string, arguments ...string) string {
	output, err := exec.Command(program, arguments...).Output()
	line, _, _ := strings.Cut(strings.TrimSpace(string(output)), "\n")
	if err != nil || line == "" {
		return "unknown"
	}
	return line
}

// cpu is the processor's name as Linux has it, or empty.
func cpu() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
