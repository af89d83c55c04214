package checkpoint

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/fixtures"
)

// The codes of a group whose largest code is 6 are canonical: they come back.
func TestPackUndoesDecoding(t *testing.T) {
	const rows, groups = 3, 2
	original := MXFP4{RowCount: rows, ColCount: groups * groupValues}
	for g := range rows * groups {
		for i := range groupBytes {
			original.Blocks = append(original.Blocks, byte(7*g+3*i)|7)
		}
		original.Scales = append(original.Scales, byte(100+9*g))
	}
	dense := Dense{RowCount: rows, ColCount: groups * groupValues, Data: make([]float32, rows*groups*groupValues)}
	original.Rows(dense.Data, 0, rows)

	packed, ok := Pack(dense)
	require.True(t, ok)
	assert.Equal(t, original, packed)

	packed, ok = Pack(original)
	require.True(t, ok)
	assert.Equal(t, original, packed)
}

func TestPackRefuses(t *testing.T) {
	values := make([]float32, groupValues)
	values[5], values[6] = 6, 5 // 5 is not among the values at 6's scale
	_, ok := Pack(Dense{RowCount: 1, ColCount: groupValues, Data: values})
	assert.False(t, ok, "a value between two codes")
	_, ok = Pack(Dense{RowCount: 1, ColCount: groupValues - 1, Data: values})
	assert.False(t, ok, "a width that is no multiple of 32")
}

// A model that was decoded still knows its bytes, where other bytes have the same
// values.
func TestPackAfterDensify(t *testing.T) {
	m, err := Open(fixtures.Dir("edge"))
	require.NoError(t, err)
	defer m.Close()
	canonical := 0
	for i, block := range m.Densify(1 << 30).Blocks {
		for e := range block.MLP1 {
			packed, ok := Pack(block.MLP1[e])
			require.True(t, ok)
			assert.Equal(t, m.Blocks[i].MLP1[e], packed)
			again, ok := Pack(decode(block.MLP1[e]))
			require.True(t, ok)
			if assert.ObjectsAreEqual(packed, again) {
				canonical++
			}
		}
	}
	assert.Zero(t, canonical, "the fixture has no group that can be packed in another way")
}

// A hundred models that differ in one matrix share the others.
func TestDensifyTwice(t *testing.T) {
	m, err := Open(fixtures.Dir("edge"))
	require.NoError(t, err)
	defer m.Close()
	once := *m.Densify(1 << 30)
	other := once
	other.Unembedding = m.Unembedding
	twice := other.Densify(1 << 30)
	assert.Same(t, &once.Embedding.(Dense).Data[0], &twice.Embedding.(Dense).Data[0])
	assert.NotSame(t, &once.Unembedding.(Dense).Data[0], &twice.Unembedding.(Dense).Data[0])
	for i, block := range once.Blocks {
		for e := range block.MLP1 {
			packed, ok := Pack(twice.Blocks[i].MLP1[e])
			require.True(t, ok)
			assert.Equal(t, m.Blocks[i].MLP1[e], packed)
		}
	}
}
