"""gpt-oss in Python's standard library, as a program for the command backend.

  python3 gptoss.py DIRECTORY

reads DIRECTORY/request.json and DIRECTORY/checkpoint (OpenAI's layout) and
writes DIRECTORY/output/NAME.safetensors for every prompt. It computes in
float64, token by token, with plain lists: slow, short, and independent of
everything else in this repository.
"""

import json
import math
import struct
import sys
from pathlib import Path

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


class Checkpoint:
    """Tensors of one safetensors file, as nested lists of floats."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        data = (directory / "model.safetensors").read_bytes()
        size = struct.unpack_from("<Q", data)[0]
        self.header = json.loads(data[8 : 8 + size])
        self.data = data[8 + size :]

    def raw(self, name):
        begin, end = self.header[name]["data_offsets"]
        return self.data[begin:end], self.header[name]["shape"]

    def bfloat16(self, name):
        raw, shape = self.raw(name)
        words = struct.unpack(f"<{len(raw) // 2}H", raw)
        return nest([struct.unpack("<f", struct.pack("<I", w << 16))[0] for w in words], shape)

    def mxfp4(self, name):
        """[experts][rows][columns]; a block is 32 values with one scale."""
        raw, (experts, rows, groups, _) = self.raw(name + ".blocks")
        scales, _ = self.raw(name + ".scales")
        values = []
        for block, scale in enumerate(scales):
            factor = 2.0 ** (scale - 127)
            for byte in raw[16 * block : 16 * block + 16]:
                values += [FP4[byte & 15] * factor, FP4[byte >> 4] * factor]
        return nest(values, [experts, rows, 32 * groups])


def nest(flat, shape):
    for width in reversed(shape[1:]):
        flat = [flat[i : i + width] for i in range(0, len(flat), width)]
    return flat


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def linear(x, weight, bias=None):
    y = [dot(x, row) for row in weight]
    return [a + b for a, b in zip(y, bias)] if bias else y


def rmsnorm(x, scale):
    root = math.sqrt(dot(x, x) / len(x) + 1e-5)
    return [v / root * s for v, s in zip(x, scale)]


def softmax(scores):
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]


def rope(config):
    """(radians per position for each pair of dimensions, factor on cosine and sine), with YaRN."""
    half, theta, factor = config["head_dim"] // 2, config["rope_theta"], config["rope_scaling_factor"]

    def bound(turns):
        return half * math.log(config["initial_context_length"] / (turns * 2 * math.pi)) / math.log(theta)

    low, high = bound(config["rope_ntk_beta"]), bound(config["rope_ntk_alpha"])
    frequencies = []
    for i in range(half):
        ramp = min(max((i - low) / (high - low), 0), 1)
        frequencies.append(theta ** (-i / half) * (ramp / factor + 1 - ramp))
    return frequencies, 0.1 * math.log(factor) + 1


def rotate(head, position, frequencies, factor):
    half = len(frequencies)
    out = [0.0] * (2 * half)
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency) * factor, math.sin(position * frequency) * factor
        out[i] = head[i] * cos - head[half + i] * sin
        out[half + i] = head[half + i] * cos + head[i] * sin
    return out


class Block:
    def __init__(self, checkpoint, layer):
        self.config, self.layer = checkpoint.config, layer
        get = lambda name: checkpoint.bfloat16(f"block.{layer}.{name}")
        self.attn_norm, self.sinks = get("attn.norm.scale"), get("attn.sinks")
        self.qkv, self.qkv_bias = get("attn.qkv.weight"), get("attn.qkv.bias")
        self.out, self.out_bias = get("attn.out.weight"), get("attn.out.bias")
        self.mlp_norm = get("mlp.norm.scale")
        self.gate, self.gate_bias = get("mlp.gate.weight"), get("mlp.gate.bias")
        self.mlp1, self.mlp1_bias = checkpoint.mxfp4(f"block.{layer}.mlp.mlp1_weight"), get("mlp.mlp1_bias")
        self.mlp2, self.mlp2_bias = checkpoint.mxfp4(f"block.{layer}.mlp.mlp2_weight"), get("mlp.mlp2_bias")
        self.keys, self.values = [], []

    def __call__(self, x, position, tap):
        x = self.attention(x, position, tap)
        tap("post_attention", x)
        x = self.experts(x, tap)
        tap("output", x)
        return x

    def attention(self, x, position, tap):
        c, d = self.config, self.config["head_dim"]
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        tap("input", x)
        normed = rmsnorm(x, self.attn_norm)
        tap("attn_normed", normed)
        split = nest(linear(normed, self.qkv, self.qkv_bias), [-1, d])
        q, k, v = split[:heads], split[heads : heads + kv_heads], split[heads + kv_heads :]
        tap("q", q), tap("k", k), tap("v", v)
        frequencies, factor = rope(c)
        q = [rotate(head, position, frequencies, factor) for head in q]
        k = [rotate(head, position, frequencies, factor) for head in k]
        tap("q_rot", q), tap("k_rot", k)
        self.keys.append(k)
        self.values.append(v)
        first = max(0, position - c["sliding_window"] + 1) if self.layer % 2 == 0 else 0
        core = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = [dot(q[h], key[g]) / math.sqrt(d) for key in self.keys[first:]]
            weights = softmax(scores + [self.sinks[h]])[:-1]
            core += [math.fsum(w * value[g][i] for w, value in zip(weights, self.values[first:])) for i in range(d)]
        tap("attn_core", core)
        return [a + b for a, b in zip(x, linear(core, self.out, self.out_bias))]

    def experts(self, x, tap):
        c, limit = self.config, self.config["swiglu_limit"]
        normed = rmsnorm(x, self.mlp_norm)
        tap("mlp_normed", normed)
        logits = linear(normed, self.gate, self.gate_bias)
        tap("mlp_gate_logits", logits)
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: c["experts_per_token"]]
        weights = softmax([logits[e] for e in chosen])
        tap("mlp_expert_indices", chosen), tap("mlp_expert_weights", weights)
        tap("mlp_dense_gate_weights", [dict(zip(chosen, weights)).get(e, 0.0) for e in range(len(logits))])
        before = [linear(normed, self.mlp1[e], self.mlp1_bias[e]) for e in chosen]
        tap("mlp_prelinear_outputs", before)
        active = []
        for row in before:
            pairs = [(min(glu, limit), min(max(up, -limit), limit)) for glu, up in zip(row[::2], row[1::2])]
            active.append([glu / (1 + math.exp(-1.702 * glu)) * (up + 1) for glu, up in pairs])
        tap("mlp_activated_outputs", active)
        outputs = [linear(a, self.mlp2[e], self.mlp2_bias[e]) for a, e in zip(active, chosen)]
        tap("mlp_expert_outputs", outputs)
        fused = [math.fsum(w * y for w, y in zip(weights, column)) for column in zip(*outputs)]
        tap("mlp_fused", fused)
        return [a + b for a, b in zip(x, fused)]


def forward(checkpoint, tokens, wanted):
    """Returns {tap: one entry per token} for the taps wanted."""
    embedding, unembedding = checkpoint.bfloat16("embedding.weight"), checkpoint.bfloat16("unembedding.weight")
    scale = checkpoint.bfloat16("norm.scale")
    blocks = [Block(checkpoint, layer) for layer in range(checkpoint.config["num_hidden_layers"])]
    taps = {name: [] for name in wanted}

    def tap(name, value):
        if name in taps:
            taps[name].append(value)

    for position, token in enumerate(tokens):
        x = embedding[token]
        tap("embedding", x)
        for block in blocks:
            x = block(x, position, lambda name, value: tap(f"block_{block.layer}.{name}", value))
        normed = rmsnorm(x, scale)
        tap("final_norm", normed)
        tap("logits", linear(normed, unembedding))
    return taps


def save(path, taps):
    """Writes nested lists as safetensors: F64, or I32 for the experts' indices."""
    header, chunks, offset = {}, [], 0
    for name, values in taps.items():
        shape = dimensions(values)
        flat = flatten(values)
        dtype, code = ("I32", "i") if name.endswith("indices") else ("F64", "d")
        chunks.append(struct.pack(f"<{len(flat)}{code}", *flat))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(chunks[-1])]}
        offset += len(chunks[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def dimensions(values):
    return [len(values), *dimensions(values[0])] if isinstance(values, list) else []


def flatten(values):
    return [v for row in values for v in flatten(row)] if isinstance(values, list) else [values]


def main():
    directory = Path(sys.argv[1])
    request = json.loads((directory / "request.json").read_text())
    checkpoint = Checkpoint(directory / "checkpoint")
    for prompt in request["prompts"]:
        taps = forward(checkpoint, prompt["tokens"], request["taps"])
        save(directory / "output" / (prompt["name"] + ".safetensors"), taps)


if __name__ == "__main__":
    main()
