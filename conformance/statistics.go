package conformance

import (
	"math"
	"slices"

	"github.com/gptoss-conformance/gptoss/reference"
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

func statisticsOf(got, want []float64, vocab int) *Statistics {
	rows := len(want) / vocab
	s := &Statistics{Cosine: 1}
	divergences := make([]float64, rows)
	for t := range rows {
		g, w := got[t*vocab:][:vocab], want[t*vocab:][:vocab]
		divergences[t] = divergence(w, g)
		s.KLMean += divergences[t] / float64(rows)
		s.Cosine = min(s.Cosine, cosine(g, w))
		k := min(5, vocab)
		gotTop, wantTop := reference.TopK(g, k), reference.TopK(w, k)
		if gotTop[0] == wantTop[0] {
			s.Top1 += 1 / float64(rows)
		}
		for _, e := range wantTop {
			if slices.Contains(gotTop, e) {
				s.Top5 += 1 / float64(rows*k)
			}
		}
		for i := range g {
			s.MaxDiff = max(s.MaxDiff, math.Abs(g[i]-w[i]))
		}
	}
	s.KL95 = slices.Sorted(slices.Values(divergences))[int(0.95*float64(rows-1)+0.5)]
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
	for i, v := range x {
		out[i] = v - top - math.Log(sum)
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
