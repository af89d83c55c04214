package conformance

import (
	"context"
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/kernel"
)

// Statistics compare logits the way people like to quote. They decide nothing.
type Statistics struct {
	KLMean  float64 `json:"kl_mean"`  // KL(truth ‖ subject) in nats, mean over positions
	KL95    float64 `json:"kl_p95"`   // its 95th percentile
	Cosine  float64 `json:"cosine"`   // smallest over positions
	Top1    float64 `json:"top1"`     // share of positions with the truth's most likely token
	Top5    float64 `json:"top5"`     // mean share of the truth's five most likely tokens
	MaxDiff float64 `json:"max_diff"` // largest |Δ|
}

// statisticsOf compares logits [rows, vocab]. Once the context has ended, nobody
// looks at the result any more, and the rest of the rows is left out.
func statisticsOf(ctx context.Context, got, want []float64, vocab int) *Statistics {
	rows := len(want) / vocab
	each := make([]Statistics, rows)
	kernel.Parallel(rows, 1, func(from, to int) {
		for t := from; t < to && ctx.Err() == nil; t++ {
			each[t] = rowStatistics(got[t*vocab:][:vocab], want[t*vocab:][:vocab])
		}
	})
	s := &Statistics{Cosine: 1}
	divergences := make([]float64, rows)
	for t, row := range each {
		divergences[t] = row.KLMean
		s.KLMean += row.KLMean / float64(rows)
		s.Cosine = min(s.Cosine, row.Cosine)
		s.Top1 += row.Top1 / float64(rows)
		s.Top5 += row.Top5 / float64(rows)
		s.MaxDiff = max(s.MaxDiff, row.MaxDiff)
	}
	s.KL95 = slices.Sorted(slices.Values(divergences))[int(0.95*float64(rows-1)+0.5)]
	return s
}

// rowStatistics compares one position.
func rowStatistics(got, want []float64) Statistics {
	s := Statistics{KLMean: divergence(want, got), Cosine: cosine(got, want)}
	k := min(5, len(want))
	gotTop, wantTop := reference.TopK(got, k), reference.TopK(want, k)
	if gotTop[0] == wantTop[0] {
		s.Top1 = 1
	}
	for _, e := range wantTop {
		if slices.Contains(gotTop, e) {
			s.Top5 += 1 / float64(k)
		}
	}
	for i, g := range got {
		s.MaxDiff = max(s.MaxDiff, math.Abs(g-want[i]))
	}
	return s
}

// divergence is KL(p ‖ q) of two rows of logits, in nats.
func divergence(p, q []float64) float64 {
	logP, logQ := logSoftmax(p), logSoftmax(q)
	sum := 0.0
	for i, lp := range logP {
		sum += math.Exp(lp) * (lp - logQ[i])
	}
	return max(sum, 0) // rounding may leave a divergence of zero slightly below it
}

func logSoftmax(x []float64) []float64 {
	top := slices.Max(x)
	sum := 0.0
	for _, v := range x {
		sum += math.Exp(v - top)
	}
	out := make([]float64, len(x))
	log := math.Log(sum)
	for i, v := range x {
		out[i] = v - top - log
	}
	return out
}

func cosine(a, b []float64) float64 {
	var dot, aa, bb float64
	for i := range a {
		dot += a[i] * b[i]
		aa += a[i] * a[i]
		bb += b[i] * b[i]
	}
	if aa == 0 || bb == 0 {
		return 0
	}
	return dot / math.Sqrt(aa*bb)
}
