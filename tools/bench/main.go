// Command bench times the Go reference on a checkpoint, prefill and decode, or
// measures the machine's own limits: memory bandwidth, multiply-adds per second.
// tools/bench/compare.py runs it beside other engines.
//
//	go run ./tools/bench --checkpoint DIR [--prefill 16,128,512] [--float64]
//	go run ./tools/bench --limits
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
	Work    string  `json:"work"`
	Seconds float64 `json:"seconds,omitempty"` // the fastest of the repetitions
	Threads int     `json:"threads"`
	// Rate is a limit: bytes per second, or operations per second (a multiply-add
	// is two).
	Rate float64 `json:"rate,omitempty"`
}

func run(ctx context.Context) error {
	path := flag.String("checkpoint", "", "checkpoint directory")
	lengths := flag.String("prefill", "16,128,512", "prompt lengths")
	float64s := flag.Bool("float64", false, "time the float64 truth of 160 tokens too")
	repeats := flag.Int("repeats", 3, "repetitions; the fastest counts")
	profile := flag.String("profile", "", "write a CPU profile to this file")
	limits := flag.Bool("limits", false, "measure the machine and nothing else")
	decode := flag.Bool("decode", true, "time decoding")
	flag.Parse()
	b := bench{ctx: ctx, repeats: *repeats}
	if *limits {
		b.limits()
		return nil
	}
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

// patience is how long a piece of work may take in all before it is not repeated:
// what takes seconds is not disturbed by moments.
const patience = 6 * time.Second

// time runs the work several times and reports the fastest.
func (b bench) time(work string, do func() error) error {
	var best, total time.Duration
	for i := range b.repeats {
		start := time.Now()
		if err := do(); err != nil {
			return err
		}
		took := time.Since(start)
		if i == 0 || took < best {
			best = took
		}
		if err := b.ctx.Err(); err != nil {
			return err
		}
		if total += took; total > patience {
			break
		}
	}
	report(work, best.Seconds(), 0)
	return nil
}

func report(work string, seconds, rate float64) {
	line, err := json.Marshal(measurement{Work: work, Seconds: seconds, Threads: runtime.GOMAXPROCS(0), Rate: rate})
	if err != nil {
		panic(err) // plain numbers
	}
	fmt.Println(string(line))
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

// decode times 16 tokens, one by one, after a prompt of 16.
func (b bench) decode() error {
	const prompt, steps = 16, 16
	m := reference.New(b.model, reference.Single())
	tokens := b.tokens(prompt + steps)
	best := 0.0
	for i := range b.repeats {
		var cache reference.Cache[float32]
		if _, err := m.Forward(b.ctx, tokens[:prompt], &cache, reference.Observer[float32]{}); err != nil {
			return err
		}
		start := time.Now()
		for at := range steps {
			if _, err := m.Forward(b.ctx, tokens[prompt+at:][:1], &cache, reference.Observer[float32]{}); err != nil {
				return err
			}
		}
		if took := time.Since(start).Seconds() / steps; i == 0 || took < best {
			best = took
		}
	}
	report("decode one token", best, 0)
	return nil
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
