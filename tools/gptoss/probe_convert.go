package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// oracleDirectory returns a directory that tools/oracles can load: the
// checkpoint's own if it is one in OpenAI's or Hugging Face's layout and was read
// as it is, or a temporary one. cleanup removes what was made.
func oracleDirectory(ctx context.Context, m *checkpoint.Model, o checkpoint.Options) (dir string, cleanup func(), err error) {
	layout := m.Source.Layout
	if (layout == checkpoint.OpenAI || layout == checkpoint.HuggingFace) && o == (checkpoint.Options{}) {
		if _, err := os.Stat(filepath.Join(m.Source.Path, "config.json")); err == nil {
			return m.Source.Path, func() {}, nil
		}
	}
	scratch, err := os.MkdirTemp("", "gptoss-probe-")
	if err != nil {
		return "", nil, err
	}
	cleanup = func() { os.RemoveAll(scratch) }
	// OpenAI's layout holds MXFP4 experts only; any others go to Hugging Face's.
	dir = filepath.Join(scratch, "openai")
	if err = m.Write(ctx, checkpoint.OpenAI, dir, checkpoint.WriteOptions{}); err != nil && ctx.Err() == nil {
		dir = filepath.Join(scratch, "huggingface")
		err = m.Write(ctx, checkpoint.HuggingFace, dir, checkpoint.WriteOptions{Experts: checkpoint.ExpertsDense})
	}
	if err != nil {
		cleanup()
		return "", nil, err
	}
	return dir, cleanup, nil
}
