package checkpoint

import (
	"context"
	"fmt"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// Check looks at every weight, in parallel, and reports the first tensor that
// holds NaN, an infinity, or an MXFP4 block that overflows bfloat16 (scale
// bytes 253 to 255 with larger codes): no arithmetic can give sensible answers
// from those. It reads the whole checkpoint, at about the disk's speed.
func (m *Model) Check(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	failures := make([]error, len(m.checks))
	for i, c := range m.checks {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := checkFinite(c.matrix); err != nil {
				failures[i] = fmt.Errorf("%s %w", c.what, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, err := range failures { // in file order, whichever was found first
		if err != nil {
			return err
		}
	}
	return nil
}
