package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/conformance"
	"github.com/gptoss-conformance/gptoss/exporter"
	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
)

// promoteFlags are the flags of `gptoss promote`.
type promoteFlags struct {
	onnx, transcript, name, directory string
	force                             bool
}

// promotedTranscript is the transcript's name in a promoted artifact.
const promotedTranscript = "transcript.md"

// promoteCommand keeps a graph that was proved right, with the proof.
func promoteCommand() *cobra.Command {
	var f promoteFlags
	command := &cobra.Command{
		Use:   "promote --onnx M.onnx --transcript FILE.md --name NAME",
		Short: "Keep a graph that compare passed, with the transcript that says so",
		Long: `Keep a graph that compare passed, with its weights and the transcript that says
so, in golden/promoted/NAME. The transcript must be of these very files, and all
tensors in it must match. A test exports each promoted graph again and expects
the same bytes.`,
		Example: `  gptoss compare --checkpoint fixtures/toy --onnx toy.onnx --tokens 1,2,3 --transcript toy.md
  gptoss promote --onnx toy.onnx --transcript toy.md --name toy`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.promote(cmd.Context(), cmd.OutOrStdout())
		},
	}
	flags := command.Flags()
	flags.StringVar(&f.onnx, "onnx", "", "graph of gptoss export")
	flags.StringVar(&f.transcript, "transcript", "", "transcript of gptoss compare")
	flags.StringVar(&f.name, "name", "", "what to call it: letters, digits, dots and dashes")
	flags.StringVar(&f.directory, "directory", filepath.Join("golden", "promoted"), "where promoted artifacts are")
	flags.BoolVar(&f.force, "force", false, "replace an artifact of that name")
	for _, name := range []string{"onnx", "transcript", "name"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was defined above
		}
	}
	return command
}

var artifactName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.-]*$`)

func (f promoteFlags) promote(ctx context.Context, stdout io.Writer) error {
	if !artifactName.MatchString(f.name) {
		return fmt.Errorf("--name: %q: use letters, digits, dots and dashes", f.name)
	}
	graph, err := readGraph(f.onnx)
	if err != nil {
		return err
	}
	if _, _, err := exporter.OptionsOf(graph); err != nil {
		return fmt.Errorf("%s: %w", f.onnx, err)
	}
	transcript, err := os.ReadFile(f.transcript)
	if err != nil {
		return err
	}
	if err := f.proves(ctx, string(transcript)); err != nil {
		return fmt.Errorf("%s: %w", f.transcript, err)
	}
	target := filepath.Join(f.directory, f.name)
	if _, err := os.Stat(target); err == nil && !f.force {
		return fmt.Errorf("%s exists: use --force to replace it", target)
	}
	if err := f.copy(ctx, target); err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, target)
	return err
}

func readGraph(path string) (*onnxpb.ModelProto, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	graph := new(onnxpb.ModelProto)
	if err := proto.Unmarshal(data, graph); err != nil {
		return nil, fmt.Errorf("%s is not an ONNX graph: %w", path, err)
	}
	return graph, nil
}

// proves checks that a transcript is of these files and that all tensors matched.
func (f promoteFlags) proves(ctx context.Context, transcript string) error {
	for fact, path := range map[string]string{factGraph: f.onnx, factWeights: f.onnx + ".data"} {
		digest, err := fileDigest(ctx, path)
		if err != nil {
			return err
		}
		if !strings.Contains(transcript, fmt.Sprintf("| %s | %s |\n", fact, digest)) {
			return fmt.Errorf("is not a transcript of %s (%s)", path, digest)
		}
	}
	before, issues, found := strings.Cut(transcript, "\n"+issuesLine+"\n")
	if !found || !strings.Contains(before, "\n"+verdictLine+string(conformance.Pass)+"\n") || strings.TrimSpace(issues) != "" {
		return errors.New("does not say that every tensor matched")
	}
	return nil
}

// copy puts the files into a directory that gets its name when it is complete.
func (f promoteFlags) copy(ctx context.Context, target string) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(target), "."+f.name+".*.tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o755); err != nil {
		return err
	}
	for from, to := range map[string]string{
		f.onnx: filepath.Base(f.onnx), f.onnx + ".data": filepath.Base(f.onnx) + ".data", f.transcript: promotedTranscript,
	} {
		if err := copyFile(ctx, from, filepath.Join(work, to)); err != nil {
			return err
		}
	}
	return replaceDirectory(work, target)
}

// replaceDirectory renames a directory to a name that an older one may have,
// which it removes only when the new one is in its place.
func replaceDirectory(work, target string) error {
	older := work + ".older"
	err := os.Rename(target, older)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	hadOlder := err == nil
	if err := os.Rename(work, target); err != nil {
		if hadOlder {
			err = errors.Join(err, os.Rename(older, target))
		}
		return err
	}
	return os.RemoveAll(older)
}

func copyFile(ctx context.Context, from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, cancellable{ctx, in})
	return err
}

// cancellable is a reader that ends with its context.
type cancellable struct {
	ctx context.Context
	io.Reader
}

func (c cancellable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.Reader.Read(p)
}
