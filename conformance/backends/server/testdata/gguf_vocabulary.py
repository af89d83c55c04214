"""Writes a checkpoint (OpenAI's layout) with gpt-oss's vocabulary as GGUF, for
llama-server.

  go run ./conformance/backends/server/testdata/vocabulary.go > tokens.tiktoken
  python conformance/backends/server/testdata/gguf_vocabulary.py CHECKPOINT tokens.tiktoken OUT.gguf

A checkpoint with a vocabulary of its own (the fixtures toy, toy128 and edge) gets
one of numbers: llama-server wants text for every id, and leaves out of its answer
what is no whole character. Needs what tools/bench/gguf_checkpoint.py needs, which writes the tensors.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[4] / "tools" / "bench"))
import gguf_checkpoint  # noqa: E402
import vocabulary  # noqa: E402
from gguf_checkpoint import gguf  # noqa: E402


def add_vocabulary(writer, size, path):
    ordinary, special = vocabulary.read(path)
    if size < len(ordinary):
        ordinary, special = [b"%d;" % id for id in range(size)], []
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([vocabulary.spell(t) for t in ordinary] + special)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(ordinary) + [gguf.TokenType.CONTROL] * len(special))
    # llama.cpp does not load a model without any: numbers get one that makes nothing.
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges(ordinary)] if special else ["! !"])
    writer.add_add_bos_token(False)
    if special:
        ids = {text: len(ordinary) + i for i, text in enumerate(special)}
        writer.add_bos_token_id(ids["<|startoftext|>"])
        writer.add_eos_token_id(ids["<|return|>"])
        writer.add_pad_token_id(ids["<|endoftext|>"])


def main(source, tokens, target):
    # The benchmark's file has no vocabulary; ours comes in the same place.
    size = json.loads((Path(source) / "config.json").read_text())["vocab_size"]

    class Writer(gguf.GGUFWriter):
        def add_tokenizer_model(self, model):
            if model == "no_vocab":
                add_vocabulary(self, size, tokens)
            else:
                super().add_tokenizer_model(model)

    gguf_checkpoint.gguf.GGUFWriter = Writer
    gguf_checkpoint.main(source, target)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
