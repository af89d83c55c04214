package server

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/gptoss-conformance/gptoss/conformance"
)

// TestAgree: what explains one prompt and not another explains nothing.
func TestAgree(t *testing.T) {
	d := func(id string, equals ...string) *conformance.Diagnosis {
		if id == "none" {
			return new(conformance.Diagnosis)
		}
		return &conformance.Diagnosis{Faults: []string{id}, Equals: equals, Remaining: 0.5}
	}
	for _, test := range []struct {
		a, b   *conformance.Diagnosis
		want   string
		equals []string
	}{
		{nil, d("x", "y"), "x", []string{"y"}},
		{d("x"), d("x"), "x", []string{}},
		{d("x", "y", "z"), d("z", "y"), "y", []string{"z"}},
		{d("x"), d("y"), "none", nil},
		{d("x"), d("none"), "none", nil},
	} {
		got := agree(test.a, test.b)
		assert.Equal(t, test.want, got.ID())
		assert.Equal(t, test.equals, got.Equals)
	}
}
