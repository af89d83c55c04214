package checkpoint

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// Every code at every scale is exact, and a bfloat16 where it is finite.
func TestMXFP4DecodesExactly(t *testing.T) {
	magnitudes := []float64{0, 0.5, 1, 1.5, 2, 3, 4, 6}
	for scale := range 256 {
		for code := range 16 {
			m := MXFP4{1, 32, make([]byte, 16), []byte{byte(scale)}}
			m.Blocks[7] = byte(code) << 4
			m.Blocks[8] = byte(code)
			out := values(m)
			want := math.Ldexp(magnitudes[code&7], scale-127)
			if code >= 8 {
				want = -want
			}
			for _, i := range []int{15, 16} { // the low nibble comes first
				got := float64(out[i])
				if math.Abs(want) >= 0x1p128 {
					require.True(t, math.IsInf(got, 0))
					continue
				}
				require.Equal(t, want, got, "scale %d, code %d", scale, code)
				require.Equal(t, math.Signbit(want) || code == 8, math.Signbit(got))
				require.Equal(t, out[i], tensor.BFloat16(tensor.ToBFloat16(out[i])))
			}
			for i, v := range out {
				if i != 15 && i != 16 {
					require.Zero(t, v)
				}
			}
			overflow := -1
			if math.Abs(want) >= 0x1p128 {
				overflow = 0
			}
			require.Equal(t, overflow, m.firstOverflow(), "scale %d, code %d", scale, code)
		}
	}
}

func TestFirstOverflowFindsEveryPlace(t *testing.T) {
	for groups := range 20 {
		for at := range groups {
			m := MXFP4{1, 32 * groups, make([]byte, 16*groups), make([]byte, groups)}
			for i := range m.Scales {
				m.Scales[i] = 120
			}
			m.Scales[at], m.Blocks[16*at+3] = 254, 0x40
			assert.Equal(t, at, m.firstOverflow())
		}
	}
}

// Encoding what was decoded gives the same values and one canonical form.
func TestEncodeMXFP4(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 200000 {
		var block, again [16]byte
		largest := byte(r.IntN(8))
		for i := range block {
			nibble := func() byte { return byte(r.IntN(int(largest)+1)) | byte(r.IntN(2))<<3 }
			block[i] = nibble() | nibble()<<4
		}
		scale := byte(r.IntN(256))
		if r.IntN(2) == 0 {
			scale = byte(r.IntN(6)) // the low end, where scales run out
		}
		m := MXFP4{1, 32, block[:], []byte{scale}}
		if m.firstOverflow() >= 0 {
			continue
		}
		before := values(m)
		got, ok := encodeMXFP4(&again, (*[32]float32)(before))
		require.True(t, ok)
		after := values(MXFP4{1, 32, again[:], []byte{got}})
		for i := range before {
			require.Equal(t, math.Float32bits(before[i]), math.Float32bits(after[i]))
		}
		top := byte(0)
		for _, b := range again {
			top = max(top, b&7, b>>4&7)
		}
		require.True(t, top == 6 || top == 7 || got == 0, "largest code %d at scale %d", top, got)
		if top == 0 {
			require.Zero(t, got)
		}

		canonical := block
		scale, ok = canonicalMXFP4(&canonical, scale)
		require.True(t, ok)
		require.Equal(t, got, scale)
		require.Equal(t, again, canonical)
	}
}

func TestEncodeMXFP4Refuses(t *testing.T) {
	for _, test := range []struct {
		name string
		put  []float32
		ok   bool
	}{
		{"1 and 6", []float32{1, 6}, true},
		{"0.5 and 6", []float32{0.5, 6}, true},
		{"0.25 and 6: too far apart", []float32{0.25, 6}, false},
		{"0.75 and 6", []float32{0.75, 6}, false},
		{"5", []float32{5}, false},
		{"1 and 1.25", []float32{1, 1.25}, false},
		{"smallest", []float32{0x1p-128}, true},
		{"below the smallest", []float32{0x1p-129}, false},
		{"subnormals", []float32{0x1p-128, 0x1.8p-127, 6 * 0x1p-127}, true},
		{"1.5 times the smallest", []float32{0x1.8p-128}, false},
		{"smallest normal steps", []float32{0x1p-127, 6 * 0x1p-126}, true},
		{"largest", []float32{6 * 0x1p125}, true},
		{"4 and 6 at the top", []float32{4 * 0x1p125, -6 * 0x1p125}, true},
		{"beyond bfloat16's bits", []float32{1.001953125}, false},
		{"infinity", []float32{float32(math.Inf(1))}, false},
		{"NaN", []float32{float32(math.NaN())}, false},
		{"odd subnormal", []float32{math.Float32frombits(5)}, false},
	} {
		var group [32]float32
		copy(group[3:], test.put)
		var block [16]byte
		scale, ok := encodeMXFP4(&block, &group)
		require.Equal(t, test.ok, ok, test.name)
		if ok {
			require.Equal(t, group[:], values(MXFP4{1, 32, block[:], []byte{scale}}), test.name)
		}
	}
}
