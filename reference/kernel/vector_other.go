//go:build !amd64

package kernel

// Other processors run portable Go.
var (
	instructionSets []*instructionSet
	chosen          *instructionSet
)
