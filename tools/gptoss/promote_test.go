package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/fixtures"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

func runPromote(t *testing.T, arguments ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), []*cobra.Command{promoteCommand()}, append([]string{"promote"}, arguments...), &out, &errs)
	return status, out.String(), errs.String()
}

func TestPromote(t *testing.T) {
	path := exportFixture(t, "toy", exporter.Options{SequenceLength: 16})
	dir := t.TempDir()
	transcript := filepath.Join(dir, "t.md")
	status, _, stderr := runCompare(t, "--checkpoint", fixtures.Dir("toy"), "--onnx", path, "--tokens", someTokens, "--transcript", transcript)
	require.Zero(t, status, stderr)
	promoted := filepath.Join(dir, "promoted")
	arguments := []string{"--onnx", path, "--transcript", transcript, "--directory", promoted}

	status, stdout, stderr := runPromote(t, append(arguments, "--name", "toy")...)
	require.Zero(t, status, stderr)
	require.Equal(t, filepath.Join(promoted, "toy")+"\n", stdout)
	for from, to := range map[string]string{path: "toy.onnx", path + ".data": "toy.onnx.data", transcript: promotedTranscript} {
		want, err := os.ReadFile(from)
		require.NoError(t, err)
		got, err := os.ReadFile(filepath.Join(promoted, "toy", to))
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	entries, err := os.ReadDir(promoted)
	require.NoError(t, err)
	require.Len(t, entries, 1)

	status, _, stderr = runPromote(t, append(arguments, "--name", "toy")...)
	require.Equal(t, exitInput, status)
	require.Contains(t, stderr, "--force")
	status, _, stderr = runPromote(t, append(arguments, "--name", "toy", "--force")...)
	require.Zero(t, status, stderr)
	status, _, stderr = runPromote(t, append(arguments, "--name", "../toy")...)
	require.Equal(t, exitInput, status)
	require.Contains(t, stderr, "--name")

	// A transcript proves nothing about other files, and a failed one nothing at all.
	text, err := os.ReadFile(transcript)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(transcript, bytes.Replace(text, []byte("verdict: pass"), []byte("verdict: fail"), 1), 0o644))
	status, _, stderr = runPromote(t, append(arguments, "--name", "other")...)
	require.Equal(t, exitInput, status)
	require.Contains(t, stderr, "every tensor matched")
	require.NoError(t, os.WriteFile(transcript, append(text, "- fail logits\n"...), 0o644))
	status, _, stderr = runPromote(t, append(arguments, "--name", "other")...)
	require.Equal(t, exitInput, status)
	require.Contains(t, stderr, "every tensor matched")
	require.NoError(t, os.WriteFile(transcript, text, 0o644))
	data, err := os.OpenFile(path+".data", os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = data.Write([]byte{0})
	require.NoError(t, err)
	require.NoError(t, data.Close())
	status, _, stderr = runPromote(t, append(arguments, "--name", "other")...)
	require.Equal(t, exitInput, status)
	require.Contains(t, stderr, "is not a transcript of")
}

// Every promoted graph can be made again, bit for bit, from its checkpoint.
func TestPromotedGraphsAreStillMadeLikeThat(t *testing.T) {
	graphs, err := filepath.Glob(filepath.Join("..", "..", "golden", "promoted", "*", "*.onnx"))
	require.NoError(t, err)
	require.NotEmpty(t, graphs, "no promoted artifact: nothing would be tested")
	checkpoints := map[string]string{} // by digest
	for _, name := range fixtures.Names() {
		m, err := checkpoint.Open(fixtures.Dir(name))
		if err != nil {
			continue // stored in a compact form
		}
		digest, err := m.Digest(t.Context())
		require.NoError(t, err)
		checkpoints[digest] = fixtures.Dir(name)
		require.NoError(t, m.Close())
	}
	for _, path := range graphs {
		t.Run(filepath.Base(filepath.Dir(path)), func(t *testing.T) {
			graph, err := readGraph(path)
			require.NoError(t, err)
			o, digest, err := exporter.OptionsOf(graph)
			require.NoError(t, err)
			require.Contains(t, checkpoints, digest, "no fixture is the checkpoint that this was made from")
			m, err := checkpoint.Open(checkpoints[digest])
			require.NoError(t, err)
			defer m.Close()
			again := filepath.Join(t.TempDir(), filepath.Base(path))
			require.NoError(t, exporter.Export(t.Context(), m, again, o))
			for _, suffix := range []string{"", ".data"} {
				want, err := os.ReadFile(path + suffix)
				require.NoError(t, err)
				got, err := os.ReadFile(again + suffix)
				require.NoError(t, err)
				require.True(t, bytes.Equal(want, got), "%s differs from what is exported now", path+suffix)
			}
			f := promoteFlags{onnx: path}
			transcript, err := os.ReadFile(filepath.Join(filepath.Dir(path), promotedTranscript))
			require.NoError(t, err)
			require.NoError(t, f.proves(t.Context(), string(transcript)))
		})
	}
}
