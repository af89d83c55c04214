package onnxruntime

import (
	"fmt"

	ort "github.com/yalue/onnxruntime_go"
)

// Levels of ONNX Runtime's own graph optimization.
const (
	OptimizeAll      = "all" // the runtime's default
	OptimizeExtended = "extended"
	OptimizeBasic    = "basic"
	OptimizeNone     = "none"
)

// Levels lists the levels of graph optimization, the strongest first.
var Levels = []string{OptimizeAll, OptimizeExtended, OptimizeBasic, OptimizeNone}

var levels = map[string]ort.GraphOptimizationLevel{
	"":               ort.GraphOptimizationLevelEnableAll,
	OptimizeAll:      ort.GraphOptimizationLevelEnableAll,
	OptimizeExtended: ort.GraphOptimizationLevelEnableExtended,
	OptimizeBasic:    ort.GraphOptimizationLevelEnableBasic,
	OptimizeNone:     ort.GraphOptimizationLevelDisableAll,
}

// Options says how a graph is run. The zero value runs our own graphs on the CPU.
type Options struct {
	GraphOptimization string // one of Levels; empty: all
	Threads           int    // inside one operator; 0: the runtime decides
	// KeepWeightsMapped stops the runtime from folding the casts of bfloat16
	// weights when it loads, which doubles their memory. Every run casts them.
	KeepWeightsMapped bool
	// Names maps the graph's names of inputs and outputs to ours: the registry's
	// for outputs, and input_ids, attention_mask or position_ids for inputs.
	Names map[string]string
	// Provider is empty for the CPU, or "CUDA" or "WebGPU" for a library that has it.
	Provider string
}

// Entries of the session's configuration. The runtime accepts a name that it
// does not know without a word, so all of them stand here, and a test shows that
// each has its effect.
const (
	allowSpinning      = "session.intra_op.allow_spinning"
	disabledOptimizers = "optimization.disable_specified_optimizers"
	disablePrepacking  = "session.disable_prepacking"
	constantFolding    = "ConstantFolding"
	on, off            = "1", "0"
)

// settings makes the runtime's session options. The caller destroys them.
func (o Options) settings() (*ort.SessionOptions, error) {
	level, ok := levels[o.GraphOptimization]
	if !ok {
		return nil, fmt.Errorf("no level of graph optimization is called %q: use all, extended, basic or none", o.GraphOptimization)
	}
	if o.Threads < 0 {
		return nil, fmt.Errorf("%d threads: use 0 for the runtime's choice, or a positive number", o.Threads)
	}
	s, err := ort.NewSessionOptions()
	if err != nil {
		return nil, err
	}
	if err := o.apply(s, level); err != nil {
		s.Destroy()
		return nil, err
	}
	return s, nil
}

func (o Options) apply(s *ort.SessionOptions, level ort.GraphOptimizationLevel) error {
	if err := s.SetGraphOptimizationLevel(level); err != nil {
		return err
	}
	if err := s.SetIntraOpNumThreads(o.Threads); err != nil {
		return err
	}
	// Patterns keep the memory of the largest run so far; half of it is never used
	// again when lengths vary, and they save no time here.
	if err := s.SetMemPattern(false); err != nil {
		return err
	}
	// Idle threads that spin slow down whoever shares the cores.
	if err := s.AddSessionConfigEntry(allowSpinning, off); err != nil {
		return err
	}
	if o.KeepWeightsMapped {
		if err := s.AddSessionConfigEntry(disabledOptimizers, constantFolding); err != nil {
			return err
		}
	}
	switch o.Provider {
	case "":
		return nil
	case "CUDA":
		cuda, err := ort.NewCUDAProviderOptions()
		if err != nil {
			return err
		}
		defer cuda.Destroy()
		return s.AppendExecutionProviderCUDA(cuda)
	case "WebGPU":
		return s.AppendExecutionProvider("WebGPU", nil)
	}
	return fmt.Errorf("no execution provider is called %q: use CUDA or WebGPU, or leave it out", o.Provider)
}

// introspection makes options that load a graph just to look at it.
func introspection() (*ort.SessionOptions, error) {
	s, err := ort.NewSessionOptions()
	if err != nil {
		return nil, err
	}
	if err := s.SetGraphOptimizationLevel(ort.GraphOptimizationLevelDisableAll); err != nil {
		s.Destroy()
		return nil, err
	}
	if err := s.AddSessionConfigEntry(disablePrepacking, on); err != nil {
		s.Destroy()
		return nil, err
	}
	return s, nil
}
