package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Options select what the suite runs and where its findings go. The zero value
// runs everything and keeps nothing.
type Options struct {
	// Select says which prompts of which fixtures an implementation runs; nil
	// means all.
	Select func(implementation Implementation, fixture, prompt string) bool
	// Skip lists stages that the user does not want: they are reported as
	// skipped, which is not a pass.
	Skip     []string
	Recorder *Recorder // collects the findings for a report; may be nil
	// Failures is the directory that the tensors of a failing run are kept in,
	// as safetensors. Empty: they are not kept.
	Failures string
	// WithoutHypotheses judges logits by their budget only, without weighing them
	// against every fault of the catalogue where the other taps leave room for one,
	// which takes most of the time.
	// Failures are diagnosed all the same.
	WithoutHypotheses bool
	Judge             JudgeOptions
}

// Run judges an implementation: every stage on every prompt of every fixture and,
// as far as it has the abilities, on the golden stage cases and in decoding. Each
// case is a sub-test of t.
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, myengine.New(), conformance.Options{})
//	}
func Run(t *testing.T, implementation Implementation, o Options) {
	t.Helper()
	s := NewSuite(o, implementation)
	defer s.Close()
	for _, stage := range Stages {
		t.Run(stage, func(t *testing.T) {
			s.Stage(t, stage)
			switch stage {
			case StageEmbedding: // a lookup: the fixtures show all that there is
			case StageGeneration:
				s.Generated(t)
			default:
				s.Injected(t, stage)
			}
		})
	}
}

// Suite judges several implementations. A run of the whole model is made once
// and serves the tests of all stages.
type Suite struct {
	options         Options
	implementations []Implementation
	ctx             context.Context
	cancel          context.CancelFunc

	goldens   goldenRuns
	mutex     sync.Mutex
	models    map[string]*remembered[*checkpoint.Model] // by fixture
	instances map[instanceKey]*opened
	runs      map[runKey]*judged
}

type instanceKey struct{ implementation, fixture string }

type runKey struct{ implementation, fixture, prompt string }

// NewSuite prepares a suite. Nothing is opened before it is needed.
func NewSuite(o Options, implementations ...Implementation) *Suite {
	ctx, cancel := context.WithCancel(context.Background())
	if o.Judge.Memory == nil {
		o.Judge.Memory = new(Memory)
	}
	return &Suite{
		options: o, implementations: implementations, ctx: ctx, cancel: cancel,
		instances: map[instanceKey]*opened{}, runs: map[runKey]*judged{},
	}
}

// Close releases everything that the suite opened.
func (s *Suite) Close() error {
	s.cancel()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	var failures []error
	for _, o := range s.instances {
		failures = append(failures, o.close())
	}
	for _, m := range s.models {
		if m.value != nil {
			failures = append(failures, m.value.Close())
		}
	}
	s.instances, s.models = nil, nil
	return errors.Join(failures...)
}

// input is one prompt of one fixture.
type input struct {
	fixture string
	prompt  fixtures.Prompt
}

// inputs lists the prompts that any implementation runs. None at all is an error:
// an empty corpus proves nothing.
func (s *Suite) inputs() ([]input, error) {
	var all []input
	for _, fixture := range fixtures.Generated {
		prompts, err := fixtures.Prompts(fixture.Name)
		if err != nil {
			return nil, err
		}
		for _, p := range prompts {
			in := input{fixture.Name, p}
			if slices.ContainsFunc(s.implementations, func(i Implementation) bool { return s.selected(i, in) }) {
				all = append(all, in)
			}
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no prompt of any fixture is selected: nothing would be judged")
	}
	return all, nil
}

func (s *Suite) selected(i Implementation, in input) bool {
	return s.options.Select == nil || s.options.Select(i, in.fixture, in.prompt.Name)
}

// Stage judges one stage of every implementation, as sub-tests fixture/prompt/
// implementation.
func (s *Suite) Stage(t *testing.T, stage string) {
	t.Helper()
	inputs, err := s.inputs()
	if err != nil {
		t.Fatal(err)
	}
	judge := s.stageCase
	if stage == StageGeneration {
		judge = s.generationCase
	}
	for group := range groups(inputs) {
		t.Run(group[0].fixture, func(t *testing.T) {
			for _, in := range group {
				t.Run(in.prompt.Name, func(t *testing.T) {
					for _, implementation := range s.implementations {
						if !s.selected(implementation, in) {
							continue
						}
						t.Run(implementation.Name(), func(t *testing.T) {
							t.Parallel()
							s.conclude(t, judge(implementation, in, stage))
						})
					}
				})
			}
		})
	}
}

// groups splits inputs by fixture.
func groups(inputs []input) func(yield func([]input) bool) {
	return func(yield func([]input) bool) {
		for len(inputs) > 0 {
			n := slices.IndexFunc(inputs, func(in input) bool { return in.fixture != inputs[0].fixture })
			if n < 0 {
				n = len(inputs)
			}
			if !yield(inputs[:n]) {
				return
			}
			inputs = inputs[n:]
		}
	}
}

// conclude records a case and turns it into the result of a test. A case that
// was skipped or is unsupported is a skipped test, never a passed one.
func (s *Suite) conclude(t *testing.T, c Case) {
	t.Helper()
	if c.Verdict == Fail || c.Verdict == Error {
		c.Repeat = repeatCommand(t.Name())
	}
	s.options.Recorder.Case(c)
	switch c.Verdict {
	case Pass:
	case Skipped, Unsupported:
		t.Skipf("%s: %s", c.Verdict, c.Reason)
	default:
		t.Error(c.failureText())
	}
}

// failureText is what a failing test prints: every comparison that is not a
// pass, and how to see it again.
func (c Case) failureText() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s of %s in %s, fixture %s, prompt %s\n", c.Verdict, c.Stage, c.Implementation, c.Precision, c.Fixture, c.Prompt)
	if c.Reason != "" {
		fmt.Fprintf(&b, "  %s\n", c.Reason)
	}
	for _, f := range c.Findings {
		if f.Verdict != Pass {
			fmt.Fprintf(&b, "  %s\n", f)
		}
	}
	if c.Tensors != "" {
		fmt.Fprintf(&b, "its tensors: %s\n", c.Tensors)
	}
	fmt.Fprintf(&b, "run only this: %s", c.Repeat)
	return b.String()
}

// stageCase takes one stage's findings out of a whole run.
func (s *Suite) stageCase(implementation Implementation, in input, stage string) Case {
	c := Case{
		Stage: stage, Implementation: implementation.Name(), Precision: implementation.Precision(),
		Fixture: in.fixture, Prompt: in.prompt.Name, Verdict: Pass,
	}
	if slices.Contains(s.options.Skip, stage) {
		c.Verdict, c.Reason = Skipped, "as the options ask"
		return c
	}
	run := s.run(implementation, in)
	if run.err != nil {
		c.Verdict, c.Reason = wordFor(run.err), run.err.Error()
		return c
	}
	for _, f := range run.findings {
		if f.Stage == stage {
			c.Findings = append(c.Findings, f)
			c.Verdict = Worse(c.Verdict, f.Verdict)
		}
	}
	if len(c.Findings) == 0 {
		c.Verdict, c.Reason = Unsupported, "the implementation puts out no tap of this stage"
	}
	if c.Verdict == Fail {
		c.Reason, c.Tensors = run.reason, run.tensors
	}
	return c
}

// wordFor says what an implementation's error means.
func wordFor(err error) Word {
	if errors.Is(err, errors.ErrUnsupported) {
		return Unsupported
	}
	return Error
}

// opened is an implementation with a fixture in it, and the fixture for the
// judge, which all implementations share.
type opened struct {
	once     sync.Once
	mutex    sync.Mutex // an instance does one thing at a time
	instance Instance
	model    *checkpoint.Model
	err      error
}

func (o *opened) close() error {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	var failures []error
	if o.instance != nil {
		failures = append(failures, o.instance.Close())
	}
	return errors.Join(failures...)
}

// open returns an implementation's instance for a fixture, opened once.
func (s *Suite) open(implementation Implementation, fixture string) *opened {
	s.mutex.Lock()
	key := instanceKey{implementation.Name(), fixture}
	o := s.instances[key]
	if o == nil {
		o = new(opened)
		s.instances[key] = o
	}
	s.mutex.Unlock()
	o.once.Do(func() {
		o.model, o.err = entry(&s.mutex, &s.models, fixture).get(func() (*checkpoint.Model, error) {
			return checkpoint.Open(fixtures.Dir(fixture))
		})
		if o.err == nil {
			o.instance, o.err = implementation.Open(s.ctx, fixtures.Dir(fixture))
		}
	})
	return o
}

// judged is a whole run with its verdict.
type judged struct {
	once     sync.Once
	findings []Finding
	reason   string // if it fails: what went wrong first, and why
	tensors  string // if it fails: where they are
	err      error
}

// run runs an implementation on a prompt and judges it, once.
func (s *Suite) run(implementation Implementation, in input) *judged {
	s.mutex.Lock()
	key := runKey{implementation.Name(), in.fixture, in.prompt.Name}
	j := s.runs[key]
	if j == nil {
		j = new(judged)
		s.runs[key] = j
	}
	s.mutex.Unlock()
	j.once.Do(func() { s.judge(j, implementation, in) })
	return j
}

// judge fills j in.
func (s *Suite) judge(j *judged, implementation Implementation, in input) {
	record := RunRecord{
		Implementation: implementation.Name(), Fixture: in.fixture, Prompt: in.prompt.Name, Tokens: len(in.prompt.Tokens),
	}
	defer func() {
		if j.err != nil {
			record.Verdict, record.Reason = wordFor(j.err), j.err.Error()
		}
		s.options.Recorder.Run(record)
	}()
	o := s.open(implementation, in.fixture)
	if o.err != nil {
		j.err = o.err
		return
	}
	results, err := o.forward(s.ctx, in.prompt.Tokens)
	if err != nil {
		j.err = err
		return
	}
	truth, err := s.goldens.truthOf(o.model.Config, in.fixture, in.prompt)
	if err != nil {
		j.err = err
		return
	}
	v, err := s.verdict(o.model, in, Subject{Precision: implementation.Precision(), Taps: results})
	if err != nil {
		j.err = err
		return
	}
	exact, err := truth.findings(implementation.Precision(), results)
	if err != nil {
		j.err = err
		return
	}
	j.findings = append(v.Findings, exact...)
	record.Verdict, record.Reason = v.Word, v.Reason
	record.FirstDivergence, record.Unexercised = v.FirstDivergence, v.Unexercised
	for _, f := range j.findings {
		record.Verdict = Worse(record.Verdict, f.Verdict)
	}
	if record.Errors, j.err = truth.errors(results); j.err != nil {
		return
	}
	if record.Verdict == Fail {
		j.reason = v.why()
		j.tensors, j.err = s.keep(o.model, in, implementation.Name(), results)
	}
}

// verdict judges a subject. Without hypotheses, the catalogue of faults is only
// asked about a failure.
func (s *Suite) verdict(m *checkpoint.Model, in input, subject Subject) (*Verdict, error) {
	tokens := in.prompt.Tokens
	thorough := s.options.Judge
	if thorough.Budget == nil && in.prompt.Name == calibratedPrompt {
		var err error
		if thorough.Budget, err = FixtureBudget(in.fixture, subject.Precision); err != nil {
			return nil, err
		}
	}
	quick := thorough
	if s.options.WithoutHypotheses {
		quick.Catalogue = []faults.Fault{}
	}
	v, err := Judge(s.ctx, m, tokens, subject, quick)
	if err != nil || v.Word != Fail || quick.Catalogue == nil {
		return v, err
	}
	return Judge(s.ctx, m, tokens, subject, thorough)
}

// calibratedPrompt is the prompt of every fixture that budgets are stored for.
const calibratedPrompt = "full"

// why is what a failing verdict says beyond its single findings.
func (v *Verdict) why() string {
	if v.FirstDivergence == "" {
		return ""
	}
	text := "the first tap that is wrong is " + v.FirstDivergence
	if v.Diagnosis != nil {
		text += "; " + v.Diagnosis.String()
	}
	return text
}

// forward asks for every tap if it can.
func (o *opened) forward(ctx context.Context, tokens []int32) (map[string]tensor.Tensor, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	if tapper, ok := o.instance.(Tapper); ok {
		return tapper.ForwardTaps(ctx, tokens, taps.All(o.model.Config))
	}
	return o.instance.Forward(ctx, tokens)
}

// keep stores what a failing run put out, so that it can be looked at.
func (s *Suite) keep(m *checkpoint.Model, in input, implementation string, results map[string]tensor.Tensor) (string, error) {
	if s.options.Failures == "" {
		return "", nil
	}
	if err := os.MkdirAll(s.options.Failures, 0o755); err != nil {
		return "", err
	}
	var list []tensor.Named
	for _, name := range taps.All(m.Config) {
		// A malformed tensor cannot be written; the finding says what is wrong with it.
		if t, ok := results[name]; ok && t.Check() == nil {
			list = append(list, tensor.Named{Name: name, Tensor: t})
		}
	}
	path := filepath.Join(s.options.Failures, strings.Join([]string{implementation, in.fixture, in.prompt.Name, "safetensors"}, "."))
	return filepath.ToSlash(filepath.Join(testedPackage(), path)), tensor.WriteSafetensors(path, list, map[string]string{"implementation": implementation})
}

// repeatCommand is the command line that runs one test alone.
func repeatCommand(test string) string {
	parts := strings.Split(test, "/")
	for i, part := range parts {
		parts[i] = "^" + regexp.QuoteMeta(part) + "$"
	}
	return fmt.Sprintf("go test -count=1 -run '%s' %s", strings.Join(parts, "/"), testedPackage())
}

// testedPackage is the package of the running test as the go command wants it:
// tests run in their package's directory.
func testedPackage() string {
	dir, err := os.Getwd()
	if err != nil {
		return "."
	}
	for root := dir; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			relative, err := filepath.Rel(root, dir)
			if err != nil {
				return "."
			}
			return "./" + filepath.ToSlash(relative)
		}
		if root == filepath.Dir(root) {
			return "."
		}
	}
}
