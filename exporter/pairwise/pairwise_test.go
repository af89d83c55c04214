package pairwise

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestEveryPairOccurs(t *testing.T) {
	missing := Pairs()
	// 9 options, of 2 choices but one of 3: 28·4 pairs of the former, 8·6 with the
	// latter.
	require.Len(t, missing, 28*4+8*6)
	cases := Table()
	seen := map[string]bool{}
	for _, c := range cases {
		require.False(t, seen[c.Name], "%s occurs twice", c.Name)
		seen[c.Name] = true
		words := strings.Split(c.Name, "-")
		row := make([]int, len(dimensions))
		for d, choices := range dimensions {
			row[d] = max(0, slices.IndexFunc(choices, func(ch choice) bool { return ch.name != "" && slices.Contains(words, ch.name) }))
		}
		for p := range missing {
			if row[p.a] == p.choiceA && row[p.b] == p.choiceB {
				delete(missing, p)
			}
		}
	}
	require.Empty(t, missing)
	require.Less(t, len(cases), 16)
	require.Equal(t, cases[0].Name, Table()[0].Name)
}
