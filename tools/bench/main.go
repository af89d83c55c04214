// Command bench times the Go reference on a checkpoint: prefill and decode, with
// the machine's own limits (memory bandwidth, multiply-adds per second) measured
// in the same run. tools/bench/compare.py runs it beside other engines.
//
//	go run ./tools/bench --checkpoint DIR [--prefill 16,128,512] [--float64]
//
// It prints one line of JSON per measurement.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(2)
	}
}

// measurement is one line of the output.
type measurement struct {
	Engine  string  `json:"engine"`
	Work    string  `json:"work"`
	Seconds float64 `json:"seconds"` // the fastest of the repetitions
	Repeats int     `json:"repeats"`
	Threads int     `json:"threads"`
	// Rate is in bytes per second for bandwidth, in operations per second for
	// multiply-adds (two each), else 0.
	Rate float64 `json:"rate,omitempty"`
	Peak int64   `json:"peak_bytes,omitempty"` // of the process so far, mapped pages included
	Own  int64   `json:"own_bytes,omitempty"`  // of the Go heap and stacks
}

func run(ctx context.Context) error {
	path := flag.String("checkpoint", "", "checkpoint directory")
	lengths := flag.String("prefill", "16,128,512", "prompt lengths")
	float64s := flag.Bool("float64", false, "time the float64 truth of 160 tokens too")
	repeats := flag.Int("repeats", 3, "repetitions; the fastest counts")
	profile := flag.String("profile", "", "write a CPU profile to this file")
	limits := flag.Bool("limits", true, "measure the machine")
	decode := flag.Bool("decode", true, "time decoding")
	flag.Parse()
	if *path == "" {
		return fmt.Errorf("--checkpoint is missing")
	}
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	b := bench{ctx: ctx, repeats: *repeats}
	if *limits {
		b.limits()
	}
	var model *checkpoint.Model
	if err := b.time("open the checkpoint", func() (err error) {
		if model != nil {
			model.Close()
		}
		model, err = checkpoint.Open(*path)
		return err
	}); err != nil {
		return err
	}
	defer model.Close()
	b.model = model
	if *decode {
		if err := b.decode(); err != nil {
			return err
		}
	}
	for field := range strings.SplitSeq(*lengths, ",") {
		if field == "" {
			continue
		}
		n, err := strconv.Atoi(field)
		if err != nil {
			return err
		}
		for _, all := range []bool{true, false} {
			if err := b.prefill(n, all); err != nil {
				return err
			}
		}
	}
	if *float64s {
		return b.truth()
	}
	return nil
}

type bench struct {
	ctx     context.Context
	model   *checkpoint.Model
	repeats int
}

// time runs the work several times and reports the fastest.
func (b bench) time(work string, do func() error) error {
	best := time.Duration(0)
	for i := range b.repeats {
		start := time.Now()
		if err := do(); err != nil {
			return err
		}
		if took := time.Since(start); i == 0 || took < best {
			best = took
		}
		if err := b.ctx.Err(); err != nil {
			return err
		}
	}
	b.report(work, best.Seconds(), 0)
	return nil
}

func (b bench) report(work string, seconds, rate float64) {
	var heap runtime.MemStats
	runtime.ReadMemStats(&heap)
	line, err := json.Marshal(measurement{
		Engine: "gptoss", Work: work, Seconds: seconds, Repeats: b.repeats,
		Threads: runtime.GOMAXPROCS(0), Rate: rate, Peak: peak(), Own: int64(heap.Sys),
	})
	if err != nil {
		panic(err) // plain numbers
	}
	fmt.Println(string(line))
}

// peak is the process's largest resident set in bytes, 0 where Linux isn't.
func peak() int64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		var kilobytes int64
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kilobytes); err == nil {
			return kilobytes << 10
		}
	}
	return 0
}

func (b bench) tokens(n int) []int32 {
	return fixtures.Draw(1, "prompt.full", n, b.model.Config.VocabSize)
}

// prefill times a prompt in float32, with all logits or the last token's.
func (b bench) prefill(n int, all bool) error {
	work := fmt.Sprintf("prefill %d, last logits", n)
	if all {
		work = fmt.Sprintf("prefill %d, all logits", n)
	}
	tokens := b.tokens(n)
	return b.time(work, func() error {
		m := reference.New(b.model, reference.Single())
		if all {
			_, err := m.Forward(b.ctx, tokens, nil, reference.Observer[float32]{})
			return err
		}
		x := m.Embed(b.ctx, tokens, reference.Observer[float32]{})
		var cache reference.Cache[float32]
		for layer := range b.model.Config.Layers {
			x = m.Block(b.ctx, layer, x, &cache, reference.Observer[float32]{})
		}
		m.Logits(b.ctx, x[len(x)-b.model.Config.HiddenSize:], reference.Observer[float32]{})
		return b.ctx.Err()
	})
}

// decode times one token after a prompt of 16.
func (b bench) decode() error {
	m := reference.New(b.model, reference.Single())
	var cache reference.Cache[float32]
	tokens := b.tokens(16 + 4*b.repeats + 1)
	if _, err := m.Forward(b.ctx, tokens[:16], &cache, reference.Observer[float32]{}); err != nil {
		return err
	}
	var times []float64
	for at := 16; at < len(tokens); at++ {
		start := time.Now()
		if _, err := m.Forward(b.ctx, tokens[at:at+1], &cache, reference.Observer[float32]{}); err != nil {
			return err
		}
		times = append(times, time.Since(start).Seconds())
	}
	slices.Sort(times)
	median := times[len(times)/2]
	b.report("decode one token", median, float64(b.tokenBytes())/median)
	return nil
}

// tokenBytes is what a token must read: everything but the embedding and the
// experts that it does not choose.
func (b bench) tokenBytes() int64 {
	c := b.model.Config
	attention := c.HiddenSize * (c.QKVWidth() + c.QueryWidth()) * 2
	experts := c.ExpertsPerToken * 3 * c.IntermediateSize * c.HiddenSize * 17 / 32
	return int64(c.Layers)*int64(attention+experts) + int64(c.VocabSize)*int64(c.HiddenSize)*2
}

// truth times the float64 reference on 160 tokens.
func (b bench) truth() error {
	b.repeats = 1
	return b.time("float64, 160 tokens, all logits", func() error {
		m := reference.New(b.model, reference.Exact())
		_, err := m.Forward(b.ctx, b.tokens(160), nil, reference.Observer[float64]{})
		return err
	})
}
