package golden

import "path/filepath"

// SpreadFile is the name of a fixture's error statistics.
const SpreadFile = "spread.json"

// Spread says how far the real implementations are from the float64 truth, tap
// by tap, over every token of a fixture's prompt "full". The budgets for free
// runs are calibrated from it.
type Spread struct {
	Fixture string      `json:"fixture"`
	Runs    []SpreadRun `json:"runs"`
}

// SpreadRun is one implementation's distance from the truth.
type SpreadRun struct {
	Implementation string                `json:"implementation"`
	Corrected      bool                  `json:"corrected"`
	Precision      string                `json:"precision"`
	Taps           map[string]Statistics `json:"taps"`
}

// Statistics are absolute errors of one tap. Expert slots are aligned by expert,
// and slots whose expert the truth did not choose are left out.
type Statistics struct {
	Max       float64            `json:"max"`       // over all elements
	RMS       float64            `json:"rms"`       // over all elements
	Quantiles map[string]float64 `json:"quantiles"` // "0.5", "0.9", "0.99" over tokens, of the rms within a token
	Scale     float64            `json:"scale"`     // rms of the truth

	// Of mlp_expert_indices, instead of the above: tokens whose set of experts
	// differs from the truth's, of how many.
	Flips  int `json:"flips"`
	Tokens int `json:"tokens"`
}

// ReadSpread reads a fixture's statistics.
func ReadSpread(fixture string) (Spread, error) {
	var s Spread
	m, err := ReadManifest(fixture)
	if err != nil {
		return s, err
	}
	path := filepath.Join(root(), "model", fixture, SpreadFile)
	if err := checkDigest(path, m.SpreadSHA256); err != nil {
		return s, err
	}
	err = readJSON(path, &s)
	return s, err
}
