package checkpoint

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/config"
	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

// full is gpt-oss-20b's configuration with another number of layers.
func full(layers int) config.Config {
	return config.Config{
		Layers: layers, Experts: 32, ExpertsPerToken: 4, VocabSize: 201088,
		HiddenSize: 2880, IntermediateSize: 2880, HeadDim: 64, Heads: 64, KVHeads: 8,
		SlidingWindow: 128, Sliding: config.Alternating(layers),
		InitialContextLength: 4096, RopeTheta: 150000, RopeScalingFactor: 32, RopeNTKAlpha: 1, RopeNTKBeta: 32,
		SwiGLULimit: 7, SwiGLUAlpha: config.OpenAISwiGLUAlpha, NormEpsilon: config.OpenAINormEpsilon,
	}
}

// repeated is a matrix of any size with few different rows.
type repeated struct {
	Dense
	rows int
}

func (m repeated) Dims() (int, int) { return m.rows, m.ColCount }

func (m repeated) Rows(dst []float32, from, n int) {
	for r := range n {
		m.Dense.Rows(dst[r*m.ColCount:(r+1)*m.ColCount], (from+r)%m.RowCount, 1)
	}
}

// synthetic is a model of real widths in little memory; experts are MXFP4.
func synthetic(c config.Config) *Model {
	r := rand.New(rand.NewPCG(5, 6))
	vector := func(n int) []float32 {
		v := make([]float32, n)
		for i := range v {
			v[i] = tensor.BFloat16(tensor.ToBFloat16(float32(r.NormFloat64())))
		}
		return v
	}
	matrix := func(rows, cols int) Matrix {
		return repeated{Dense{61, cols, vector(61 * cols)}, rows}
	}
	expert := func(rows, cols int) Matrix {
		m := MXFP4{61, cols, make([]byte, 61*cols/2), make([]byte, 61*cols/32)}
		for i := range m.Blocks {
			m.Blocks[i] = byte(r.Uint32())
		}
		for i := range m.Scales {
			m.Scales[i] = byte(116 + r.IntN(8))
		}
		return repeated{decode(m).(Dense), rows}
	}
	m := &Model{Config: c, Embedding: matrix(c.VocabSize, c.HiddenSize), FinalNorm: vector(c.HiddenSize)}
	m.Unembedding = m.Embedding
	for range c.Layers {
		b := Block{
			AttnNorm: vector(c.HiddenSize), QKV: matrix(c.QKVWidth(), c.HiddenSize), QKVBias: vector(c.QKVWidth()),
			Sinks: vector(c.Heads), Out: matrix(c.HiddenSize, c.QueryWidth()), OutBias: vector(c.HiddenSize),
			MLPNorm: vector(c.HiddenSize), Gate: matrix(c.Experts, c.HiddenSize), GateBias: vector(c.Experts),
		}
		mlp1, mlp2 := expert(2*c.IntermediateSize, c.HiddenSize), expert(c.HiddenSize, c.IntermediateSize)
		for range c.Experts {
			b.MLP1, b.MLP1Bias = append(b.MLP1, mlp1), append(b.MLP1Bias, vector(2*c.IntermediateSize))
			b.MLP2, b.MLP2Bias = append(b.MLP2, mlp2), append(b.MLP2Bias, vector(c.HiddenSize))
		}
		m.Blocks = append(m.Blocks, b)
	}
	return m
}

// peak reports processor time and the largest resident memory since the last
// call of restart, where Linux says so.
func peak(b *testing.B) {
	b.ReportMetric(cpuSeconds()-started, "cpu-s")
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return
	}
	var kilobytes float64
	if _, after, ok := strings.Cut(string(status), "VmHWM:"); ok {
		fmt.Sscan(after, &kilobytes)
		b.ReportMetric(kilobytes/1024, "MiB-peak")
	}
}

// cpuSeconds returns the processor time of this process, where Linux says so.
func cpuSeconds() float64 {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return 0
	}
	// After the name, which may have spaces: fields 3 on; 14 and 15 are user and
	// system time in hundredths of a second.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var user, system float64
	fmt.Sscan(fields[11], &user)
	fmt.Sscan(fields[12], &system)
	return (user + system) / 100
}

// started is the processor time at the last restart.
var started float64

// restart makes the next peak and processor time count from now.
func restart(m *Model) {
	m.Release()
	started = cpuSeconds()
	runtime.GC()
	debug.FreeOSMemory()
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) // elsewhere the peak counts from the start
}

// sizeOf returns the bytes of all files in a directory.
func sizeOf(b *testing.B, directory string) (total int64) {
	entries, err := os.ReadDir(directory)
	require.NoError(b, err)
	for _, e := range entries {
		info, err := e.Info()
		require.NoError(b, err)
		total += info.Size()
	}
	return total
}

// BenchmarkOpen opens 24 layers of real width, 13.8 GB. The file is sparse: its
// headers and small tensors are what is read.
func BenchmarkOpen(b *testing.B) {
	directory := b.TempDir()
	c := full(24)
	p := plan{Model: synthetic(full(1)), options: WriteOptions{}}
	p.Model.Config = c
	for len(p.Model.Blocks) < c.Layers {
		p.Model.Blocks = append(p.Model.Blocks, p.Model.Blocks[0])
	}
	require.NoError(b, p.chooseTypes(b.Context(), OpenAI))
	outputs, _, err := p.openAI(directory)
	require.NoError(b, err)
	for _, o := range outputs {
		file, err := os.Create(o.path)
		require.NoError(b, err)
		for _, r := range o.fixed {
			_, err := file.WriteAt(r.data, r.at)
			require.NoError(b, err)
		}
		require.NoError(b, file.Truncate(o.size))
		require.NoError(b, file.Close())
	}
	for b.Loop() {
		m, err := Open(directory)
		require.NoError(b, err)
		require.NoError(b, m.Close())
	}
}

// BenchmarkConvert writes two layers of real width in every layout, and copies
// the same bytes with cp beside it. It also indexes the Flax bundle (5.5 GB) and
// computes digests. It needs 15 GB in the temporary directory.
func BenchmarkConvert(b *testing.B) {
	directory := b.TempDir()
	source := filepath.Join(directory, "source")
	m := synthetic(full(2))
	require.NoError(b, m.Write(b.Context(), OpenAI, source, WriteOptions{}))
	m, err := Open(source)
	require.NoError(b, err)
	defer m.Close()

	for _, to := range []struct {
		name, layout string
		options      WriteOptions
	}{
		{"openai", OpenAI, WriteOptions{}},
		{"huggingface", HuggingFace, WriteOptions{}},
		{"huggingface-dense", HuggingFace, WriteOptions{Experts: ExpertsDense}},
		{"flax", Flax, WriteOptions{}},
		{"equinox-bfloat16", Equinox, WriteOptions{DType: tensor.BF16}},
	} {
		target := filepath.Join(directory, "target")
		b.Run("to="+to.name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				require.NoError(b, os.RemoveAll(target))
				restart(m)
				b.StartTimer()
				require.NoError(b, m.Write(b.Context(), to.layout, target, to.options))
			}
			b.SetBytes(sizeOf(b, target))
			peak(b)
		})
		b.Run("cp="+to.name, func(b *testing.B) {
			size := sizeOf(b, target)
			copied := filepath.Join(directory, "copied")
			for b.Loop() {
				b.StopTimer()
				require.NoError(b, os.RemoveAll(copied))
				b.StartTimer()
				require.NoError(b, exec.Command("cp", "-r", target, copied).Run())
			}
			b.SetBytes(size)
			require.NoError(b, os.RemoveAll(copied))
		})
		got, err := Open(target)
		require.NoError(b, err)
		b.Run("open="+to.name, func(b *testing.B) {
			for b.Loop() {
				again, err := Open(target)
				require.NoError(b, err)
				require.NoError(b, again.Close())
			}
		})
		b.Run("digest="+to.name, func(b *testing.B) {
			for b.Loop() {
				_, err := got.Digest(b.Context())
				require.NoError(b, err)
			}
			b.SetBytes(sizeOf(b, target))
		})
		if to.layout != OpenAI {
			back := filepath.Join(directory, "back")
			b.Run(fmt.Sprintf("from=%s", to.name), func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					require.NoError(b, os.RemoveAll(back))
					restart(got)
					b.StartTimer()
					require.NoError(b, got.Write(b.Context(), OpenAI, back, WriteOptions{}))
				}
				b.SetBytes(sizeOf(b, back))
				peak(b)
			})
			require.NoError(b, os.RemoveAll(back))
		}
		require.NoError(b, got.Close())
		require.NoError(b, os.RemoveAll(target))
	}
}
