package conformance

import (
	"math"
)

// compare measures got against want, element by element, in units of bound.
// Nothing that is not finite passes: the subject's values were checked before,
// and a bound or an expected value that is not finite fails here.
func compare(shape []int, got, want, bound []float64) (ratio float64, worst *Worst, over int) {
	at := -1
	for i, g := range got {
		r := errorRatio(g, want[i], bound[i])
		if r > 1 {
			over++
		}
		if r > ratio || at < 0 {
			ratio, at = r, i
		}
	}
	if at >= 0 {
		worst = &Worst{Index: unravel(at, shape), Got: got[at], Want: want[at], Bound: bound[at]}
	}
	return ratio, worst, over
}

// errorRatio is |got − want| ÷ bound; no error is 0 whatever the bound, and NaN
// anywhere is infinitely wrong.
func errorRatio(got, want, bound float64) float64 {
	difference := math.Abs(got - want)
	switch {
	case difference == 0:
		return 0
	case difference <= 0, difference != difference, bound != bound, bound <= 0:
		return math.Inf(1)
	}
	return difference / bound
}

// unravel turns a flat position into an index of the shape.
func unravel(flat int, shape []int) []int {
	index := make([]int, len(shape))
	for i := len(shape) - 1; i >= 0; i-- {
		index[i] = flat % shape[i]
		flat /= shape[i]
	}
	return index
}

// rows describes an error [rows, width] by row: root mean square and maximum.
type rowErrors struct{ rms, max []float64 }

func rowErrorsOf(got, want []float64, rows int) rowErrors {
	width := len(want) / rows
	e := rowErrors{rms: make([]float64, rows), max: make([]float64, rows)}
	for r := range rows {
		squares := 0.0
		for i := r * width; i < (r+1)*width; i++ {
			d := math.Abs(got[i] - want[i])
			squares += d * d
			if d > e.max[r] || d != d {
				e.max[r] = d
			}
		}
		e.rms[r] = math.Sqrt(squares / float64(width))
	}
	return e
}
