package checkpoint

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// checkValues is about how many values are looked at in one go.
const checkValues = 4 << 20

// Check looks at every weight, in parallel, and reports the first tensor that
// holds NaN, an infinity, or an MXFP4 block that overflows bfloat16 (scale
// bytes 253 to 255 with larger codes): no arithmetic can give sensible answers
// from those. It reads the whole checkpoint, at about the disk's speed.
func (m *Model) Check(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	bad := make([]atomic.Bool, len(m.checks))
	var looked atomic.Int64
	for i, c := range m.checks {
		part := c.matrix
		if stored, ok := asStored(part); ok {
			part = stored // in the order of the file
		}
		rows, cols := part.Dims()
		step := max(checkValues/max(cols, 1), 1)
		for from := 0; from < rows; from += step {
			n := min(step, rows-from)
			group.Go(func() error {
				if err := ctx.Err(); err != nil {
					return err
				}
				if checkFinite(rowsOf(part, from, n)) != nil {
					bad[i].Store(true)
				}
				values := int64(n) * int64(cols)
				if total := looked.Add(values); total/releaseValues != (total-values)/releaseValues {
					m.Release()
				}
				return nil
			})
		}
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for i, c := range m.checks { // in file order, whichever was found first
		if bad[i].Load() {
			return fmt.Errorf("%s %w", c.what, checkFinite(c.matrix)) // once more, to say where
		}
	}
	return nil
}
