"""Runs one real implementation of gpt-oss on a checkpoint and stores its taps.

  python tools/oracles/run.py --implementation torch --precision float64 \
      --checkpoint fixtures/toy --tokens 1,2,3 --taps all --output out.safetensors

The checkpoint is a directory in OpenAI's or Hugging Face's layout. The output
is a safetensors file with the registry's names (reference/taps/taps.go); its
metadata says what made it.
"""

import argparse
import importlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path

THREADS = int(os.environ.get("ORACLE_THREADS", "2"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("XLA_FLAGS", f"--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads={THREADS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

# implementation -> precisions that it can run in, packages that matter
IMPLEMENTATIONS = {
    "torch": (["float64", "float32", "bfloat16"], ["gpt-oss", "torch"]),
    "transformers": (["float32", "bfloat16"], ["transformers", "torch"]),
    "flax": (["float32"], ["jax2onnx", "flax", "jax"]),
    "equinox": (["float32", "bfloat16"], ["jax2onnx", "equinox", "jax"]),
}


def versions(implementation):
    return {package: metadata.version(package) for package in IMPLEMENTATIONS[implementation][1]}


def execute(implementation, precision, checkpoint, tokens, taps="none", correct=False, max_layers=None, inject=None):
    """Returns {tap: torch tensor}; checkpoint is a path. inject, if given, is a block
    and the input to feed it; then only that block's taps are returned."""
    import torch

    import tapnames
    from checkpoints import Checkpoint

    torch.set_num_threads(THREADS)
    if precision not in IMPLEMENTATIONS[implementation][0]:
        raise SystemExit(f"{implementation} runs in {' or '.join(IMPLEMENTATIONS[implementation][0])}, not in {precision}")
    loaded = Checkpoint(checkpoint, max_layers)
    vocabulary = loaded.config["vocab_size"]
    if not tokens or min(tokens) < 0 or max(tokens) >= vocabulary:
        raise SystemExit(f"tokens must be one or more ids below {vocabulary}")
    module = importlib.import_module(f"{implementation}_model")
    options = {"correct": correct} if implementation in ("flax", "equinox") else {}
    wanted = set(tapnames.select(loaded.config, taps))
    if inject:
        layer, hidden = inject
        if not 0 <= layer < loaded.layers:
            raise SystemExit(f"there is no block {layer}: the model has {loaded.layers}")
        if list(hidden.shape) != tapnames.shape(loaded.config, "embedding", len(tokens)):
            raise SystemExit(f"the injected input has the shape {list(hidden.shape)}")
        wanted = {name for name in wanted if name.startswith(f"block_{layer}.")}
    return module.run(loaded, precision, tokens, wanted, inject=inject, **options)


def parse_tokens(text, prompt):
    """1,2,3 or a JSON file: a list of ids, {"tokens": [...]}, or a list of named prompts."""
    if not text.endswith(".json"):
        return [int(t) for t in text.split(",")]
    with open(text) as file:
        content = json.load(file)
    if isinstance(content, dict):
        content = content["tokens"]
    if content and isinstance(content[0], dict):
        found = [p["tokens"] for p in content if p["name"] == prompt]
        if not found:
            raise SystemExit(f"{text} has no prompt called {prompt!r}")
        content = found[0]
    return content


def read_injection(path):
    if path is None:
        return None
    from safetensors.torch import load_file

    ((name, hidden),) = load_file(path).items()
    return int(name.removeprefix("block_").removesuffix(".input")), hidden


def save(path, tensors, about):
    """Writes safetensors under a temporary name, then renames."""
    from safetensors.torch import save_file

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=about)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", required=True, choices=IMPLEMENTATIONS)
    parser.add_argument("--precision", required=True, choices=["float64", "float32", "bfloat16"])
    parser.add_argument("--checkpoint", required=True, help="directory in OpenAI's or Hugging Face's layout")
    parser.add_argument("--tokens", required=True, help="1,2,3 or a JSON file")
    parser.add_argument("--prompt", default="full", help="which prompt of a JSON file that has several")
    parser.add_argument("--taps", default="none", help="all, none (logits only), hidden, or names separated by commas")
    parser.add_argument("--correct-window", "--correct", dest="correct", action="store_true",
                        help="flax and equinox: mend their known faults (window, gate bias) before running")
    parser.add_argument("--max-layers", type=int, help="cut the model after so many blocks")
    parser.add_argument("--inject", metavar="FILE", help="safetensors file with one tensor, block_N.input, to feed to block N alone")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    arguments = parser.parse_args()

    tokens = parse_tokens(arguments.tokens, arguments.prompt)
    tensors = execute(
        arguments.implementation, arguments.precision, arguments.checkpoint, tokens, arguments.taps,
        arguments.correct, arguments.max_layers, read_injection(arguments.inject),
    )
    about = {
        "implementation": arguments.implementation + (" corrected" if arguments.correct else ""),
        "precision": arguments.precision,
        "versions": json.dumps(versions(arguments.implementation)),
        "tokens": json.dumps(tokens),
    }
    save(arguments.output, tensors, about)


if __name__ == "__main__":
    main()
