// Package faults is the catalogue of ways in which implementations of gpt-oss
// have gone wrong. The suite must catch every one of them, at the stage where
// it acts, and name it from the output alone.
package faults

import (
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// Fault is one known mistake, as a change to the right model: to its
// checkpoint (configuration or weights), or to some of its stage functions. It
// never needs a switch in the model.
//
// A stage function is wrapped where that is possible and replaced where it is
// not, so that faults can be combined by applying one after the other.
type Fault struct {
	ID          string // stable: window-one-too-many
	Stage       string // the stage that it hits: attention
	Tap         string // the first tap that goes wrong, without its block: attn_core
	Explanation string // one line
	Thread      string // where it happened in public, or empty
	Related     bool   // the thread is about the like: another model, or another place

	// Checkpoint returns the model with a changed configuration or changed
	// weights; it does not modify its argument, whose files the result goes on
	// reading. Nil if nothing there changes.
	Checkpoint func(*checkpoint.Model) *checkpoint.Model
	// Stages changes stage functions in place. The zero value changes none.
	Stages Swap
	// Graph changes the exporter's stage functions in the same way, so that a graph
	// can have the fault too. Nil where Stages changes none.
	Graph func(*exporter.Stages)
	// Cached says that the mistake shows only when tokens that follow others are
	// given to a model with a KV cache.
	Cached bool

	// Special ranks mistakes that an input can't tell apart: the one with the
	// smallest number is named. It is 0 for nearly all of them.
	Special int

	// AllLayers says that the mistake is one of the layers together (see ByLayer).
	AllLayers bool
	// Layers is where the mistake is; nil means wherever it can be (see In).
	Layers []int

	// Variants are other forms of the same mistake. Each has the same ID; whoever
	// looks for the fault that explains an output tries them as well.
	Variants []Fault
}

// Swap changes stage functions of a model, in either arithmetic. Both fields
// are the same generic function, instantiated twice.
type Swap struct {
	Wide   func(*reference.Stages[float64])
	Single func(*reference.Stages[float32])
}

// Apply returns the faulty model. Faults compose: apply one to the result of
// another.
func Apply[F reference.Float](f Fault, m reference.Model[F]) reference.Model[F] {
	if f.Layers != nil {
		layers := f.Layers
		f.Layers = nil
		return Confine(m, Apply(f, m), layers)
	}
	if f.Checkpoint != nil {
		m.Weights = f.Checkpoint(m.Weights)
	}
	switch stages := any(&m.Stages).(type) {
	case *reference.Stages[float64]:
		if f.Stages.Wide != nil {
			f.Stages.Wide(stages)
		}
	case *reference.Stages[float32]:
		if f.Stages.Single != nil {
			f.Stages.Single(stages)
		}
	}
	return m
}
