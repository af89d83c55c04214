"""Writes a fixture's twin in Hugging Face's layout: MXFP4, two shards and an index.

  python tools/oracles/twin.py toy

Checked before it is kept: transformers loads it and gives the logits that it
gives for the dense twin of the OpenAI directory, to the last bit.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import run as oracle
import torch

from checkpoints import Checkpoint

ROOT = Path(__file__).resolve().parents[2]


def main():
    for fixture in sys.argv[1:]:
        source, target = ROOT / "fixtures" / fixture, ROOT / "fixtures" / "huggingface" / fixture
        with tempfile.TemporaryDirectory(prefix="gptoss-twin-") as directory:
            Checkpoint(source).write_huggingface(directory, packed=True, shards=2)
            tokens = list(range(10))
            ours = oracle.execute("transformers", "float32", source, tokens)["logits"]
            theirs = oracle.execute("transformers", "float32", directory, tokens)["logits"]
            if not torch.equal(ours, theirs):
                raise SystemExit(f"twin: transformers reads {directory} otherwise than {source}")
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(directory).iterdir()):
                shutil.copyfile(file, target / file.name)


if __name__ == "__main__":
    main()
