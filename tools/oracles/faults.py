"""gpt-oss in numpy, float64, with each fault of the catalogue: what the faults of
conformance/faults must compute, written from their definitions alone.

  python tools/oracles/faults.py

makes conformance/faults/testdata/toy.safetensors: for every fault (and for the
right model, as "right") some logits of the last tokens of fixtures/toy. Faults of
the KV cache are run as the Go test runs them: a first call, one of five tokens,
then token by token.

There is no cache here. Who is in which call decides what a query sees and where
keys are turned, so that one pass over all tokens gives the same.
"""

import hashlib
import json
from math import erf, log, pi, sqrt
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "fixtures" / "toy"
OUTPUT = ROOT / "conformance" / "faults" / "testdata" / "toy.safetensors"
ROWS, STEP = 3, 8  # the last rows and every eighth column are stored

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    with np.errstate(over="ignore"):  # exp of a large number is inf, and the result 0
        return 1 / (1 + np.exp(-x))


def to_bfloat16(x):
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


class Model:
    """The checkpoint: configuration as attributes, tensors by OpenAI's names."""

    def __init__(self, directory):
        self.__dict__.update(json.loads((directory / "config.json").read_text()))
        self.tensors = {}
        with safe_open(directory / "model.safetensors", "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                packed = name.endswith((".blocks", ".scales"))
                self.tensors[name] = tensor.numpy() if packed else tensor.double().numpy()

    def experts(self, name, fault):
        """Decodes [experts, rows, columns], rightly or not."""
        blocks, scales = self.tensors[name + ".blocks"], self.tensors[name + ".scales"].astype(int)
        experts, rows, groups, _ = blocks.shape
        columns = 32 * groups
        nibbles = [blocks & 15, blocks >> 4]
        if fault == "mxfp4-nibbles-swapped":
            nibbles.reverse()
        if fault == "mxfp4-nibbles-split":
            codes = np.concatenate(nibbles, -1)
        else:
            codes = np.stack(nibbles, -1)
        codes = codes.reshape(experts, rows, columns)
        table = E2M1.copy()
        if fault == "mxfp4-half-as-sixteenth":
            table[1] = 0.0625
        if fault == "mxfp4-subnormals-as-normal":
            table[:2] = 0.5, 0.75
        values = np.concatenate([table, -table])[codes]

        if fault == "mxfp4-first-expert-scales":
            scales = np.repeat(scales[:1], experts, 0)
        if fault == "mxfp4-scales-transposed":
            scales = scales.reshape(experts, groups, rows).swapaxes(1, 2)
        if fault == "mxfp4-groups-misread":  # 32 rows share a scale
            scales = np.repeat(scales.reshape(experts, rows // 32, columns), 32, 1)
        elif fault == "mxfp4-group-16":
            scales = scales[:, :, np.minimum(np.arange(columns) // 16, groups - 1)]
        else:
            scales = np.repeat(scales, 32, -1)
        if fault == "mxfp4-scale-as-number":
            return values * scales
        bias = {"mxfp4-scale-bias-126": 126, "mxfp4-scale-bias-125": 125}.get(fault, 127)
        return values * 2.0 ** (scales - bias)


def frequencies(m, fault):
    """YaRN's frequencies and concentration."""
    base, factor, context = m.rope_theta, m.rope_scaling_factor, m.initial_context_length
    alpha, beta = m.rope_ntk_alpha, m.rope_ntk_beta
    if fault == "rope-base-10000":
        base = 10000
    if fault == "rope-original-context-extended":
        context *= factor
    if fault == "rope-betas-swapped":
        alpha, beta = beta, alpha
    half = m.head_dim // 2
    plain = base ** -(np.arange(half) / half)
    concentration = 0.1 * log(factor) + 1
    if fault == "rope-no-yarn":
        return plain, 1
    if fault == "rope-no-concentration":
        concentration = 1
    if fault == "rope-concentration-squared":
        concentration **= 2
    if fault == "rope-linear-scaling":
        return plain / factor, concentration
    low, high = (half * log(context / (turns * 2 * pi)) / log(base) for turns in (beta, alpha))
    if fault == "rope-truncated-bounds":
        low, high = np.floor(low), np.ceil(high)
    ramp = np.clip((np.arange(half) - low) / (high - low), 0, 1)
    slowed = plain * factor if fault == "rope-factor-inverted" else plain / factor
    turned = slowed * ramp + plain * (1 - ramp)
    if fault == "rope-inv-freq-bfloat16":
        turned = to_bfloat16(turned)
    return turned, concentration


def rotate(x, positions, turns, concentration, interleaved):
    """x [tokens, heads, head_dim] by the angles of its positions."""
    angles = (positions[:, None] * turns)[:, None]
    cos, sin = np.cos(angles) * concentration, np.sin(angles) * concentration
    half = x.shape[-1] // 2
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pair = [first * cos - second * sin, second * cos + first * sin]
    return np.stack(pair, -1).reshape(x.shape) if interleaved else np.concatenate(pair, -1)


def norm(x, scale, fault):
    if fault == "rmsnorm-mean-subtracted":
        x = x - x.mean(-1, keepdims=True)
    if fault == "rmsnorm-no-scale":
        scale = 1
    if fault == "rmsnorm-plus-one":
        scale = scale + 1
    mean_square = (x * x).mean(-1, keepdims=True)
    if fault == "rmsnorm-eps-outside-root":
        return x / (np.sqrt(mean_square) + 1e-5) * scale
    return x / np.sqrt(mean_square + (1e-6 if fault == "rmsnorm-eps-1e-6" else 1e-5)) * scale


def split_qkv(m, packed, fault):
    """q [tokens, heads, d], k and v [tokens, kv_heads, d] from the fused rows."""
    d, heads, kv_heads = m.head_dim, m.num_attention_heads, m.num_key_value_heads
    q_width, kv_width = heads * d, kv_heads * d
    if fault == "qkv-grouped-layout":
        grouped = packed.reshape(len(packed), kv_heads, heads // kv_heads + 2, d)
        q, k, v = grouped[:, :, :-2], grouped[:, :, -2], grouped[:, :, -1]
    elif fault == "qkv-order":
        k, q, v = np.split(packed, [kv_width, kv_width + q_width], -1)
    elif fault == "kv-swapped":
        q, v, k = np.split(packed, [q_width, q_width + kv_width], -1)
    else:
        q, k, v = np.split(packed, [q_width, q_width + kv_width], -1)
    return q.reshape(-1, heads, d), k.reshape(-1, kv_heads, d), v.reshape(-1, kv_heads, d)


def visibility(m, layer, start, end, fault):
    """Which keys each query sees [queries, keys]; start and end are the bounds of
    the call that each token came in."""
    query, key = np.arange(len(start))[:, None], np.arange(len(start))
    distance, window = query - key, m.sliding_window
    later = start[:, None] > 0
    slides = layer % 2 == (1 if fault == "window-on-odd-layers" else 0) or fault == "window-on-all-layers"
    seen = distance >= {"attention-sees-next": -1, "attention-excludes-self": 1}.get(fault, 0)
    if not slides or fault == "window-ignored":
        return seen
    if fault == "window-both-sides":
        return abs(distance) < window
    width = {
        "window-one-too-many": window + 1,
        "window-one-too-few": window - 1,
        "window-hard-coded-128": 128,
    }.get(fault, window)
    if fault == "kv-cache-window":
        return seen & (distance < np.where(later, window - 1, window))
    if fault == "kv-cache-window-ignored":
        return seen & (later | (distance < window))
    seen &= distance < width
    if fault == "kv-cache-trimmed-before-attention":
        seen &= ~later | (key >= end[:, None] - window)
    return seen


def probabilities(m, scores, sinks, later, scale, fault):
    """Softmax of scores [heads, queries, keys] with the sinks [heads]; and the
    sinks' own probabilities [heads, queries]."""
    heads = np.arange(len(sinks))
    group = m.num_attention_heads // m.num_key_value_heads
    if fault == "sinks-zero":
        sinks = np.zeros_like(sinks)
    if fault == "sinks-scaled":
        sinks = sinks * scale
    if fault == "sinks-misgrouped":
        sinks = sinks[heads // group]
    dropped = np.zeros((len(sinks), scores.shape[1]), bool)
    dropped |= fault == "sinks-dropped"
    dropped |= (fault == "sinks-first-group-only") & (heads >= group)[:, None]
    dropped |= (fault == "kv-cache-sinks-dropped") & later
    sink = np.where(dropped, -np.inf, sinks[:, None])[..., None]
    top = np.maximum(scores.max(-1, keepdims=True), sink)
    if fault == "sinks-not-in-max":
        top = scores.max(-1, keepdims=True)
        share = np.exp(sink)
    else:
        share = np.exp(sink - top)
    exponentials = np.exp(scores - top)
    total = exponentials.sum(-1, keepdims=True) + share * (2 if fault == "sinks-counted-twice" else 1)
    return exponentials / total, (share / total)[..., 0]


def attention(m, layer, normed, start, end, weight, fault):
    """attn_core [tokens, heads·d]."""
    tokens, d = len(normed), m.head_dim
    heads, kv_heads = m.num_attention_heads, m.num_key_value_heads
    bias = weight("attn.qkv.bias") * (fault != "qkv-bias-dropped")
    q, k, v = split_qkv(m, normed @ weight("attn.qkv.weight").T + bias, fault)

    positions, later = np.arange(tokens), start > 0
    if fault == "kv-cache-position" and layer % 2 == 0:
        positions = positions - start + np.minimum(start, m.sliding_window - 1)
    if fault == "kv-cache-position-zero":
        positions = positions - start
    if fault == "kv-cache-position-off-by-one" and layer > 0:
        positions = positions + later
    turns, concentration = frequencies(m, fault)
    interleaved = fault == "rope-interleaved"
    of_keys = 1 if fault == "rope-concentration-once" else concentration
    if fault == "rope-backwards":
        turns = -turns
    for _ in range({"rope-applied-twice": 2, "rope-missing": 0}.get(fault, 1)):
        q = rotate(q, positions + (fault == "rope-position-off-by-one"), turns, concentration, interleaved)
        k = rotate(k, positions, turns, of_keys, interleaved)

    scale = {
        "attention-scale-missing": 1,
        "attention-scale-from-hidden": 1 / sqrt(m.hidden_size / heads),
        "attention-scale-packed-qkv": 1 / sqrt(d * (heads + 2 * kv_heads) / heads),
        "attention-scale-twice": 1 / d,
    }.get(fault, 1 / sqrt(d))
    head = np.arange(heads)
    reads = head % kv_heads if fault == "gqa-heads-misgrouped" else head // (heads // kv_heads)
    scores = np.einsum("qhd,khd->hqk", q, k[:, reads]) * scale
    if fault == "kv-cache-keys-rotated-twice":
        again = rotate(k, positions, turns, concentration, False)
        scores = np.where(later[:, None], np.einsum("qhd,khd->hqk", q, again[:, reads]) * scale, scores)
    scores = np.where(visibility(m, layer, start, end, fault), scores, -np.inf)
    weights, sinks = probabilities(m, scores, weight("attn.sinks"), later, scale, fault)
    core = np.einsum("hqk,khd->qhd", weights, v[:, reads])
    if fault == "sinks-kept-in-values":
        core = core + sinks.T[..., None] * v[:, reads]
    return core.reshape(tokens, -1)


def route(m, normed, weight, fault):
    """Indices and weights [tokens, k] of the chosen experts."""
    bias = weight("mlp.gate.bias") * (fault != "router-bias-dropped")
    logits = normed @ weight("mlp.gate.weight").T + bias
    indices = np.argsort(-logits, -1, kind="stable")[:, : m.experts_per_token]
    chosen = np.take_along_axis(logits, indices, -1)
    of_all = np.take_along_axis(softmax(logits), indices, -1)
    if fault == "softmax-before-topk":
        return indices, softmax(of_all)
    if fault == "topk-not-renormalized":
        return indices, of_all
    if fault == "topk-one-too-few":
        chosen[:, -1] = -np.inf
    if fault == "router-bias-for-selection-only":
        chosen = chosen - bias[indices]
    if fault == "router-sigmoid":
        return indices, sigmoid(chosen) / sigmoid(chosen).sum(-1, keepdims=True)
    return indices, softmax(chosen)


def activate(m, x, fault):
    """SwiGLU of x [..., 2·intermediate]."""
    limit, alpha, one = m.swiglu_limit, 1.702, 1
    glu, linear = x[..., ::2], x[..., 1::2]
    if fault == "swiglu-halves":
        glu, linear = np.split(x, 2, -1)
    if fault == "swiglu-gate-up-swapped":
        glu, linear = linear, glu
    if fault == "swiglu-limit-zero":
        limit = 0
    if fault in ("swiglu-no-clamp", "swiglu-plain"):
        limit = np.inf
    if fault in ("swiglu-alpha-1", "swiglu-plain"):
        alpha = 1
    if fault == "swiglu-alpha-0":
        alpha = 0
    if fault in ("swiglu-no-plus-one", "swiglu-plain"):
        one = 0
    glu = np.clip(glu, -limit if fault == "swiglu-clamps-glu-below" else -np.inf, limit)
    if fault != "swiglu-linear-unclamped":
        linear = np.clip(linear, -limit, limit)
    gate = sigmoid(alpha * glu)
    if fault == "swiglu-gelu":
        gate = 0.5 * (1 + np.vectorize(erf)(glu / sqrt(2)))
    return glu * gate * (linear + one)


def mixture(m, layer, normed, weight, fault):
    """mlp_fused [tokens, hidden]."""
    indices, weights = route(m, normed, weight, fault)
    mlp1, mlp2 = (m.experts(f"block.{layer}.mlp.mlp{i}_weight", fault) for i in (1, 2))
    bias1, bias2 = weight("mlp.mlp1_bias"), weight("mlp.mlp2_bias")
    if fault == "mlp1-bias-dropped":
        bias1 = 0 * bias1
    if fault == "mlp1-bias-halves":
        bias1 = np.stack(np.split(bias1, 2, -1), -1).reshape(bias1.shape)
    bias2 = bias2 * {"mlp2-bias-dropped": 0, "mlp2-bias-per-rank": 2}.get(fault, 1)

    used = (indices + (fault == "experts-off-by-one")) % m.num_experts
    x = np.repeat(normed[:, None], m.experts_per_token, 1)
    if fault in ("router-weights-on-input", "router-weights-twice"):
        x = x * weights[..., None]
    x = np.einsum("tkoi,tki->tko", mlp1[used], x) + bias1[used]
    x = np.einsum("tkoi,tki->tko", mlp2[used], activate(m, x, fault)) + bias2[used]
    if fault == "experts-beyond-first-rank-dropped":
        x[indices >= m.num_experts // 2] = 0
    if fault == "router-weights-on-input":
        return x.sum(1)
    fused = (x * weights[..., None]).sum(1)
    if fault == "mlp2-bias-not-weighted":
        fused = fused + ((1 - weights)[..., None] * bias2[indices]).sum(1)
    return fused


def forward(m, tokens, calls, fault):
    """Logits [tokens, vocab]; calls says how many tokens come in each call."""
    end = np.repeat(np.cumsum(calls), calls)
    start = end - np.repeat(calls, calls)
    embedding, unembedding = m.tensors["embedding.weight"], m.tensors["unembedding.weight"]
    if fault == "embedding-tied":
        embedding = unembedding
    if fault == "unembedding-tied":
        unembedding = embedding
    x = embedding[tokens]
    if fault == "embedding-scaled":
        x = x * sqrt(m.hidden_size)
    scales = ["attn.norm.scale", "mlp.norm.scale"]
    if fault == "norm-scales-swapped":
        scales.reverse()
    for layer in range(m.num_hidden_layers):

        def weight(name):
            return m.tensors[f"block.{layer}.{name}"]

        normed = norm(x, weight(scales[0]), fault)
        core = attention(m, layer, normed, start, end, weight, fault)
        bias = weight("attn.out.bias") * {"out-bias-dropped": 0, "out-bias-per-rank": 2}.get(fault, 1)
        stream = normed if fault == "residual-before-norm" else x
        x = stream + core @ weight("attn.out.weight").T + bias
        normed = norm(x, weight(scales[1]), fault)
        stream = normed if fault == "residual-before-norm" else x
        x = stream + mixture(m, layer, normed, weight, fault)
    if fault != "final-norm-missing":
        x = norm(x, m.tensors["norm.scale"], fault)
    return x @ unembedding.T


def main():
    m = Model(FIXTURE)
    prompts = {p["name"]: p["tokens"] for p in json.loads((FIXTURE / "prompts.json").read_text())}
    tokens = np.array(prompts["full"])
    first = len(tokens) * 3 // 5
    calls = [first, 5] + [1] * (len(tokens) - first - 5)
    table = (ROOT / "conformance" / "faults" / "README.md").read_text().splitlines()
    faults = sorted(line.split("`")[1] for line in table if line.startswith("| `"))
    sampled = {}
    right = forward(m, tokens, calls, "right")
    for fault in ["right", *faults]:
        logits = forward(m, tokens, calls if fault.startswith("kv-") else [len(tokens)], fault)
        if fault != "right" and np.allclose(logits, right, atol=1e-9, rtol=0):
            raise SystemExit(f"{fault} is not known to tools/oracles/faults.py, or changes nothing")
        sampled[fault] = np.ascontiguousarray(logits[-ROWS:, ::STEP])
    OUTPUT.parent.mkdir(exist_ok=True)
    save_file(sampled, OUTPUT, {
        "oracle": "tools/oracles/faults.py, numpy " + np.__version__ + ", float64",
        "checkpoint_sha256": hashlib.sha256((FIXTURE / "model.safetensors").read_bytes()).hexdigest(),
        "tokens": "the prompt full",
        "rows": f"the last {ROWS}",
        "columns": f"every {STEP}th",
    })
    print(f"{OUTPUT.relative_to(ROOT)}: {len(sampled)} runs")


if __name__ == "__main__":
    main()
