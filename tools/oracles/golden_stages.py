"""Makes golden/STAGE: single stages at real widths and on awkward values.

  python tools/oracles/golden_stages.py [--stages rope,attention] [--output golden]

Every case runs OpenAI's own functions and modules (gpt_oss.torch.model and
gpt_oss.torch.weights) in float64, the truth, and once more in the case's own
arithmetic. Inputs come from the counter generator and are described in
manifest.json; only outputs are stored. golden/README.md has the format.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import run as oracle  # sets the threads before torch is loaded
import gpt_oss.torch.model as upstream
import numpy as np
import torch
from gpt_oss.torch.weights import Checkpoint as OpenAICheckpoint
from safetensors.torch import save_file

import counter
import torch_model
from checkpoints import Checkpoint
from golden_model import sha256

ROOT = Path(__file__).resolve().parents[2]
SEED = 20  # of every input; the names differ
PRECISIONS = {"F32": "float32", "BF16": "bfloat16"}
TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}


class Input:
    """A described input. `value` is a torch tensor of its dtype, `rows` of it if sampled."""

    def __init__(self, dtype, shape, counter=None, *, rows=None, mean=None, scale=None, row_scales=None, low=None, high=None, values=None):
        fields = {
            "dtype": dtype, "shape": shape, "seed": None if values else SEED, "counter": counter, "rows": rows,
            "mean": mean, "scale": scale, "row_scales": row_scales, "low": low, "high": high, "values": values,
        }
        self.about = {k: v for k, v in fields.items() if v is not None}
        self.value = self._generate(rows if rows is not None else range(shape[0]))

    def _generate(self, rows):
        a, width = self.about, int(np.prod(self.about["shape"][1:]))
        shape = [len(rows), *a["shape"][1:]]
        if "values" in a:
            flat = np.array(a["values"], dtype=np.float64).reshape(a["shape"])[list(rows)]
        elif a["dtype"] == "U8":
            span = np.uint64(a["high"] - a["low"] + 1)
            flat = np.stack([a["low"] + (counter.words(SEED, a["counter"], r * width, width) % span).astype(np.int64) for r in rows])
            return torch.from_numpy(flat.astype(np.uint8).reshape(shape))
        elif "low" in a:
            flat = np.stack([a["low"] + (a["high"] - a["low"]) * counter.uniform(SEED, a["counter"], r * width, width) for r in rows])
        else:
            scales = a.get("row_scales", [1.0] * a["shape"][0])
            flat = np.stack([a.get("mean", 0.0) + a["scale"] * scales[r] * counter.normal(SEED, a["counter"], r * width, width) for r in rows])
        # Through float32, as in Go: double rounding would differ from one rounding.
        value = torch.from_numpy(flat.reshape(shape))
        return value if a["dtype"] == "F64" else value.to(torch.float32).to(TYPES[a["dtype"]])

    def to(self, precision):
        return self.value.to(torch_model.DTYPES[precision])


class Case:
    """compute(precision) returns {output: tensor}; truth is checked against nothing:
    it is what the suite is checked against."""

    def __init__(self, name, about, dtype, parameters, inputs, compute):
        self.name, self.about, self.dtype = name, about, dtype
        self.parameters, self.inputs, self.compute = parameters, inputs, compute

    def run(self):
        out = {}
        for precision in dict.fromkeys(("float64", PRECISIONS.get(self.dtype, "float64"))):
            with torch.no_grad(), torch_model.arithmetic(precision):
                for name, value in self.compute(precision).items():
                    group = "float64" if precision == "float64" else f"torch.{precision}"
                    out[f"{group}/{name}"] = value.contiguous()
        return out


# --- rope ---------------------------------------------------------------------

ROPE = {"initial_context_length": 4096, "rope_theta": 150000.0, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}


def rope_cases():
    far = [0, 1, 2, 3, 127, 128, 300, 4095, 4096, 4097, 20000, 65535, 65536, 100003, 131070, 131071]
    near = [0, 1, 5, 127, 1000, 4096, 131071]
    for head_dim, positions, heads, factor in [(64, far, 4, 32.0), (16, near, 2, 32.0), (32, near, 2, 32.0), (128, near, 2, 32.0), (64, near, 2, 1.0)]:
        for dtype in PRECISIONS:
            parameters = ROPE | {"head_dim": head_dim, "rope_scaling_factor": factor, "positions": positions}
            x = Input(dtype, [len(positions), heads, head_dim], "rope.x", scale=1.0)

            def compute(precision, parameters=parameters, positions=positions, head_dim=head_dim, x=x):
                module = upstream.RotaryEmbedding(
                    head_dim, parameters["rope_theta"], torch.float32,
                    initial_context_length=parameters["initial_context_length"], scaling_factor=parameters["rope_scaling_factor"],
                    ntk_alpha=parameters["rope_ntk_alpha"], ntk_beta=parameters["rope_ntk_beta"],
                )
                cos, sin = (table[positions] for table in module._compute_cos_sin(max(positions) + 1))
                rotated = upstream._apply_rotary_emb(x.to(precision), cos, sin)
                return {"rotated": rotated, "cos": cos, "sin": sin}

            name = f"head_dim_{head_dim}" + ("" if factor > 1 else "_without_yarn")
            yield Case(f"{name}.{PRECISIONS[dtype]}", "x [positions, heads, head_dim], row i at positions[i]; cos and sin [positions, head_dim/2] include YaRN's concentration", dtype, parameters, {"x": x}, compute)


# --- rmsnorm ------------------------------------------------------------------


def rmsnorm_cases():
    # rms 1e-3 is where eps = 1e-5 outweighs the mean square (1e-6); 1e-6 where it
    # is all there is; 1e4 where nothing of it is left.
    scales = [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e2, 1e4]
    for dtype in PRECISIONS:
        for width in (2880, 64):
            x = Input(dtype, [len(scales), width], f"rmsnorm.{width}.x", scale=1.0, row_scales=scales)
            weight = Input("BF16", [width], f"rmsnorm.{width}.weight", mean=1.0, scale=0.3)

            def compute(precision, width=width, x=x, weight=weight):
                module = upstream.RMSNorm(width)
                module.scale.data = weight.value.double() if precision == "float64" else weight.value.float()
                return {"normed": module(x.to(precision))}

            yield Case(f"width_{width}.{PRECISIONS[dtype]}", "rows of rms 1 down to 1e-6 and up to 1e4", dtype, {"epsilon": 1e-5}, {"x": x, "weight": weight}, compute)


# --- attention ----------------------------------------------------------------


def attention_cases():
    real = {"tokens": 160, "heads": 64, "kv_heads": 8, "head_dim": 64}
    small = {"tokens": 20, "heads": 6, "kv_heads": 2, "head_dim": 16}
    sinks = [8.0, -8.0, -30.0, 0.0, 2.5, 5.0, 1.0, 3.0]
    for label, shape, windows, rows in [("real", real, (128, 0), [127, 128, 159]), ("small", small, (12, 1, 0), list(range(20)))]:
        for window in windows:
            for dtype in PRECISIONS:
                t, h, kv, d = shape.values()
                q = Input(dtype, [t, h, d], f"attention.{label}.q", scale=2.0)
                k = Input(dtype, [t, kv, d], f"attention.{label}.k", scale=1.0)
                v = Input(dtype, [t, kv, d], f"attention.{label}.v", scale=1.0)
                s = Input("BF16", [h], values=[sinks[i % len(sinks)] for i in range(h)])

                def compute(precision, q=q, k=k, v=v, s=s, t=t, h=h, kv=kv, d=d, window=window, rows=rows):
                    out = upstream.sdpa(q.to(precision).view(t, kv, h // kv, d), k.to(precision), v.to(precision), s.to(precision), 1 / d**0.5, window)
                    return {"attn_core": out[rows]}

                about = "q and k after RoPE; scores are divided by sqrt(head_dim); a query sees `window` keys, its own included, or all earlier ones if window is 0; attn_core holds the queries listed in rows"
                yield Case(f"{label}_window_{window}.{PRECISIONS[dtype]}", about, dtype, shape | {"window": window, "rows": rows}, {"q": q, "k": k, "v": v, "sinks": s}, compute)
    # The fused projection at real width, rows of q, k and v.
    rows = [0, 1, 63, 64, 2047, 4095, 4096, 4500, 4607, 4608, 5000, 5119]
    for dtype in PRECISIONS:
        x = Input(dtype, [8, 2880], "attention.qkv.x", scale=1.0)
        weight = Input("BF16", [5120, 2880], "attention.qkv.weight", scale=0.02, rows=rows)
        bias = Input("BF16", [5120], "attention.qkv.bias", scale=0.1, rows=rows)

        def compute(precision, x=x, weight=weight, bias=bias):
            return {"qkv": torch.nn.functional.linear(x.to(precision), weight.to(precision), bias.to(precision))}

        yield Case(f"projection_2880.{PRECISIONS[dtype]}", "x·weightᵀ + bias for the listed rows of the weight", dtype, {}, {"x": x, "weight": weight, "bias": bias}, compute)


# --- gating -------------------------------------------------------------------


def mlp_block(hidden, experts, chosen, intermediate):
    """Upstream's MLPBlock on an input that is normed already."""
    config = upstream.ModelConfig(num_experts=experts, experts_per_token=chosen, hidden_size=hidden, intermediate_size=intermediate)
    block = upstream.MLPBlock(config)
    for parameter in block.parameters():
        parameter.data.zero_()
    block.norm = torch.nn.Identity()
    return block


def observe_mlp(block, x, precision, activated=None):
    """Runs the block and returns what passes through it. activated, if given,
    takes the place of the SwiGLU's output."""
    seen, swiglu = {}, upstream.swiglu

    def observed_swiglu(t, *rest, **named):
        seen["prelinear"] = t
        seen["activated"] = swiglu(t, *rest, **named) if activated is None else activated
        return seen["activated"]

    def observed_topk(*args, **named):
        out = torch.topk(*args, **named)
        seen["gate_logits"], seen["expert_indices"] = args[0], out.indices.to(torch.int32)
        return out

    def observed_einsum(equation, *operands):
        if equation == "bec,be->bc":
            seen["expert_outputs"], seen["expert_weights"] = operands
        return torch.einsum(equation, *operands)

    upstream.swiglu = observed_swiglu
    try:
        with torch_model.arithmetic(precision, topk=observed_topk, einsum=observed_einsum):
            block(x)
    finally:
        upstream.swiglu = swiglu
    return seen


def gating_cases():
    for experts in (32, 128):
        for dtype in PRECISIONS:
            weight = Input("BF16", [experts, 2880], f"gating.{experts}.weight", scale=0.04)
            bias = Input("BF16", [experts], f"gating.{experts}.bias", scale=0.5)
            x = healthy(dtype, experts, weight, bias)
            yield gating_case(f"experts_{experts}.{PRECISIONS[dtype]}", "margins are healthy: one right answer", dtype, x, weight, bias)
    # Zero inputs leave the bias alone, which has exact ties in every arithmetic:
    # row 0 and 1 for the last places, and one that does not matter.
    x = Input("BF16", [2, 64], values=[0.0] * 128)
    weight = Input("BF16", [8, 64], "gating.ties.weight", scale=0.1)
    for name, bias, ties in [
        ("last_place", [1, 3, 2, 1, 1, 4, 0, -1], {"must": [1, 2, 5], "of": [0, 3, 4], "choose": 1}),
        ("all_equal", [0.5] * 8, {"must": [], "of": list(range(8)), "choose": 4}),
        ("inside", [3, 3, 2, 1, 0, -1, -2, -3], {"must": [0, 1, 2, 3], "of": [], "choose": 0}),
    ]:
        yield gating_case(f"ties_{name}.bfloat16", "exact ties: the experts in `must` are chosen and any `choose` of those in `of`", "BF16", x, weight, Input("BF16", [8], values=[float(b) for b in bias]), ties)


MARGIN = 0.06  # twice bfloat16's step of 2^-5 between 4 and 8, where the chosen logits are


def margin(logits):
    """Least distance between the last chosen and the first passed-over of 4."""
    ordered = logits.sort(-1, descending=True).values
    return (ordered[:, 3] - ordered[:, 4]).min().item()


def healthy(dtype, experts, weight, bias):
    """The first input whose routing no right implementation can get wrong."""
    for attempt in range(1000):
        x = Input(dtype, [8, 2880], f"gating.{experts}.x.{attempt}", scale=1.0)
        if margin(torch.nn.functional.linear(x.to("float64"), weight.to("float64"), bias.to("float64"))) > MARGIN:
            return x
    raise SystemExit("gating: no input has healthy margins")


def gating_case(name, about, dtype, x, weight, bias, ties=None):
    def compute(precision):
        experts, hidden = weight.value.shape
        block = mlp_block(hidden, experts, 4, 1)
        block.gate.weight.data, block.gate.bias.data = weight.to(precision), bias.to(precision)
        block.mlp1_weight.data, block.mlp1_bias.data, block.mlp2_weight.data, block.mlp2_bias.data = (
            p.to(torch_model.DTYPES[precision]) for p in (block.mlp1_weight.data, block.mlp1_bias.data, block.mlp2_weight.data, block.mlp2_bias.data))
        seen = observe_mlp(block, x.to(precision), precision)
        if precision == "float64" and ties is None:
            assert margin(seen["gate_logits"]) > MARGIN
        return {k: seen[k] for k in ("gate_logits", "expert_indices", "expert_weights")}

    parameters = {"experts_per_token": 4} | ({"ties": ties} if ties else {})
    return Case(name, about, dtype, parameters, {"x": x, "weight": weight, "bias": bias}, compute)


# --- experts ------------------------------------------------------------------


def decode(blocks, scales):
    """OpenAI's loader decodes a file; this is the file."""
    with tempfile.TemporaryDirectory(prefix="gptoss-oracle-") as directory:
        save_file({"w.blocks": blocks, "w.scales": scales}, f"{directory}/model.safetensors")
        return OpenAICheckpoint(directory, torch.device("cpu"))._get_mxfp4_tensor("w.blocks", "w.scales")


def experts_cases():
    yield from activation_cases()
    yield from mlp1_cases()
    yield from mlp2_cases()
    yield from mxfp4_cases()


SWIGLU = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}


def activation_cases():
    # Every pair of these, both sides of both clamps among them (0.0625 and 0.03125
    # are bfloat16's steps above and below 7).
    points = [-30.0, -20.0, -12.0, -9.0, -8.0, -7.03125, -7.0, -6.96875, -5.0, -3.0, -1.5, -1.0, -0.5, -0.125, 0.0,
              0.125, 0.5, 1.0, 1.5, 3.0, 5.0, 6.96875, 7.0, 7.03125, 8.0, 9.0, 12.0, 20.0, 30.0]
    pairs = [value for glu in points for linear in points for value in (glu, linear)]
    for dtype in PRECISIONS:
        for name, x in [
            ("grid", Input(dtype, [len(points), 2 * len(points)], values=pairs)),
            ("uniform", Input(dtype, [4, 1024], "experts.activation.x", low=-30.0, high=30.0)),
        ]:
            yield Case(f"activation_{name}.{PRECISIONS[dtype]}", "even columns glu, odd ones linear", dtype, SWIGLU, {"x": x},
                       lambda precision, x=x: {"activated": upstream.swiglu(x.to(precision), limit=SWIGLU["swiglu_limit"])})


def mlp1_cases():
    # Pairs of rows, so that the activation can be checked too.
    rows = [r for pair in (0, 1, 31, 32, 700, 1439, 1440, 2000, 2879) for r in (2 * pair, 2 * pair + 1)]
    for dtype in PRECISIONS:
        x = Input(dtype, [8, 2880], "experts.mlp1.x", scale=2.0)
        blocks = Input("U8", [5760, 90, 16], "experts.mlp1.blocks", rows=rows, low=0, high=255)
        scales = Input("U8", [5760, 90], "experts.mlp1.scales", rows=rows, low=117, high=121)
        bias = Input("BF16", [5760], "experts.mlp1.bias", rows=rows, scale=0.5)

        def compute(precision, x=x, blocks=blocks, scales=scales, bias=bias, rows=rows):
            block = one_expert(2880, len(rows) // 2, precision)
            block.mlp1_weight.data = decode(blocks.value, scales.value)[None].to(torch_model.DTYPES[precision])
            block.mlp1_bias.data = bias.to(precision)[None]
            seen = observe_mlp(block, x.to(precision), precision)
            return {"prelinear": seen["prelinear"][:, 0], "activated": seen["activated"][:, 0]}

        yield Case(f"mlp1_2880.{PRECISIONS[dtype]}", "one expert: x·weightᵀ + bias for the listed rows, then the activation of those pairs", dtype, SWIGLU,
                   {"x": x, "blocks": blocks, "scales": scales, "bias": bias}, compute)


def mlp2_cases():
    rows = [0, 1, 31, 32, 63, 1000, 1439, 1440, 2048, 2878, 2879]
    for dtype in PRECISIONS:
        x = Input(dtype, [8, 2880], "experts.mlp2.x", scale=3.0)
        blocks = Input("U8", [2880, 90, 16], "experts.mlp2.blocks", rows=rows, low=0, high=255)
        scales = Input("U8", [2880, 90], "experts.mlp2.scales", rows=rows, low=115, high=120)
        bias = Input("BF16", [2880], "experts.mlp2.bias", rows=rows, scale=0.5)

        def compute(precision, x=x, blocks=blocks, scales=scales, bias=bias, rows=rows):
            block = one_expert(len(rows), 2880, precision)
            block.mlp2_weight.data = decode(blocks.value, scales.value)[None].to(torch_model.DTYPES[precision])
            block.mlp2_bias.data = bias.to(precision)[None]
            nothing = torch.zeros(8, len(rows), dtype=torch_model.DTYPES[precision])
            seen = observe_mlp(block, nothing, precision, activated=x.to(precision)[:, None])
            return {"expert_output": seen["expert_outputs"][:, 0]}

        yield Case(f"mlp2_2880.{PRECISIONS[dtype]}", "one expert: x·weightᵀ + bias for the listed rows; x is the activation's output", dtype, {},
                   {"x": x, "blocks": blocks, "scales": scales, "bias": bias}, compute)


def one_expert(hidden, intermediate, precision):
    return mlp_block(hidden, 1, 1, intermediate).to(torch_model.DTYPES[precision])


def mxfp4_cases():
    # All 16 codes under every scale byte that keeps them finite in bfloat16. At
    # 253 the codes up to 3 do (magnitudes 0..5), at 254 those up to 1.5 (0..3).
    def codes(limit):
        magnitudes = [c % limit for c in range(8)]
        nibbles = [m | sign for sign in (0, 8) for m in magnitudes] * 2
        return [float(low | high << 4) for low, high in zip(nibbles[::2], nibbles[1::2])]

    values = [code for scale in range(255) for code in codes({253: 6, 254: 4}.get(scale, 8))]
    blocks = Input("U8", [255, 1, 16], values=values)
    scales = Input("U8", [255, 1], values=[float(s) for s in range(255)])
    yield Case("mxfp4.bfloat16", "row s: all 16 codes, low nibble first, with the scale byte s; the values are exact, in bfloat16 too", "BF16", {}, {"blocks": blocks, "scales": scales},
               lambda precision: {"decoded": decode(blocks.value, scales.value).to(torch_model.DTYPES[precision])})


# --- logits -------------------------------------------------------------------


def logits_cases():
    rows = [0, 1, 2, 255, 256, 1000, 65535, 65536, 100000, 131072, 199998, 200002, 201086, 201087]
    for dtype in PRECISIONS:
        x = Input(dtype, [4, 2880], "logits.x", scale=3.0)
        scale = Input("BF16", [2880], "logits.scale", mean=1.0, scale=0.3)
        weight = Input("BF16", [201088, 2880], "logits.unembedding", scale=0.02, rows=rows)

        def compute(precision, x=x, scale=scale, weight=weight):
            norm = upstream.RMSNorm(2880)
            norm.scale.data = scale.value.double() if precision == "float64" else scale.value.float()
            normed = norm(x.to(precision))
            return {"final_norm": normed, "logits": torch.nn.functional.linear(normed, weight.to(precision))}

        yield Case(f"real.{PRECISIONS[dtype]}", "final norm, then the unembedding's listed rows", dtype, {"epsilon": 1e-5}, {"x": x, "scale": scale, "unembedding": weight}, compute)


# --- generation ---------------------------------------------------------------


def generation_cases():
    """Greedy continuation in float64, the whole sequence run again for each token:
    what a KV cache must reproduce. Logits are those that chose each token."""
    for fixture, prompt, steps in [("toy", "one", 30), ("toy", "window", 20), ("toy128", "window", 8), ("edge", "window+1", 20)]:
        prompts = json.loads((ROOT / "fixtures" / fixture / "prompts.json").read_text())
        tokens = next(p["tokens"] for p in prompts if p["name"] == prompt)
        model = torch_model.load(Checkpoint(ROOT / "fixtures" / fixture), "float64")
        sequence, rows = list(tokens), []
        with torch.no_grad(), torch_model.arithmetic("float64"):
            for _ in range(steps):
                rows.append(model(torch.tensor(sequence, dtype=torch.int32))[-1])
                sequence.append(int(rows[-1].argmax()))
        logits = torch.stack(rows)
        ordered = logits.sort(-1, descending=True).values
        parameters = {"fixture": fixture, "prompt": tokens, "generated": sequence[len(tokens):], "margin": (ordered[:, 0] - ordered[:, 1]).min().item()}
        about = "greedy decoding of a fixture: logits [steps, vocab] after the prompt and after each generated token; margin is the least distance between best and second best"
        yield Case(f"{fixture}_{prompt.replace('+', '_plus_')}.float64", about, "F64", parameters, {}, lambda _precision, logits=logits: {"logits": logits})


STAGES = {"rope": rope_cases, "rmsnorm": rmsnorm_cases, "attention": attention_cases, "gating": gating_cases, "experts": experts_cases, "logits": logits_cases, "generation": generation_cases}


def make(stage, output, note):
    directory = output / stage
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    for case in STAGES[stage]():
        note(f"{stage}: {case.name}")
        file = f"{case.name}.safetensors"
        oracle.save(directory / file, case.run(), {"format": "pt"})
        entries.append({
            "name": case.name, "about": case.about, "dtype": case.dtype, "parameters": case.parameters,
            "inputs": {name: value.about for name, value in case.inputs.items()},
            "file": file, "sha256": sha256(directory / file),
        })
    for stale in directory.glob("*.safetensors"):
        if stale.name not in {e["file"] for e in entries}:
            stale.unlink()
    head = {"stage": stage, "oracle": "torch", "packages": oracle.versions("torch"), "command": f"python tools/oracles/golden_stages.py --stages {stage}"}
    text = json.dumps(head, indent=2)[:-2] + ',\n  "cases": [\n'
    text += ",\n".join("    {\n" + ",\n".join(f"      {json.dumps(k)}: {_field(v)}" for k, v in e.items()) + "\n    }" for e in entries)
    (directory / "manifest.json").write_text(text + "\n  ]\n}\n")


def _field(value):
    """Inputs one per line, all else on one."""
    if isinstance(value, dict) and value and all(isinstance(v, dict) and "dtype" in v for v in value.values()):
        return "{\n" + ",\n".join(f"        {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n      }"
    return json.dumps(value, ensure_ascii=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--output", type=Path, default=ROOT / "golden")
    arguments = parser.parse_args()
    torch.set_num_threads(oracle.THREADS)
    start = time.monotonic()

    def note(text):
        if sys.stderr.isatty():
            print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr)

    for stage in arguments.stages.split(","):
        make(stage, arguments.output, note)


if __name__ == "__main__":
    main()
