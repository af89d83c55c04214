// Package pairwise lists combinations of the exporter's options in which every
// pair of choices occurs: enough to find what two options do to each other,
// without the thousands of combinations that there are.
package pairwise

import (
	"strings"

	"github.com/gptoss-conformance/gptoss/exporter"
)

// Case is one combination.
type Case struct {
	Name    string // of the choices that are not the default, with dashes
	Options exporter.Options
}

// Length is the number of tokens of the cases with a fixed length.
const Length = 20

// choice is one value of one option.
type choice struct {
	name string // empty for the default
	set  func(o *exporter.Options)
}

// dimensions lists the options; the first choice of each is the default.
var dimensions = [][]choice{
	{{}, {"onnxruntime", func(o *exporter.Options) { o.Operators = exporter.OperatorsONNXRuntime }}},
	{{}, {"dense", func(o *exporter.Options) { o.Experts = exporter.ExpertsDense }}},
	{{}, {"fixed", func(o *exporter.Options) { o.SequenceLength = Length }}},
	{{}, {"cache", func(o *exporter.Options) { o.KVCache = true }}},
	{{}, {"hidden", func(o *exporter.Options) { o.HiddenStates = true }}},
	{{}, {"debug", func(o *exporter.Options) { o.BlockDebug = true }}},
	{{}, {"functions", func(o *exporter.Options) { o.Functions = true }}},
	{{}, {"last", func(o *exporter.Options) { o.LastLogitsOnly = true }}},
	{
		{},
		{"bfloat16", func(o *exporter.Options) { o.Precision = exporter.PrecisionBFloat16 }},
		{"float16", func(o *exporter.Options) { o.Precision = exporter.PrecisionFloat16 }},
	},
}

// pair is two choices of two options, a before b.
type pair struct{ a, choiceA, b, choiceB int }

// Table returns the combinations: greedily, each takes in as many of the pairs
// that are still missing as one pass over the options finds. It is the same every
// time.
func Table() []Case {
	missing := Pairs()
	var cases []Case
	for len(missing) > 0 {
		row := nextRow(missing)
		for p := range missing {
			if row[p.a] == p.choiceA && row[p.b] == p.choiceB {
				delete(missing, p)
			}
		}
		cases = append(cases, makeCase(row))
	}
	return cases
}

// Pairs returns all pairs of choices.
func Pairs() map[pair]bool {
	pairs := map[pair]bool{}
	for a := range dimensions {
		for b := a + 1; b < len(dimensions); b++ {
			for i := range dimensions[a] {
				for j := range dimensions[b] {
					pairs[pair{a, i, b, j}] = true
				}
			}
		}
	}
	return pairs
}

// nextRow starts from the first pair that is missing and chooses every other
// option so that it completes the most missing pairs with the ones before.
func nextRow(missing map[pair]bool) []int {
	row := make([]int, len(dimensions))
	for i := range row {
		row[i] = -1
	}
	seed := firstOf(missing)
	row[seed.a], row[seed.b] = seed.choiceA, seed.choiceB
	for d := range dimensions {
		if row[d] >= 0 {
			continue
		}
		best, bestGain := 0, -1
		for i := range dimensions[d] {
			row[d] = i
			if gain := gained(row, d, missing); gain > bestGain {
				best, bestGain = i, gain
			}
		}
		row[d] = best
	}
	return row
}

// gained counts the missing pairs that option d completes.
func gained(row []int, d int, missing map[pair]bool) int {
	gain := 0
	for other, choice := range row {
		if other == d || choice < 0 {
			continue
		}
		p := pair{d, row[d], other, choice}
		if other < d {
			p = pair{other, choice, d, row[d]}
		}
		if missing[p] {
			gain++
		}
	}
	return gain
}

// firstOf returns the smallest pair, so that the order of a map does not matter.
func firstOf(pairs map[pair]bool) pair {
	var first pair
	found := false
	for p := range pairs {
		if !found || p.before(first) {
			first, found = p, true
		}
	}
	return first
}

func (p pair) before(q pair) bool {
	for _, d := range [][2]int{{p.a, q.a}, {p.b, q.b}, {p.choiceA, q.choiceA}, {p.choiceB, q.choiceB}} {
		if d[0] != d[1] {
			return d[0] < d[1]
		}
	}
	return false
}

func makeCase(row []int) Case {
	var c Case
	var words []string
	for d, i := range row {
		choice := dimensions[d][i]
		if choice.set != nil {
			choice.set(&c.Options)
			words = append(words, choice.name)
		}
	}
	c.Name = strings.Join(words, "-")
	if c.Name == "" {
		c.Name = "default"
	}
	return c
}
