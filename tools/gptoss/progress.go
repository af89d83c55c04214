package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
	"github.com/gptoss-conformance/gptoss/reference/taps"
)

// large is the number of weights from which the reference's runs take minutes:
// then a log gets a line for each layer.
const large = 1e9

// terminal reports whether a person is looking.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// newBar is a bar of bytes with the estimated time left, for a terminal. A total of
// -1 is not known.
func newBar(w io.Writer, title string, total int64) *progressbar.ProgressBar {
	return progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(title),
		progressbar.OptionShowBytes(true), progressbar.OptionShowTotalBytes(true),
		progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionShowCount(), progressbar.OptionSetElapsedTime(true), progressbar.OptionClearOnFinish())
}

// meter shows progress in bytes on a terminal, and nothing elsewhere.
type meter struct {
	mu    sync.Mutex
	w     io.Writer // nil: nobody is looking
	title string
	bar   *progressbar.ProgressBar
	shown time.Time
}

func newMeter(w io.Writer, title string) *meter {
	if !terminal(w) {
		w = nil
	}
	return &meter{w: w, title: title}
}

// set may be called by several goroutines, also out of order.
func (b *meter) set(done, total int64) {
	if b.w == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bar == nil {
		b.bar = newBar(b.w, b.title, total)
	}
	// Drawing takes longer than what is counted: several times a second is enough.
	if now := time.Now(); now.Sub(b.shown) > 100*time.Millisecond && done > b.bar.State().CurrentNum {
		b.shown = now
		b.bar.Set64(done) //nolint:errcheck // a bar cannot fail the work
	}
}

func (b *meter) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bar != nil {
		b.bar.Clear() //nolint:errcheck // as above
		b.bar = nil
	}
}

// layers shows runs of the reference layer by layer: as a bar with the bytes of
// weights that have passed and the time left to a person, and for large models as
// a line for each layer in a log.
type layers struct {
	mu    sync.Mutex
	w     io.Writer
	title string
	bar   *progressbar.ProgressBar // nil without a terminal
	lines bool
	began time.Time
	count int     // layers done, of all runs together
	runs  int     // 0: not known
	after []int64 // bytes that have passed after each layer of a run
	whole int64   // and after the unembedding
}

// newLayers is for so many runs; 0 means that nobody knows how many it takes.
func newLayers(w io.Writer, title string, m *checkpoint.Model, runs int) *layers {
	l := &layers{w: w, title: title, began: time.Now(), runs: runs, lines: !terminal(w) && m.Weights() >= large}
	for i := range m.Blocks {
		l.whole += blockBytes(&m.Blocks[i])
		l.after = append(l.after, l.whole)
	}
	l.whole += matrixBytes(m.Unembedding)
	if terminal(w) {
		total := int64(-1)
		if runs > 0 {
			total = int64(runs) * l.whole
		}
		l.bar = newBar(w, title, total)
	}
	return l
}

// next counts one more layer.
func (l *layers) next() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	done := int64((l.count-1)/len(l.after))*l.whole + l.after[(l.count-1)%len(l.after)]
	of := l.runs * len(l.after)
	if l.bar != nil {
		l.bar.Describe(l.title + ", " + counted(l.count, of))
		l.bar.Set64(done) //nolint:errcheck // a bar cannot fail the work
	}
	if l.lines {
		fmt.Fprintf(l.w, "gptoss: %s\n", l.line(done, of, time.Since(l.began)))
	}
}

func counted(n, of int) string {
	if of == 0 {
		return fmt.Sprintf("layer %d", n)
	}
	return fmt.Sprintf("layer %d of %d", n, of)
}

// line is what a log gets.
func (l *layers) line(done int64, of int, took time.Duration) string {
	const gigabyte = 1e9
	if of == 0 {
		return fmt.Sprintf("%s: %s, %.2f GB of weights in %.0f s", l.title, counted(l.count, of), float64(done)/gigabyte, took.Seconds())
	}
	total := int64(l.runs) * l.whole
	left := took.Seconds() * float64(total-done) / float64(done)
	return fmt.Sprintf("%s: %s, %.2f of %.2f GB of weights in %.0f s, about %.0f s left",
		l.title, counted(l.count, of), float64(done)/gigabyte, float64(total)/gigabyte, took.Seconds(), left)
}

// judged is [conformance.Judge] with progress. Logits alone take a run for the truth
// and one for each sample; how many parts of the model other taps take, nobody knows
// before.
func judged(ctx context.Context, stderr io.Writer, title string, m *checkpoint.Model, tokens []int32, s conformance.Subject, o conformance.JudgeOptions) (*conformance.Verdict, error) {
	runs := 0
	if _, ok := s.Taps[taps.Logits]; ok && len(s.Taps) == 1 && o.Catalogue != nil && len(o.Catalogue) == 0 && o.Samples > 0 {
		runs = 1 + o.Samples
	}
	progress := newLayers(stderr, title, m, runs)
	defer progress.finish()
	return conformance.Judge(conformance.WithProgress(ctx, progress.next), m, tokens, s, o)
}

// finish takes the bar away.
func (l *layers) finish() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bar != nil {
		l.bar.Clear() //nolint:errcheck // as above
		l.bar = nil
	}
}

// blockBytes is the storage of a block's matrices; its vectors are too small to
// count.
func blockBytes(b *checkpoint.Block) int64 {
	total := matrixBytes(b.QKV) + matrixBytes(b.Out) + matrixBytes(b.Gate)
	for i := range b.MLP1 {
		total += matrixBytes(b.MLP1[i]) + matrixBytes(b.MLP2[i])
	}
	return total
}

// matrixBytes is what a matrix takes in its file, or of four bytes a value where
// that is not known.
func matrixBytes(w checkpoint.Matrix) int64 {
	switch w := w.(type) {
	case checkpoint.BF16:
		return int64(len(w.Data))
	case checkpoint.F16:
		return int64(len(w.Data))
	case checkpoint.MXFP4:
		return int64(len(w.Blocks) + len(w.Scales))
	case checkpoint.Stack:
		var total int64
		for _, part := range w.Parts {
			total += matrixBytes(part)
		}
		return total
	}
	rows, cols := w.Dims()
	return 4 * int64(rows) * int64(cols)
}
