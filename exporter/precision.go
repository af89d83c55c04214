package exporter

import "fmt"

// Precision names the arithmetic of a graph.
type Precision string

// The precisions. BFloat16 and Float16 compute in float32 and round to the short
// format, through a pair of casts, wherever OpenAI's torch model rounds: runtimes
// for CPUs have no arithmetic in them. Weights stay as they are stored; [Export]
// refuses one that float16 cannot hold.
const (
	PrecisionFloat32  Precision = "float32"
	PrecisionBFloat16 Precision = "bfloat16"
	PrecisionFloat16  Precision = "float16"
)

// ParsePrecision checks a precision's name.
func ParsePrecision(name string) (Precision, error) {
	switch p := Precision(name); p {
	case PrecisionFloat32, PrecisionBFloat16, PrecisionFloat16:
		return p, nil
	}
	return "", fmt.Errorf("no precision is called %q: use float32, bfloat16 or float16", name)
}

// Round rounds a float32 value to the precision's format; float32 stays as it is.
func (s *Scope) Round(v Value) Value {
	switch s.precision {
	case PrecisionBFloat16:
		return s.Cast(s.Cast(v, BFloat16), Float32)
	case PrecisionFloat16:
		return s.Cast(s.Cast(v, Float16), Float32)
	}
	return v
}
