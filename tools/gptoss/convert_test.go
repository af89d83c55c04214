package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/reference/tensor"
)

const (
	toyFixture = "../../fixtures/toy"
	layouts    = "../../reference/checkpoint/testdata"
)

// gptoss runs a command line and returns its status and what it printed.
func gptoss(t *testing.T, arguments ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = run(t.Context(), commands(), arguments, &out, &errs)
	return status, out.String(), errs.String()
}

// inspectedDigest runs inspect --json.
func inspectedDigest(t *testing.T, arguments ...string) string {
	status, stdout, stderr := gptoss(t, append([]string{"inspect", "--json"}, arguments...)...)
	require.Zero(t, status, stderr)
	var got inspection
	require.NoError(t, json.Unmarshal([]byte(stdout), &got))
	require.True(t, strings.HasPrefix(got.Digest, "sha256:"))
	return got.Digest
}

func TestConvertAndInspect(t *testing.T) {
	want := inspectedDigest(t, toyFixture)
	for _, test := range []struct {
		to    string
		flags []string
	}{
		{"openai", nil},
		{"openai", []string{"--shard-size", "100KB"}},
		{"huggingface", nil},
		{"huggingface", []string{"--experts", "dense", "--shard-size", "64KiB"}},
		{"flax", nil},
		{"flax", []string{"--dtype", "float32"}},
		{"equinox", nil},
		{"equinox", []string{"--dtype", "bfloat16"}},
	} {
		output := filepath.Join(t.TempDir(), "x")
		status, stdout, stderr := gptoss(t, append([]string{"convert", "--from", toyFixture, "--to", test.to, "--output", output}, test.flags...)...)
		require.Zero(t, status, stderr)
		require.Empty(t, stdout)
		require.Empty(t, stderr, "quiet where there is no terminal")
		require.Equal(t, want, inspectedDigest(t, output), test)

		cut := filepath.Join(t.TempDir(), "y")
		status, _, stderr = gptoss(t, "convert", "--from", output, "--to", "openai", "--output", cut, "--layers", "2")
		require.Zero(t, status, stderr)
		status, stdout, _ = gptoss(t, "inspect", cut)
		require.Zero(t, status)
		require.Contains(t, stdout, "layers             2\n")
	}
}

// Every layout gives the same logits to the last bit, in float64 and bfloat16.
func TestForwardIsTheSameFromEveryLayout(t *testing.T) {
	logits := func(precision string, arguments ...string) tensor.Tensor {
		output := filepath.Join(t.TempDir(), "out.safetensors")
		status, _, stderr := gptoss(t, append([]string{"forward", "--tokens", "1,2,3,4,5,10,0,7", "--precision", precision, "--output", output, "--checkpoint"}, arguments...)...)
		require.Zero(t, status, stderr)
		all, err := tensor.ReadSafetensors(output)
		require.NoError(t, err)
		require.Contains(t, all, "logits")
		return all["logits"]
	}
	for _, precision := range []string{"float64", "bfloat16"} {
		want := logits(precision, filepath.Join(layouts, "openai"))
		for _, arguments := range [][]string{
			{filepath.Join(layouts, "flax_bfloat16.msgpack")},
			{filepath.Join(layouts, "flax_chunked.msgpack")},
			{filepath.Join(layouts, "equinox_bfloat16.eqx"), "--undo-gate-bias"},
			{filepath.Join(layouts, "equinox_float32.eqx"), "--undo-gate-bias"},
		} {
			require.Equal(t, want, logits(precision, arguments...), arguments)
		}
		for _, flags := range [][]string{{}, {"--experts", "dense"}, {"--shard-size", "20KB"}} {
			output := filepath.Join(t.TempDir(), "x")
			status, _, stderr := gptoss(t, append([]string{"convert", "--from", filepath.Join(layouts, "openai"), "--to", "huggingface", "--output", output}, flags...)...)
			require.Zero(t, status, stderr)
			require.Equal(t, want, logits(precision, output), flags)
		}
	}
}

// The fixtures from every layout: the same digest, and the same outputs bit for bit.
func TestFixturesFromEveryLayout(t *testing.T) {
	for _, name := range []string{"toy", "toy128", "edge"} {
		fixture := filepath.Join("..", "..", "fixtures", name)
		run := func(path string) map[string]tensor.Tensor {
			output := filepath.Join(t.TempDir(), "out.safetensors")
			status, _, stderr := gptoss(t, "forward", "--checkpoint", path, "--tokens", "1,2,3,4,5,10,0,7,200,9,11,12,13,14,15", "--taps", "all", "--output", output)
			require.Zero(t, status, stderr)
			all, err := tensor.ReadSafetensors(output)
			require.NoError(t, err)
			return all
		}
		sum, want := inspectedDigest(t, fixture), run(fixture)
		for _, to := range [][]string{{"openai", "--shard-size", "100KB"}, {"huggingface"}, {"huggingface", "--experts", "dense"}, {"flax"}, {"flax", "--dtype", "float32"}, {"equinox"}} {
			output := filepath.Join(t.TempDir(), "x")
			status, _, stderr := gptoss(t, append([]string{"convert", "--from", fixture, "--output", output, "--to"}, to...)...)
			require.Zero(t, status, stderr)
			require.Equal(t, sum, inspectedDigest(t, output), "%s as %s", name, to)
			got := run(output)
			require.Len(t, got, len(want))
			for tap := range want {
				require.True(t, bytes.Equal(want[tap].Data, got[tap].Data), "%s of %s as %s", tap, name, to)
			}
		}
	}
}

func TestInspectText(t *testing.T) {
	status, stdout, stderr := gptoss(t, "inspect", filepath.Join(layouts, "openai"))
	require.Zero(t, status, stderr)
	for _, line := range []string{
		"layout   openai\n",
		"digest   sha256:",
		"size     50,460 bytes in 33 tensors in 1 files\n",
		"sliding window     3 keys in layers 0\n",
		"block.1.mlp.mlp2_weight.scales  U8     [3 64 1]     192",
	} {
		assert.Contains(t, stdout, line)
	}
	_, fast, _ := gptoss(t, "inspect", "--no-digest", filepath.Join(layouts, "openai"))
	assert.NotContains(t, fast, "digest")
}

func TestGateBiasIsReportedAndUndone(t *testing.T) {
	file := filepath.Join(layouts, "equinox_bfloat16.eqx")
	status, _, stderr := gptoss(t, "inspect", file)
	require.Zero(t, status)
	require.Contains(t, stderr, "gptoss: note: ")
	require.Equal(t, inspectedDigest(t, filepath.Join(layouts, "openai")), inspectedDigest(t, file, "--undo-gate-bias"))
}

func TestConvertRefuses(t *testing.T) {
	wide := filepath.Join(t.TempDir(), "wide.msgpack")
	status, _, stderr := gptoss(t, "convert", "--from", toyFixture, "--to", "flax", "--output", wide)
	require.Zero(t, status, stderr)
	bundle, err := os.ReadFile(wide)
	require.NoError(t, err)
	// The last value of block_0's mlp1_weight, made 1.0078125: no MXFP4 with the others.
	at := bytes.Index(bundle, []byte("mlp2_bias"))
	bundle[at-10-2], bundle[at-10-1] = 0x81, 0x3f
	odd := filepath.Join(t.TempDir(), "odd.msgpack")
	require.NoError(t, os.WriteFile(odd, bundle, 0o666))
	text, err := os.ReadFile(strings.TrimSuffix(wide, ".msgpack") + ".config.json")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(strings.TrimSuffix(odd, ".msgpack")+".config.json", text, 0o666))

	for _, test := range []struct {
		name, want string
		arguments  []string
	}{
		{"no input", "no such file", []string{"--from", "/no/such", "--to", "flax"}},
		{"no layout", `no layout is called "gguf"`, []string{"--from", toyFixture, "--to", "gguf"}},
		{"no output", "required flag(s) \"output\" not set", nil},
		{"too many layers", "has 3 layers, so it can't be cut to 4", []string{"--from", toyFixture, "--to", "flax", "--layers", "4"}},
		{"no layers", "can't be cut to 0", []string{"--from", toyFixture, "--to", "flax", "--layers", "0"}},
		{"dtype", "--dtype is bfloat16, float32 or float16, not \"int8\"", []string{"--from", toyFixture, "--to", "flax", "--dtype", "int8"}},
		{"shard size", `--shard-size: "5 apples" is no size`, []string{"--from", toyFixture, "--to", "openai", "--shard-size", "5 apples"}},
		{"shard size of nothing", "is no size", []string{"--from", toyFixture, "--to", "openai", "--shard-size", "0"}},
		{"no MXFP4", `tensor "block.0.mlp.mlp1_weight.blocks" can't hold the source exactly`, []string{"--from", odd, "--to", "openai"}},
		{"configuration that does not fit", "calls for", []string{"--from", toyFixture, "--to", "flax", "--config", filepath.Join(layouts, "openai", "config.json")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			parent := t.TempDir()
			arguments := append([]string{"convert"}, test.arguments...)
			if test.arguments != nil {
				arguments = append(arguments, "--output", filepath.Join(parent, "x"))
			} else {
				arguments = append(arguments, "--from", toyFixture, "--to", "flax")
			}
			status, stdout, stderr := gptoss(t, arguments...)
			require.Equal(t, exitInput, status)
			require.Empty(t, stdout)
			require.Contains(t, stderr, test.want)
			require.True(t, strings.HasPrefix(stderr, "gptoss: "))
			require.Equal(t, 1, strings.Count(stderr, "\n"))
			entries, err := os.ReadDir(parent)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
	t.Run("over itself", func(t *testing.T) {
		status, _, stderr := gptoss(t, "convert", "--from", wide, "--to", "flax", "--output", wide)
		require.Equal(t, exitInput, status)
		require.Contains(t, stderr, "--output is what --from reads")
	})
	t.Run("rounded when asked", func(t *testing.T) {
		status, _, stderr := gptoss(t, "convert", "--from", odd, "--to", "openai", "--quantize", "--output", filepath.Join(t.TempDir(), "x"))
		require.Zero(t, status, stderr)
	})
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{"": 0, "5": 5, "5B": 5, "2KB": 2000, "3KiB": 3072, "1GB": 1e9, "4GiB": 4 << 30} {
		got, err := parseSize(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got)
	}
	for _, text := range []string{"GB", "-5", "5TB", "5 GB", "1.5GB", "99999999999999999999", "9999999999999GiB"} {
		_, err := parseSize(text)
		require.Error(t, err, text)
	}
}
