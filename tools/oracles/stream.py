"""Makes golden/model/twolayer and golden/model/full: OpenAI's torch model at full
width, one layer in memory at a time.

  gptoss synthesize --layers 2           # prints DIR and the digest
  python tools/oracles/stream.py --checkpoint DIR --digest sha256:... --output golden/model/twolayer

upstream's TransformerBlock runs unchanged, in float64, float32 and bfloat16 side
by side, so that every layer is read and decoded once. One thing is put in its
place: the line that gathers the experts' weights copies 4 experts per token
(160 tokens of gpt-oss-20b: 85 GB in float64). Here it yields a note of which
experts are meant, and the einsum that follows multiplies expert by expert.

Stored are samples: of the residual stream some rows and columns, of the logits
some rows and columns, gate logits of every eighth token, chosen experts of every one.
"""

import argparse
import hashlib
import json
import resource
import sys
import time
from pathlib import Path

import run as oracle  # sets the threads before torch is loaded
import gpt_oss.torch.model as upstream
import torch

import counter
import tapnames
from checkpoints import Checkpoint
from torch_model import DTYPES, arithmetic

SEED = 1
TOKENS = 160  # beyond the window of 128
# The start, the surroundings of a group of 16 and of the window's edge, the end.
ROWS = [0, 1, 15, 16, 64, 126, 127, 128, 129, 144, 159]
GATE_ROWS = list(range(0, TOKENS, 8))
PRECISIONS = ["float64", "float32", "bfloat16"]
MXFP4_CHUNK = 1 << 18  # groups decoded at a time; OpenAI's default takes 4 GB


def draw(name, count, below):
    """Numbers below a limit, as fixtures.Generated draws its prompts."""
    return [(int(word) >> 32) % below for word in counter.words(SEED, name, 0, count)]


class Experts:
    """Stands in for the parameter mlp1_weight or mlp2_weight: [experts, rows, cols]."""

    def __init__(self, weights, dtype):
        self.weights, self.dtype = weights, dtype

    def __getitem__(self, key):
        indices, rest = key
        if rest is not Ellipsis:
            raise SystemExit("upstream indexes the experts in another way: see tools/oracles/stream.py")
        return Gathered(self, indices)


class Gathered:
    """weights[indices] before anything was copied."""

    def __init__(self, experts, indices):
        self.experts, self.indices = experts, indices

    def multiply(self, x):
        """x [tokens, k, cols] by each slot's expert: [tokens, k, rows]."""
        out = x.new_empty(*self.indices.shape, self.experts.weights.shape[1])
        for expert in self.indices.unique().tolist():
            slots = self.indices == expert
            out[slots] = x[slots] @ self.experts.weights[expert].to(self.experts.dtype).T
        return out


def einsum(equation, *operands):
    if not isinstance(operands[0], Gathered):
        return torch.einsum(equation, *operands)
    gathered, x = operands
    if equation == "beck,bk->bec":
        x = x[:, None, :].expand(-1, gathered.indices.shape[1], -1)
    elif equation != "beck,bek->bec":
        raise SystemExit(f"upstream multiplies the experts by {equation}: see tools/oracles/stream.py")
    return gathered.multiply(x)


def empty(module, *arguments):
    """A module of upstream without memory for its weights."""
    return module(*arguments, torch.device("meta"))


def fill(module, checkpoint, prefix, precision, skip=()):
    for name, parameter in list(module.named_parameters()):
        if name in skip:
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        dtype = parameter.dtype if precision == "bfloat16" else DTYPES[precision]
        value = torch.nn.Parameter(checkpoint.get(prefix + name).to(dtype), requires_grad=False)
        setattr(owner, name.rpartition(".")[2], value)
    return module


def block(checkpoint, config, layer, precision, experts):
    module = empty(upstream.TransformerBlock, config, layer)
    fill(module, checkpoint, f"block.{layer}.", precision, skip=["mlp.mlp1_weight", "mlp.mlp2_weight"])
    module.attn.rope.device = torch.device("cpu")
    for name, weights in experts.items():
        delattr(module.mlp, name)
        setattr(module.mlp, name, Experts(weights, DTYPES[precision]))
    return module


def run_block(module, x, precision, record):
    module.attn.register_forward_hook(lambda _module, _arguments, out: record("post_attention", out))
    module.mlp.gate.register_forward_hook(lambda _module, _arguments, out: record("mlp_gate_logits", out))

    def topk(*arguments, **named):
        out = torch.topk(*arguments, **named)
        record("mlp_expert_indices", out.indices.to(torch.int32))
        return out

    with torch.inference_mode(), arithmetic(precision, topk=topk, einsum=einsum):
        x = module(x)
    record("output", x)
    return x


class Samples:
    """What is kept of one run."""

    def __init__(self, columns):
        self.columns, self.taps = columns, {}

    def keep(self, name, value):
        if name.endswith("mlp_expert_indices"):
            self.taps[name] = value.clone()
        elif name.endswith("mlp_gate_logits"):
            self.taps[name] = value[GATE_ROWS].clone()
        else:
            self.taps[name] = value[ROWS][:, self.columns].clone()


def make(path, digest, output, note):
    checkpoint = Checkpoint(path)
    c = checkpoint.config
    config = upstream.ModelConfig(**c)
    tokens = draw("prompt.full", TOKENS, c["vocab_size"])
    columns = sorted(set(draw("sample.hidden", 64, c["hidden_size"])))
    vocabulary = sorted(set(draw("sample.logits", 256, c["vocab_size"])))

    embedding = checkpoint.get("embedding.weight")[tokens]
    streams = {p: embedding.to(DTYPES[p]) for p in PRECISIONS}
    samples = {p: Samples(columns) for p in PRECISIONS}
    for layer in range(checkpoint.layers):
        experts = {
            name: checkpoint.reader._get_mxfp4_tensor(f"block.{layer}.mlp.{name}.blocks", f"block.{layer}.mlp.{name}.scales", rows_per_chunk=MXFP4_CHUNK)
            if checkpoint.is_openai else checkpoint.get(f"block.{layer}.mlp.{name}")
            for name in ("mlp1_weight", "mlp2_weight")
        }
        for precision in PRECISIONS:
            module = block(checkpoint, config, layer, precision, experts)
            streams[precision] = run_block(module, streams[precision], precision,
                                           lambda tap, value: samples[precision].keep(tapnames.block(layer, tap), value))
        rms = streams["float64"].pow(2).mean().sqrt().item()
        used = len(samples["float64"].taps[tapnames.block(layer, "mlp_expert_indices")].unique())
        note(f"layer {layer}: rms {rms:.3f}, {used} experts used, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20} GiB")

    unembedding = checkpoint.get("unembedding.weight")[vocabulary]
    for precision in PRECISIONS:
        norm = fill(empty(upstream.RMSNorm, c["hidden_size"], 1e-5), checkpoint, "norm.", precision)
        with torch.inference_mode(), arithmetic(precision):
            normed = norm(streams[precision])
            logits = torch.nn.functional.linear(normed, unembedding.to(DTYPES[precision]))
        samples[precision].keep("final_norm", normed)
        samples[precision].taps["logits"] = logits[ROWS].clone()

    output.mkdir(parents=True, exist_ok=True)
    about = {
        "digest": digest,
        "layers": checkpoint.layers,
        "tokens": tokens, "rows": ROWS, "gate_rows": GATE_ROWS, "columns": columns, "vocabulary": vocabulary,
        "packages": oracle.versions("torch"),
        "command": f"python tools/oracles/stream.py --checkpoint DIR --digest {digest} --output golden/model/{output.name}",
        "sha256": {},
    }
    for precision in PRECISIONS:
        file = output / f"torch.{precision}.safetensors"
        oracle.save(file, samples[precision].taps, {"format": "pt"})
        about["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (output / "samples.json").write_text(dump(about))


def dump(about):
    """One key per line."""
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in about.items()) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory in OpenAI's or Hugging Face's layout")
    parser.add_argument("--digest", required=True, help="what gptoss synthesize or gptoss inspect printed")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    start = time.monotonic()

    def note(text):
        print(f"{time.monotonic() - start:7.1f} s  {text}", file=sys.stderr, flush=True)

    torch.set_num_threads(oracle.THREADS)
    make(arguments.checkpoint, arguments.digest, arguments.output, note)


if __name__ == "__main__":
    main()
