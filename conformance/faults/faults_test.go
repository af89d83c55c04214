package faults

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// named are the faults that the project promises to know.
var named = []string{
	"window-one-too-many", "window-one-too-few", "window-ignored", "window-on-odd-layers", "window-on-all-layers",
	"sinks-dropped", "sinks-kept-in-values", "sinks-not-in-max",
	"rope-missing", "rope-backwards", "rope-interleaved", "rope-no-yarn", "rope-no-concentration", "rope-truncated-bounds", "rope-position-off-by-one", "rope-base-10000",
	"rmsnorm-eps-1e-6", "rmsnorm-no-scale",
	"softmax-before-topk", "topk-not-renormalized", "router-bias-dropped",
	"swiglu-no-clamp", "swiglu-clamps-glu-below", "swiglu-no-plus-one", "swiglu-alpha-1", "swiglu-halves", "swiglu-gate-up-swapped",
	"mlp1-bias-dropped", "mlp2-bias-dropped", "mlp2-bias-not-weighted",
	"mxfp4-nibbles-swapped", "mxfp4-scale-bias-126", "mxfp4-groups-misread",
	"gqa-heads-misgrouped", "qkv-order", "attention-scale-missing",
	"unembedding-tied", "final-norm-missing", "residual-before-norm",
	"kv-cache-position", "kv-cache-window",
}

func TestCatalogue(t *testing.T) {
	all := All()
	assert.GreaterOrEqual(t, len(all), 55)
	assert.True(t, slices.IsSortedFunc(all, func(a, b Fault) int { return strings.Compare(a.ID, b.ID) }))
	kebab := regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)+$`)
	thread := regexp.MustCompile(`^https://[^\s]+$`)
	seen := map[string]bool{}
	for _, f := range all {
		assert.False(t, seen[f.ID], "%s is there twice", f.ID)
		seen[f.ID] = true
		assert.Regexp(t, kebab, f.ID)
		if f.Thread != "" {
			assert.Regexp(t, thread, f.Thread, f.ID)
		}
		for _, form := range forms(f) {
			assert.Equal(t, f.ID, form.ID)
			assert.Equal(t, f.Cached, form.Cached, f.ID)
			assert.NotEmpty(t, form.Stage, f.ID)
			assert.True(t, form.Tap == taps.Embedding || form.Tap == taps.FinalNorm || form.Tap == taps.Logits ||
				slices.Contains(taps.InBlock, form.Tap), "%s: no tap is called %q", f.ID, form.Tap)
			assert.Regexp(t, `^\S.*\.$|…$`, form.Explanation, f.ID)
			assert.NotContains(t, form.Explanation, "\n", f.ID)
			assert.Equal(t, form.Stages.Wide == nil, form.Stages.Single == nil, "%s: one arithmetic is forgotten", f.ID)
			assert.True(t, form.Checkpoint != nil || form.Stages.Wide != nil, "%s changes nothing", f.ID)
		}
	}
	for _, id := range named {
		assert.True(t, seen[id], "%s is missing", id)
	}
}

func TestByID(t *testing.T) {
	for _, f := range All() {
		found, ok := ByID(f.ID)
		assert.True(t, ok)
		assert.Equal(t, f.Explanation, found.Explanation)
	}
	_, ok := ByID("window-one")
	assert.False(t, ok)
}

// forms returns a fault and its variants.
func forms(f Fault) []Fault { return append([]Fault{f}, f.Variants...) }

// run is what one execution of a model showed, in the order in which it did.
type run struct {
	names    []string
	reals    map[string][]float64
	integers map[string][]int32
}

// execute runs the model over the chunks, one after the other with a cache. Taps
// of chunk n are called "n/name".
func execute[F reference.Float](t *testing.T, m reference.Model[F], chunks [][]int32) run {
	t.Helper()
	r := run{reals: map[string][]float64{}, integers: map[string][]int32{}}
	var cache reference.Cache[F]
	for n, tokens := range chunks {
		name := func(tap string) string { return fmt.Sprintf("%d/%s", n, tap) }
		_, err := m.Forward(t.Context(), tokens, &cache, reference.Observer[F]{
			Reals: func(tap string, values []F) {
				wide := make([]float64, len(values))
				for i, v := range values {
					wide[i] = float64(v)
				}
				r.names = append(r.names, name(tap))
				r.reals[name(tap)] = wide
			},
			Integers: func(tap string, values []int32) {
				r.names = append(r.names, name(tap))
				r.integers[name(tap)] = slices.Clone(values)
			},
		})
		require.NoError(t, err)
	}
	return r
}

// firstDifference returns the first tap that is not the same bit for bit, or "".
func (r run) firstDifference(other run) string {
	for _, name := range r.names {
		same := slices.Equal(r.integers[name], other.integers[name])
		a, b := r.reals[name], other.reals[name]
		same = same && len(a) == len(b)
		for i := range a {
			same = same && math.Float64bits(a[i]) == math.Float64bits(b[i])
		}
		if !same {
			return name
		}
	}
	return ""
}

// difference is the rms of what changed in a tap, over its rms.
func (r run) difference(other run, name string) float64 {
	var changed, whole float64
	for i, v := range r.reals[name] {
		changed += (v - other.reals[name][i]) * (v - other.reals[name][i])
		whole += v * v
	}
	return math.Sqrt(changed / whole)
}

// logitsDifference is the largest over all calls.
func (r run) logitsDifference(other run) float64 {
	worst := 0.0
	for _, name := range r.names {
		if strings.HasSuffix(name, "/"+taps.Logits) {
			worst = max(worst, r.difference(other, name))
		}
	}
	return worst
}

// subject is a fixture with its prompt, in one call and in several.
type subject struct {
	weights       *checkpoint.Model
	whole, chunks [][]int32
}

// fixtureNames starts with what runs fastest.
var fixtureNames = []string{"toy", "toy128", "edge"}

// subjects opens the fixtures.
var subjects = sync.OnceValue(func() map[string]*subject {
	result := map[string]*subject{}
	for _, name := range fixtureNames {
		weights, err := checkpoint.Open(fixtures.Dir(name))
		if err != nil {
			panic(err)
		}
		tokens, err := fixtures.Tokens(name, "full")
		if err != nil {
			panic(err)
		}
		result[name] = &subject{weights: weights, whole: [][]int32{tokens}, chunks: chunked(tokens)}
	}
	return result
})

// chunked takes a prompt apart as a program with a cache does: a first part,
// then several tokens at once, then one after the other. The first part ends
// beyond the window of toy and edge, and a few tokens before toy128's.
func chunked(tokens []int32) [][]int32 {
	first := len(tokens) * 3 / 5
	chunks := [][]int32{tokens[:first], tokens[first : first+5]}
	for i := first + 5; i < len(tokens) && len(chunks) < 14; i++ {
		chunks = append(chunks, tokens[i:i+1])
	}
	return chunks
}

func (s *subject) tokens(cached bool) [][]int32 {
	if cached {
		return s.chunks
	}
	return s.whole
}

// shows is how much of its rms a tap must change, and the logits must: a thousand
// times what rounding in float32 does to one stage.
const shows = 1e-5

// TestEveryFaultShows: at least one fixture sees every form of every fault, in
// the tap that it names and in none before, by far more than rounding.
func TestEveryFaultShows(t *testing.T) {
	right := map[string]map[bool]run{}
	for name, s := range subjects() {
		right[name] = map[bool]run{}
		for _, cached := range []bool{false, true} {
			right[name][cached] = execute(t, reference.New(s.weights, reference.Exact()), s.tokens(cached))
		}
	}
	for _, f := range All() {
		for i, form := range forms(f) {
			t.Run(fmt.Sprintf("%s/%d", f.ID, i), func(t *testing.T) {
				t.Parallel()
				for _, name := range fixtureNames {
					s := subjects()[name]
					wrong := execute(t, Apply(form, reference.New(s.weights, reference.Exact())), s.tokens(f.Cached))
					first := right[name][f.Cached].firstDifference(wrong)
					if first == "" {
						continue
					}
					_, tap := taps.Split(first[strings.Index(first, "/")+1:])
					assert.Equal(t, form.Tap, tap, "%s: differs first in %s", name, first)
					atTap := right[name][f.Cached].difference(wrong, first)
					atEnd := right[name][f.Cached].logitsDifference(wrong)
					t.Logf("%s: %s by %.2g, logits by %.2g", name, first, atTap, atEnd)
					if atTap > shows && atEnd > shows {
						return
					}
				}
				assert.Fail(t, "no fixture shows it: that is a hole in the fixtures")
			})
		}
	}
}

// A fault that needs a cache changes nothing in a run without one.
func TestCachedFaultsAreRightWithoutCache(t *testing.T) {
	s := subjects()["toy"]
	right := execute(t, reference.New(s.weights, reference.Exact()), s.whole)
	for _, f := range All() {
		if f.Cached {
			wrong := execute(t, Apply(f, reference.New(s.weights, reference.Exact())), s.whole)
			assert.Empty(t, right.firstDifference(wrong), f.ID)
		}
	}
}

// A fault leaves the model that it is applied to as it was.
func TestFaultsLeaveTheRightModelAlone(t *testing.T) {
	s := subjects()["toy"]
	right := reference.New(s.weights, reference.Exact())
	before, err := s.weights.Digest(t.Context())
	require.NoError(t, err)
	shape := s.weights.Config
	shape.Sliding = slices.Clone(shape.Sliding)
	outputs := execute(t, right, s.chunks)

	for _, f := range All() {
		for _, form := range forms(f) {
			wrong := Apply(form, right)
			_, err := wrong.Forward(t.Context(), s.whole[0], nil, reference.Observer[float64]{})
			require.NoError(t, err)
		}
	}

	after, err := s.weights.Digest(t.Context())
	require.NoError(t, err)
	assert.Equal(t, before, after)
	assert.Equal(t, shape, s.weights.Config)
	assert.Empty(t, outputs.firstDifference(execute(t, right, s.chunks)))
}

// Both arithmetics of a fault are the same function.
func TestBothArithmetics(t *testing.T) {
	s := subjects()["toy"]
	for _, f := range All() {
		wide := execute(t, Apply(f, reference.New(s.weights, reference.Exact())), s.tokens(f.Cached))
		single := execute(t, Apply(f, reference.New(s.weights, reference.Single())), s.tokens(f.Cached))
		// Scales that are multiplied as numbers make activations of thousands.
		assert.Less(t, wide.logitsDifference(single), 1e-4, f.ID)
	}
}

// Faults add up, whichever is applied first.
func TestFaultsCompose(t *testing.T) {
	s := subjects()["toy"]
	right := reference.New(s.weights, reference.Exact())
	for _, pair := range [][2]string{
		{"sinks-dropped", "window-ignored"},
		{"rope-interleaved", "rope-no-yarn"},
		{"rope-applied-twice", "rope-no-concentration"},
		{"swiglu-alpha-1", "swiglu-no-plus-one"},
		{"swiglu-halves", "swiglu-no-clamp"},
		{"swiglu-gate-up-swapped", "swiglu-no-plus-one"},
		{"swiglu-linear-unclamped", "swiglu-no-plus-one"},
		{"swiglu-gate-up-swapped", "swiglu-halves"},
		{"attention-scale-missing", "gqa-heads-misgrouped"},
		{"mlp2-bias-not-weighted", "topk-not-renormalized"},
		{"mxfp4-nibbles-swapped", "mxfp4-scale-bias-126"},
		{"mxfp4-groups-misread", "mxfp4-nibbles-swapped"},
		{"mxfp4-first-expert-scales", "mxfp4-group-16"},
	} {
		first, ok := ByID(pair[0])
		require.True(t, ok)
		second, ok := ByID(pair[1])
		require.True(t, ok)
		both := execute(t, Apply(second, Apply(first, right)), s.whole)
		assert.Empty(t, both.firstDifference(execute(t, Apply(first, Apply(second, right)), s.whole)), "%v", pair)
		for _, f := range []Fault{first, second} {
			alone := execute(t, Apply(f, right), s.whole)
			assert.Greater(t, alone.logitsDifference(both), shows, "%v: %s alone does the same", pair, f.ID)
		}
	}
}
