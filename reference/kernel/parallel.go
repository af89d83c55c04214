package kernel

import (
	"runtime"
	"sync/atomic"
	"time"
)

// Parallel calls body for disjoint ranges that cover [0, n), each at most grain
// long, on all cores, and waits for all of them.
//
// The goroutines that help stay awake for a while after their work, for the next
// call: a layer is half a dozen loops of less than a millisecond, and to wake an idle
// core takes a tenth of one on a virtual machine. They wait no longer than they have
// worked, so that at most half of their time is lost.
func Parallel(n, grain int, body func(from, to int)) {
	chunks := (n + grain - 1) / grain
	workers := min(runtime.GOMAXPROCS(0), chunks)
	if workers <= 1 {
		for from := 0; from < n; from += grain {
			body(from, min(from+grain, n))
		}
		return
	}
	l := &loop{body: body, n: n, grain: grain, done: make(chan struct{})}
	l.left.Store(int64(chunks))
	for range workers - 1 - l.offer(workers-1) {
		go l.help()
	}
	start := time.Now()
	l.work()
	l.wait(time.Since(start))
}

// loop is the work of one call of Parallel.
type loop struct {
	body     func(from, to int)
	n, grain int
	next     atomic.Int64 // the first chunk that nobody has taken
	left     atomic.Int64 // chunks that are not finished
	done     chan struct{}
}

// work takes chunks until there are none.
func (l *loop) work() {
	for {
		from := (int(l.next.Add(1)) - 1) * l.grain
		if from >= l.n {
			return
		}
		l.body(from, min(from+l.grain, l.n))
		if l.left.Add(-1) == 0 {
			close(l.done)
		}
	}
}

// help is a helper's life: from one loop to the next, until none comes in time.
func (l *loop) help() {
	var credit time.Duration // for waiting: what it has worked and not waited
	for l != nil {
		start := time.Now()
		l.work()
		worked := time.Now()
		credit = min(credit+worked.Sub(start), patience)
		l = waitForLoop(credit)
		credit -= time.Since(worked)
	}
}

// wait returns when all chunks are finished: a helper that comes too late for any
// is not waited for. To sleep, and be woken, would take longer than the last chunks
// usually do.
func (l *loop) wait(worked time.Duration) {
	if !await(min(worked, patience), func() bool { return l.left.Load() == 0 }) {
		<-l.done
	}
}

// patience is for how long a goroutine waits actively at most: longer than what lies
// between two loops of a forward pass, far less than anybody notices.
const patience = 300 * time.Microsecond

// await polls until something is ready. It gives up, with false, after some time.
func await(most time.Duration, ready func() bool) bool {
	const polls = 16 // between two looks at the clock, about a microsecond
	for start := time.Now(); !ready(); {
		for range polls {
			pause()
		}
		if time.Since(start) > most {
			return ready()
		}
	}
	return true
}

// seat is where a helper waits for a loop: nil is a free seat, vacant a helper
// that has nothing to do.
type seat struct {
	loop atomic.Pointer[loop]
	_    [56]byte // seats on one cache line would disturb each other
}

var (
	seats  [128]seat // more helpers than that sleep at once
	vacant = new(loop)
)

// offer hands the loop to at most n waiting helpers, and returns to how many.
func (l *loop) offer(n int) (taken int) {
	for i := range seats {
		if taken == n {
			break
		}
		if seats[i].loop.CompareAndSwap(vacant, l) {
			taken++
		}
	}
	return taken
}

// waitForLoop takes a seat and returns the loop that is offered there, or nil after
// some time. At most one helper less than there are cores waits.
func waitForLoop(most time.Duration) (offered *loop) {
	for i := range min(runtime.GOMAXPROCS(0)-1, len(seats)) {
		s := &seats[i].loop
		if !s.CompareAndSwap(nil, vacant) {
			continue
		}
		if await(most, func() bool { return s.Load() != vacant }) || !s.CompareAndSwap(vacant, nil) {
			offered = s.Swap(nil)
		}
		return offered
	}
	return nil
}
