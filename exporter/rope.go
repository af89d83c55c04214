package exporter

import (
	"fmt"
	"math"

	"github.com/gptoss-conformance/gptoss/reference/config"
)

// Rotary is what RoPE needs to know: one frequency for each pair of dimensions,
// and the factor on both cosine and sine.
type Rotary struct {
	InverseFrequencies []float64 // [head_dim/2], radians per position
	Concentration      float64   // YaRN's attention scaling; 1 without YaRN
}

// Frequencies computes the frequencies with YaRN's "NTK by parts" interpolation.
//
// Source: Peng et al. 2023, https://arxiv.org/abs/2309.00071, sections 3.2 and
// 3.4; openai/gpt-oss gpt_oss/torch/model.py RotaryEmbedding.
func Frequencies(c config.Config) Rotary {
	half := c.HeadDim / 2
	rotary := Rotary{InverseFrequencies: make([]float64, half), Concentration: 1}
	for i := range half {
		rotary.InverseFrequencies[i] = math.Pow(c.RopeTheta, -float64(i)/float64(half))
	}
	if c.RopeScalingFactor <= 1 {
		return rotary
	}
	rotary.Concentration = 0.1*math.Log(c.RopeScalingFactor) + 1
	// The pair that makes so many turns within the original context.
	pair := func(turns float64) float64 {
		return float64(half) * math.Log(float64(c.InitialContextLength)/(turns*2*math.Pi)) / math.Log(c.RopeTheta)
	}
	low, high := pair(c.RopeNTKBeta), pair(c.RopeNTKAlpha)
	if c.RopeTruncate {
		low, high = math.Floor(low), math.Ceil(high)
	}
	for i := range half {
		slowed := min(max((float64(i)-low)/(high-low), 0), 1)
		rotary.InverseFrequencies[i] *= slowed/c.RopeScalingFactor + 1 - slowed
	}
	return rotary
}

// Rows of the two tables: positions up to nearRows·farRows = 2^20 are served, and
// those below nearRows by one look-up.
const (
	nearRows = 4096
	farRows  = 256
)

// RotaryTables returns cosine and sine, times the concentration, for positions
// [tokens]: two values [tokens, head_dim/2].
//
// They are looked up, not computed: the tables are made in float64 and rounded
// once, so that neither a runtime's sine nor float32 angles (off by u·position·
// frequency, 7e-3 at position 131,071) get into the result. A table of every
// position would be large, so a position is split into far·4096 + near and the
// two angles are added:
//
//	cos(a+b) = cos a·cos b − sin a·sin b,  sin(a+b) = sin a·cos b + cos a·sin b
//
// which costs at most 4 units of roundoff, and none below position 4096, where
// cos a is 1 and sin a is 0. No sequence is longer than limit; when the tables
// of near positions suffice for that, nothing is added. A position beyond the
// tables makes the runtime's Gather fail.
func RotaryTables(s *Scope, r Rotary, positions Value, limit int) (cos, sin Value) {
	limit = min(limit, nearRows*farRows)
	nearCos, nearSin := r.tables(s, "near", min(limit, nearRows), 1, r.Concentration)
	if limit <= nearRows {
		return s.Gather(nearCos, 0, positions), s.Gather(nearSin, 0, positions)
	}
	farCos, farSin := r.tables(s, "far", (limit+nearRows-1)/nearRows, nearRows, 1)
	far := s.Div(positions, s.Int64(nearRows))
	near := s.Subtract(positions, s.Mul(far, s.Int64(nearRows)))
	cosA, sinA := s.Gather(farCos, 0, far), s.Gather(farSin, 0, far)
	cosB, sinB := s.Gather(nearCos, 0, near), s.Gather(nearSin, 0, near)
	cos = s.Subtract(s.Mul(cosA, cosB), s.Mul(sinA, sinB))
	sin = s.Add(s.Mul(sinA, cosB), s.Mul(cosA, sinB))
	return cos, sin
}

// tables makes constants [rows, head_dim/2] for the positions 0, step, 2·step, …
func (r Rotary) tables(s *Scope, name string, rows, step int, factor float64) (cos, sin Value) {
	half := len(r.InverseFrequencies)
	cosines, sines := make([]float32, 0, rows*half), make([]float32, 0, rows*half)
	for row := range rows {
		for _, frequency := range r.InverseFrequencies {
			sine, cosine := math.Sincos(float64(row*step) * frequency)
			cosines = append(cosines, float32(cosine*factor))
			sines = append(sines, float32(sine*factor))
		}
	}
	shape := Ns(rows, half)
	// Two scopes may hold different frequencies; their tables must not be mistaken.
	name = fmt.Sprintf("%s.%s", s.path, name)
	return s.Floats(name+"_cos", shape, cosines), s.Floats(name+"_sin", shape, sines)
}

// RotateQueries turns queries [tokens, heads, head_dim] by cosines and sines
// [tokens, head_dim/2].
func RotateQueries(l Layer, q, cos, sin Value) Value { return Rotate(l.Scope, q, cos, sin) }

// RotateKeys turns keys [tokens, kv_heads, head_dim] like [RotateQueries].
func RotateKeys(l Layer, k, cos, sin Value) Value { return Rotate(l.Scope, k, cos, sin) }

// Rotate turns x [tokens, heads, head_dim], whose pairs are (x[i], x[i+d/2]):
//
//	y1 = x1·cos − x2·sin,  y2 = x2·cos + x1·sin
//
// In a short format torch rounds the tables, every product and the result.
//
// Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in the halves form;
// openai/gpt-oss gpt_oss/torch/model.py _apply_rotary_emb.
func Rotate(s *Scope, x, cos, sin Value) Value {
	width := x.shape[2].Size
	half := width / 2
	first := s.Slice(x, 2, 0, half, 1, N(half))
	second := s.Slice(x, 2, half, width, 1, N(half))
	cos, sin = s.Unsqueeze(s.Round(cos), 1), s.Unsqueeze(s.Round(sin), 1)
	y1 := s.Round(s.Subtract(s.Round(s.Mul(first, cos)), s.Round(s.Mul(second, sin))))
	y2 := s.Round(s.Add(s.Round(s.Mul(second, cos)), s.Round(s.Mul(first, sin))))
	return s.Concat(2, N(width), y1, y2)
}
