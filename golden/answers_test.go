package golden

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The answers of other real implementations are torch's too, so that nothing in
// the suite hangs on one of them.
func TestAnswers(t *testing.T) {
	for fixture, least := range map[string]int{"capitals": 200, "canary": 1} {
		answers, err := Answers(fixture)
		require.NoError(t, err)
		assert.GreaterOrEqual(t, len(answers), least, fixture)
		for _, a := range answers {
			assert.Nil(t, a.BFloat16, "%s: torch says something else in bfloat16", a.Name)
			assert.Nil(t, a.Transformers, "%s: transformers says something else", a.Name)
		}
	}
	_, err := Answers("toy")
	assert.ErrorContains(t, err, "toy.json")
}
