package faults

import (
	"cmp"
	"slices"
)

// The stages that a fault can hit, named as the judge names them. A fault that
// needs a KV cache to show belongs to generation.
const (
	stageEmbedding  = "embedding"
	stageRMSNorm    = "rmsnorm"
	stageRope       = "rope"
	stageAttention  = "attention"
	stageGating     = "gating"
	stageExperts    = "experts"
	stageLogits     = "logits"
	stageGeneration = "generation"
)

// catalogue is in alphabetical order.
var catalogue = func() []Fault {
	all := slices.Concat(attention(), experts(), gating(), generation(), logits(), mxfp4(), rmsnorm(), rope())
	slices.SortFunc(all, func(a, b Fault) int { return cmp.Compare(a.ID, b.ID) })
	for i := range all {
		all[i].Variants = all[i].variants()
	}
	return all
}()

// variants returns f's variants, completed with what they share with f.
func (f Fault) variants() []Fault {
	variants := slices.Clone(f.Variants)
	for i := range variants {
		v := &variants[i]
		v.ID, v.Thread, v.Cached = f.ID, f.Thread, f.Cached
		if v.Tap == "" {
			v.Stage, v.Tap = f.Stage, f.Tap
		}
	}
	return variants
}

// All returns every fault, sorted by its unique ID.
func All() []Fault { return slices.Clone(catalogue) }

// ByID finds a fault.
func ByID(id string) (Fault, bool) {
	i, found := slices.BinarySearchFunc(catalogue, id, func(f Fault, id string) int { return cmp.Compare(f.ID, id) })
	if !found {
		return Fault{}, false
	}
	return catalogue[i], true
}
