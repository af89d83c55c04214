package strictjson

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// walk reads {"name": [integers], ...}.
func walk(text string) (map[string][]int, error) {
	r, err := NewReader([]byte(text))
	if err != nil {
		return nil, err
	}
	out := map[string][]int{}
	err = r.Object(func(key string) error {
		return r.Array(func(int) error {
			i, err := r.Int()
			out[key] = append(out[key], i)
			return err
		})
	})
	return out, err
}

func TestObject(t *testing.T) {
	got, err := walk(` {"a": [1, -2], "A": [3], "b": []} `)
	require.NoError(t, err)
	assert.Equal(t, map[string][]int{"a": {1, -2}, "A": {3}}, got)
}

func TestRefusals(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"empty", "", "is not valid JSON"},
		{"cut", `{"a": [1`, "is not valid JSON"},
		{"text after the value", `{} {}`, "is not valid JSON"},
		{"trailing comma", `{"a": [1],}`, "is not valid JSON"},
		{"invalid UTF-8", "{\"a\xff\": [1]}", "UTF-8"},
		{"duplicate key", `{"a": [1], "a": [1]}`, `key "a" occurs twice`},
		{"duplicate key in other spelling", `{"a": [1], "\u0061": [1]}`, `key "a" occurs twice`},
		{"array for object", `[1]`, "is an array, not an object"},
		{"string for array", `{"a": "x"}`, "is a string, not an array"},
		{"fraction", `{"a": [1.5]}`, "is 1.5, not an integer"},
		{"exponent", `{"a": [1e3]}`, "is 1e3, not an integer"},
		{"huge", `{"a": [9223372036854775808]}`, "not an integer of 64 bits"},
		{"null", `{"a": [null]}`, "is null, not an integer"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := walk(test.text)
			require.ErrorContains(t, err, test.want)
		})
	}
}

func TestDepthIsLimited(t *testing.T) {
	r, err := NewReader([]byte(strings.Repeat("[", 5000) + strings.Repeat("]", 5000)))
	require.NoError(t, err)
	var descend func(int) error
	descend = func(int) error { return r.Array(descend) }
	require.ErrorContains(t, descend(0), "nests more than")
}
