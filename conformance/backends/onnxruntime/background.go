package onnxruntime

import (
	"context"
	"sync"
)

// background counts calls into the runtime that nobody waits for any more, and
// holds back what must not be freed before the last of them has returned.
//
// The runtime hears of a cancelled run only between two nodes, and one matrix
// product at full width takes seconds; while it loads a graph it hears nothing.
type background struct {
	mu    sync.Mutex
	calls int
	later []func() error
}

func (b *background) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
}

func (b *background) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.calls--; b.calls > 0 {
		return
	}
	for _, f := range b.later {
		f()
	}
	b.later = nil
}

// whenIdle calls f at once and returns its error, or calls it when the last
// abandoned call has returned.
func (b *background) whenIdle(f func() error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.calls > 0 {
		b.later = append(b.later, f)
		return nil
	}
	return f()
}

// await returns what f returns, or the context's error as soon as the context
// ends. Then drop gets what f returns, if it returns without an error.
func await[T any](ctx context.Context, f func() (T, error), drop func(T)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		value, err := f()
		done <- outcome{value, err}
	}()
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
		go func() {
			if o := <-done; o.err == nil {
				drop(o.value)
			}
		}()
		var none T
		return none, ctx.Err()
	}
}
