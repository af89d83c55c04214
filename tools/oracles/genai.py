"""Exports a checkpoint with onnxruntime-genai's builder, for the CPU, and stores the
logits of the graph that it writes.

  build/genai/bin/python tools/oracles/genai.py --checkpoint fixtures/toy \
      --precision float16 --tokens 1,2,3 --output out.safetensors [--graph DIR]

It has an environment of its own (`make genai`). Its float32 graph is right; its
float16 graph for the CPU silently has neither attention sinks nor a window, which
the judge must find. The builder does not list that combination, but writes it.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import run as oracle  # sets the threads before torch is loaded
import numpy as np
import onnxruntime
import torch
from onnxruntime_genai.models import builder

from checkpoints import Checkpoint

PRECISIONS = {"float32": "fp32", "float16": "fp16"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def placeholder_tokenizer(directory):
    """The builder insists on a tokenizer, which our tokens do not need."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"0": 0, "1": 1}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0", bos_token="1").save_pretrained(directory)


def export(checkpoint: Checkpoint, precision: str, directory: Path):
    """Writes model.onnx into directory, from a dense Hugging Face twin."""
    with tempfile.TemporaryDirectory(prefix="gptoss-genai-") as twin:
        checkpoint.write_huggingface(twin)
        placeholder_tokenizer(twin)
        options = builder.parse_extra_options("", twin, str(directory), PRECISIONS[precision], "cpu", str(directory / "cache"), ["windowed_kv_cache=false"])
        builder.create_model("", twin, str(directory), PRECISIONS[precision], "cpu", str(directory / "cache"), **options)
    return directory / "model.onnx"


def logits(graph: Path, config, tokens):
    """One run of the whole sequence with an empty cache."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = oracle.THREADS
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            feeds[value.name] = np.array([tokens], np.int64)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, len(tokens)), np.int64)
        elif value.name == "position_ids":
            feeds[value.name] = np.arange(len(tokens), dtype=np.int64)[None]
        elif value.name.startswith("past_key_values"):
            empty = (1, config["num_key_value_heads"], 0, config["head_dim"])
            feeds[value.name] = np.zeros(empty, DTYPES[value.type])
        else:
            raise SystemExit(f"{graph}: what is the input {value.name}?")
    return torch.from_numpy(session.run(["logits"], feeds)[0][0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="directory in OpenAI's or Hugging Face's layout")
    parser.add_argument("--precision", required=True, choices=PRECISIONS)
    parser.add_argument("--tokens", required=True, help="1,2,3 or a JSON file")
    parser.add_argument("--prompt", default="full", help="which prompt of a JSON file that has several")
    parser.add_argument("--graph", type=Path, help="keep the graph in this directory")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    tokens = oracle.parse_tokens(arguments.tokens, arguments.prompt)
    with tempfile.TemporaryDirectory(prefix="gptoss-genai-") as scratch:
        checkpoint = Checkpoint(arguments.checkpoint)
        graph = export(checkpoint, arguments.precision, Path(scratch))
        about = {"implementation": "onnxruntime-genai", "precision": arguments.precision}
        oracle.save(arguments.output, {"logits": logits(graph, checkpoint.config, tokens)}, about)
        if arguments.graph:
            arguments.graph.mkdir(parents=True, exist_ok=True)
            for file in graph.parent.glob("model.onnx*"):
                shutil.copyfile(file, arguments.graph / file.name)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
