package conformance

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/gptoss-conformance/gptoss/conformance/faults"
	"github.com/gptoss-conformance/gptoss/reference"
)

// Diagnosis names the known mistake that explains a failing subject.
type Diagnosis struct {
	// Faults holds the ids of the explanation, sorted: one, a pair, or none.
	Faults []string `json:"faults,omitempty"`
	// Layers are the only layers that have the fault; none means that it is wherever
	// it can be.
	Layers []int `json:"layers,omitempty"`
	// Remaining is the largest error ÷ bound that is left when the subject is
	// compared with the faulty model instead of the right one.
	Remaining float64 `json:"remaining"`
	// RemainingMax is the largest |Δ| that is left, on the taps that failed.
	RemainingMax float64 `json:"remaining_max"`
	// Equals lists other explanations that this input cannot tell apart.
	Equals []string `json:"equals,omitempty"`
	// From says what the diagnosis rests on.
	From string `json:"from"`
}

// ID is the explanation as one word: ID, ID+ID, or none.
func (d *Diagnosis) ID() string {
	if d == nil || len(d.Faults) == 0 {
		return "none"
	}
	return strings.Join(d.Faults, "+")
}

// Name is the explanation for people: its ID, and the layers if it is not in all
// of them: "sinks-dropped in layer 3".
func (d *Diagnosis) Name() string {
	if d.ID() == "none" {
		return "none"
	}
	return named(d.Faults, d.Layers)
}

func named(ids []string, layers []int) string {
	text := strings.Join(ids, "+")
	for i, layer := range layers {
		switch {
		case i > 0:
			text += ", "
		case len(layers) == 1:
			text += " in layer "
		default:
			text += " in layers "
		}
		text += strconv.Itoa(layer)
	}
	return text
}

// String says it in one line.
func (d *Diagnosis) String() string {
	if d.ID() == "none" {
		return "no known fault explains it"
	}
	text := fmt.Sprintf("it matches %s, to %.2g", d.Name(), d.RemainingMax)
	if len(d.Equals) > 0 {
		text += fmt.Sprintf(" (this input can't tell that from %s)", strings.Join(d.Equals, ", "))
	}
	return text
}

// Agreed keeps what can explain both of two failing subjects with the same mistake;
// a diagnosis that explains one and not the other is none. Nil counts as anything.
func Agreed(a, b *Diagnosis) *Diagnosis {
	switch {
	case a == nil || b != nil && b.ID() == "none":
		return b
	case b == nil:
		return a
	}
	others := append([]string{b.Name()}, b.Equals...)
	both := slices.DeleteFunc(append([]string{a.Name()}, a.Equals...), func(name string) bool { return !slices.Contains(others, name) })
	d := &Diagnosis{Remaining: max(a.Remaining, b.Remaining), RemainingMax: max(a.RemainingMax, b.RemainingMax), From: b.From}
	if len(both) > 0 {
		d.Faults, d.Layers = unnamed(both[0])
		d.Equals = both[1:]
	}
	return d
}

// unnamed takes a name apart.
func unnamed(name string) (ids []string, layers []int) {
	id, list, _ := strings.Cut(name, " in layer")
	for field := range strings.FieldsFuncSeq(list, func(r rune) bool { return r < '0' || r > '9' }) {
		layer, _ := strconv.Atoi(field) // digits
		layers = append(layers, layer)
	}
	return strings.Split(id, "+"), layers
}

// hypothesis is one fault, or two together, as a model.
type hypothesis struct {
	faults []faults.Fault
	model  reference.Model[float64]
	// everywhere is the model with the fault in every layer, where model has it in
	// some only.
	everywhere *reference.Model[float64]
}

// in is the hypothesis that the fault is in some layers only.
func (h hypothesis) in(layers []int, right reference.Model[float64]) hypothesis {
	return hypothesis{
		faults:     []faults.Fault{h.faults[0].In(layers...)},
		model:      faults.Confine(right, h.model, layers),
		everywhere: &h.model,
	}
}

// layers are the only ones that have the fault; nil means all.
func (h hypothesis) layers() []int {
	if len(h.faults) == 0 {
		return nil
	}
	return h.faults[0].Layers
}

// confined puts each fault into each of some sets of layers, where it has such a
// form.
func (j *judging) confined(singles []hypothesis, sets [][]int) []hypothesis {
	var list []hypothesis
	for _, h := range singles {
		if !h.faults[0].ByLayer() {
			continue
		}
		for _, layers := range sets {
			if len(layers) == j.model.Weights.Config.Layers && h.faults[0].Stage != StageRMSNorm {
				continue // all of them, which was tried; but for the final norm
			}
			list = append(list, h.in(layers, j.model))
		}
	}
	return list
}

func (h hypothesis) ids() []string {
	ids := make([]string, len(h.faults))
	for i, f := range h.faults {
		ids[i] = f.ID
	}
	slices.Sort(ids)
	return ids
}

// fit says how well a hypothesis explains a subject.
type fit struct {
	ids     []string
	layers  []int
	special int     // among those that fit equally the smallest is named
	ratio   float64 // largest error ÷ bound that is left
	rms     float64 // typical error ÷ bound that is left; ranks those that fit
	maxAbs  float64
}

// fitOf starts a hypothesis' fit.
func fitOf(h hypothesis) fit { return fit{ids: h.ids(), layers: h.layers(), special: h.special()} }

func (f fit) explains() bool { return f.ratio <= 1 }

// hypotheses builds the model of every fault in every variant. Faults of the KV
// cache are left out unless the subject used one: a plain forward pass does not
// show them. decoded weights are worth it when whole models run many times.
func (j *judging) hypotheses(decodeWeights bool) []hypothesis {
	var list []hypothesis
	for _, f := range j.options.Catalogue {
		if f.Cached && len(j.options.Chunks) == 0 {
			continue
		}
		for _, variant := range append([]faults.Fault{f}, f.Variants...) {
			model := faults.Apply(variant, j.model)
			if variant.Checkpoint != nil && decodeWeights {
				model.Weights = model.Weights.Densify(densifyBelow)
			}
			list = append(list, hypothesis{faults: []faults.Fault{variant}, model: model})
		}
	}
	return list
}

// special ranks hypotheses that fit equally.
func (h hypothesis) special() int {
	n := 0
	for _, f := range h.faults {
		n += f.Special
	}
	return n
}

// cached reports whether a fault shows only with a KV cache.
func (h hypothesis) cached() bool {
	return slices.ContainsFunc(h.faults, func(f faults.Fault) bool { return f.Cached })
}

// same reports whether two single hypotheses are variants of one fault.
func (h hypothesis) same(g hypothesis) bool { return h.faults[0].ID == g.faults[0].ID }

// and applies a second hypothesis' fault on top. Changed weights are decoded only
// once for every fault, not for every pair.
func (h hypothesis) and(g hypothesis) hypothesis {
	m, f := h.model, g.faults[0]
	if h.faults[0].Checkpoint == nil && f.Checkpoint != nil {
		m.Weights = g.model.Weights // made from the right weights, which are still h's
		f.Checkpoint = nil
	}
	return hypothesis{faults: append(slices.Clone(h.faults), g.faults...), model: faults.Apply(f, m)}
}

// diagnose looks for the fault, or the pair of faults, under which the subject
// would pass. The simplest explanation is named: a fault in some layers only if
// none in all of them will do, and a pair only if no single fault will.
func (j *judging) diagnose(v *Verdict) (*Diagnosis, error) {
	sharp := sharpFailures(v)
	if len(sharp) > 0 {
		return j.diagnoseStages(sharp)
	}
	return j.diagnoseRuns(v)
}

// sharpFailures lists the taps that failed from the subject's own taps, in
// execution order.
func sharpFailures(v *Verdict) []string {
	var names []string
	for _, f := range v.Findings {
		if f.Verdict == Fail && f.Method != FreeRunning && !slices.Contains(names, f.Tap) {
			names = append(names, f.Tap)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Compare(tapOrder(a), tapOrder(b)) })
	return names
}

// nearest returns the indices of the best fits, whether or not they explain.
func nearest(fits []fit) []int {
	order := make([]int, len(fits))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(fits[a].rms, fits[b].rms) })
	return order[:min(refitted, len(order))]
}

// bestOf names the best of the explanations that fit, and those that fit as well.
func bestOf(fits []fit, from string) *Diagnosis {
	fits = slices.DeleteFunc(fits, func(f fit) bool { return !f.explains() })
	if len(fits) == 0 {
		return nil
	}
	slices.SortStableFunc(fits, func(a, b fit) int { return cmp.Compare(a.rms, b.rms) })
	fits = slices.DeleteFunc(fits, func(f fit) bool { return f.rms > equalWithin*fits[0].rms })
	slices.SortStableFunc(fits, func(a, b fit) int { return cmp.Compare(a.special, b.special) })
	best := fits[0]
	d := &Diagnosis{Faults: best.ids, Layers: best.layers, Remaining: best.ratio, RemainingMax: best.maxAbs, From: from}
	for _, f := range fits {
		if name := named(f.ids, f.layers); name != d.Name() && !slices.Contains(d.Equals, name) {
			d.Equals = append(d.Equals, name)
		}
	}
	return d
}

// equalWithin is how much worse an explanation may fit and still count as one
// that the input can't tell apart from the best: rounding alone leaves two runs
// of the same model at errors that differ by less than this.
const equalWithin = 1.25

// refitted is how many of the nearest hypotheses are measured by their own spread.
const refitted = 6

// parallel calls body(0) … body(n-1) on all cores.
func parallel(n int, body func(i int)) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := range next {
				body(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}
