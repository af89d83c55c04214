//go:build !amd64

package kernel

import (
	"runtime"
	"time"
)

// Other processors run portable Go.
var (
	instructionSets []*instructionSet
	chosen          *instructionSet
)

// pause passes some tens of cycles.
func pause() { runtime.KeepAlive(time.Now()) }
