package command_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/conformance/backends/command"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// behaviour tells this test binary to act as a program under test; see TestMain.
const behaviour = "GPTOSS_TEST_BEHAVIOUR"

func TestMain(m *testing.M) {
	if b := os.Getenv(behaviour); b != "" {
		os.Exit(behave(b, os.Args[len(os.Args)-1]))
	}
	os.Exit(m.Run())
}

// behave is a program that goes wrong in one way.
func behave(b, dir string) int {
	output := func(name string) string { return filepath.Join(dir, "output", name) }
	switch b {
	case "fails":
		fmt.Fprintln(os.Stderr, "a long story")
		fmt.Fprintln(os.Stderr, "the last line says why")
		return 3
	case "hangs":
		// A grandchild that would outlive its parent and keep the pipe open.
		grandchild := exec.Command("sleep", "60")
		grandchild.Stderr = os.Stderr
		if err := grandchild.Run(); err != nil {
			return 1
		}
	case "writes nothing":
	case "writes no logits":
		write(output("prompt.safetensors"), "final_norm")
	case "writes another name":
		write(output("prompt.safetensors"), "logits", "block_9.q")
	case "writes rubbish":
		if err := os.WriteFile(output("prompt.safetensors"), []byte("rubbish"), 0o644); err != nil {
			return 1
		}
	case "repeats the request":
		text, err := os.ReadFile(filepath.Join(dir, "request.json"))
		if err != nil {
			return 1
		}
		fmt.Println(string(text))
		return 1
	}
	return 0
}

func write(path string, names ...string) {
	var list []tensor.Named
	for _, name := range names {
		list = append(list, tensor.Named{Name: name, Tensor: tensor.FromFloat32s([]int{1, 2}, []float32{1, 2})})
	}
	if err := tensor.WriteSafetensors(path, list, nil); err != nil {
		panic(err)
	}
}

// open starts the test binary as a program.
func open(t *testing.T, b string, o command.Options) conformance.Instance {
	t.Helper()
	t.Setenv(behaviour, b)
	program, err := os.Executable()
	require.NoError(t, err)
	o.Name, o.Precision, o.Program = "it", reference.Float32, []string{program, "-flag"}
	instance, err := command.New(o).Open(t.Context(), fixtures.Dir("toy"))
	require.NoError(t, err)
	t.Cleanup(func() { instance.Close() })
	return instance
}

func TestErrorsSayWhatTheProgramDidWrong(t *testing.T) {
	for _, test := range []struct{ behaviour, says string }{
		{"fails", "exit status 3; it printed last: a long story\nthe last line says why"},
		{"writes nothing", "wrote neither output/prompt.safetensors nor output/prompt.npz"},
		{"writes no logits", "no tensor called logits"},
		{"writes another name", `"block_9.q", which is no tap of this model`},
		{"writes rubbish", "prompt.safetensors"},
	} {
		t.Run(test.behaviour, func(t *testing.T) {
			_, err := open(t, test.behaviour, command.Options{}).Forward(t.Context(), []int32{1})
			require.Error(t, err)
			assert.Contains(t, err.Error(), test.says)
		})
	}
}

func TestProgramThatIsNotThere(t *testing.T) {
	instance, err := command.New(command.Options{Name: "it", Program: []string{"/no/such/program"}}).Open(t.Context(), fixtures.Dir("toy"))
	require.NoError(t, err)
	_, err = instance.Forward(t.Context(), []int32{1})
	assert.ErrorContains(t, err, "/no/such/program")
	_, err = command.New(command.Options{Name: "it"}).Open(t.Context(), fixtures.Dir("toy"))
	assert.ErrorContains(t, err, "no program")
}

func TestTimeoutEndsTheProgramAndItsChildren(t *testing.T) {
	_, err := open(t, "hangs", command.Options{Timeout: 200 * time.Millisecond}).Forward(t.Context(), []int32{1})
	assert.ErrorContains(t, err, "did not finish within 200ms")
}

func TestCancellingEndsTheProgram(t *testing.T) {
	instance := open(t, "hangs", command.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := instance.Forward(ctx, []int32{1})
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestRequest(t *testing.T) {
	_, err := open(t, "repeats the request", command.Options{}).Forward(t.Context(), []int32{7, 8})
	require.Error(t, err)
	_, text, found := cutLast(err.Error())
	require.True(t, found, err)
	var request command.Request
	require.NoError(t, json.Unmarshal([]byte(text), &request))
	assert.Equal(t, command.Request{
		Protocol: command.ProtocolVersion, Precision: reference.Float32, Layout: "openai",
		Taps: []string{"logits"}, Prompts: []command.Prompt{{Name: "prompt", Tokens: []int32{7, 8}}},
	}, request)
}

func cutLast(message string) (before, after string, found bool) {
	const mark = "it printed last: "
	for i := len(message) - len(mark); i >= 0; i-- {
		if message[i:i+len(mark)] == mark {
			return message[:i], message[i+len(mark):], true
		}
	}
	return message, "", false
}

func TestOtherLayoutNeedsATwin(t *testing.T) {
	o := command.Options{Name: "it", Program: []string{"true"}, Layout: checkpoint.HuggingFace}
	_, err := command.New(o).Open(t.Context(), fixtures.Dir("toy"))
	assert.ErrorContains(t, err, "unsupported")
	o.Twin = func(dir, layout string) (string, error) {
		assert.Equal(t, fixtures.Dir("toy"), dir)
		assert.Equal(t, checkpoint.HuggingFace, layout)
		return fixtures.HuggingFaceDir("toy"), nil
	}
	_, err = command.New(o).Open(t.Context(), fixtures.Dir("toy"))
	assert.NoError(t, err)
}

// TestPython judges a program that shares nothing with this repository: gpt-oss
// in Python's standard library. It computes in float64, so the rule for two
// float64 evaluations applies, on every tap.
func TestPython(t *testing.T) {
	python, err := exec.LookPath("python3")
	require.NoError(t, err, "this test needs python3, without any packages")
	conformance.Run(t, command.New(command.Options{
		Name: "python", Precision: reference.Float64, Program: []string{python, filepath.Join("testdata", "gptoss.py")},
	}), conformance.Options{
		Select: func(_ conformance.Implementation, fixture, prompt string) bool {
			return fixture == "toy" && (prompt == "window+1" || prompt == "other")
		},
	})
}
