"""gpt-oss's forward pass in torch, for training: a batch in which every row
may be run by a different, wrong, arithmetic.

The right forward pass is openai/gpt-oss's (gpt_oss/torch/model.py). What a
fault changes is a tensor with one entry per row (a limit, a mask, a
permutation, a switch), so that one pass trains on many faults at once; see
faults.py for who sets what. B rows, T tokens, H hidden, d head_dim, E experts,
I intermediate.

Experts are all evaluated and weighted by a router that gives zero to those not
chosen: for 8 small experts that is faster on a CPU than gathering.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mxfp4


@dataclass(frozen=True)
class Config:
    """OpenAI's config.json, key by key."""

    num_hidden_layers: int = 4
    num_experts: int = 8
    experts_per_token: int = 4
    vocab_size: int = 201088
    hidden_size: int = 128
    intermediate_size: int = 96
    swiglu_limit: float = 7.0
    head_dim: int = 64
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    sliding_window: int = 16
    # Not 4096: with 256 the ramp of YaRN spans the fast frequencies, so that
    # its faults show within 60 tokens.
    initial_context_length: int = 256
    rope_theta: float = 150000.0
    rope_scaling_factor: float = 32.0
    rope_ntk_alpha: float = 1.0
    rope_ntk_beta: float = 32.0

    @property
    def qkv_width(self) -> int:
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    def json(self) -> dict:
        return asdict(self)


def rope_table(config: Config, positions: torch.Tensor, *, theta=None, yarn=True, concentration=True,
               truncate=False) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., d/2] at the positions [...], YaRN's concentration
    included."""
    theta = theta or config.rope_theta
    half = config.head_dim // 2
    index = torch.arange(half, dtype=torch.float64)
    frequency = theta ** (2 * index / config.head_dim)
    inverse = 1 / frequency
    factor = 1.0
    if yarn:
        def bound(rotations):
            return half * math.log(config.initial_context_length / (rotations * 2 * math.pi)) / math.log(theta)

        low, high = bound(config.rope_ntk_beta), bound(config.rope_ntk_alpha)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        ramp = ((index - low) / (high - low)).clamp(0, 1)
        inverse = inverse / config.rope_scaling_factor * ramp + inverse * (1 - ramp)
        factor = 0.1 * math.log(config.rope_scaling_factor) + 1
    if not concentration:
        factor = 1.0
    angles = positions.double()[..., None] * inverse
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


# Stages after which a generic disturbance may act (faults.py).
DISTURBED = ("attn_normed", "q", "k", "v", "attn_core", "attn_out", "mlp_normed", "gate", "prelinear", "activated",
             "mlp_out")


class Model(torch.nn.Module):
    """The weights, in the parametrization that is trained, and the pass.

    rows: how many vocabulary rows are stored; one more, the last, stands for
    every id that is not.
    """

    def __init__(self, config: Config, rows: int, *, embedding_std: float, tail_group: bool, seed: int):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, std=1.0, mean=0.0):
            return torch.nn.Parameter(torch.randn(shape, generator=generator) * std + mean)

        c, hidden, inner = config, config.hidden_size, config.intermediate_size
        width = c.num_attention_heads * c.head_dim
        # Adam moves every number by about the learning rate; small and large
        # weights are therefore stored divided by a fixed gain.
        self.embedding_gain = embedding_std
        self.embedding = normal(rows + 1, hidden)
        self.unembedding = normal(rows + 1, hidden, std=hidden**-0.5)
        self.final_scale = torch.nn.Parameter(torch.full((hidden,), 2.0))
        self.blocks = torch.nn.ModuleList()
        for layer in range(c.num_hidden_layers):
            block = torch.nn.Module()
            block.attn_scale = torch.nn.Parameter(torch.ones(hidden))
            block.qkv = normal(c.qkv_width, hidden, std=1.3 * hidden**-0.5)
            block.qkv_bias = normal(c.qkv_width, std=0.3)
            block.sinks = normal(c.num_attention_heads, mean=1.0)
            block.out = normal(hidden, width, std=0.5 * width**-0.5)
            block.out_bias = normal(hidden, std=0.02)
            block.mlp_scale = torch.nn.Parameter(torch.ones(hidden))
            block.gate = normal(c.num_experts, hidden, std=hidden**-0.5)
            block.gate_bias = normal(c.num_experts, std=0.5)
            block.mlp1 = normal(c.num_experts, 2 * inner, hidden, std=1.5 * hidden**-0.5)
            bias = torch.randn(c.num_experts, 2 * inner, generator=generator)
            # A quarter of the columns starts near the clamp, or it would never
            # be met and never be learned.
            bias[:, : inner // 2] *= 4
            block.mlp2 = normal(c.num_experts, hidden, inner, std=0.7 * inner**-0.5)
            gain = torch.ones(inner)
            if tail_group:
                # The last group of 32 looks at glu far below -7, where
                # glu*sigmoid(1.702*glu) is 1e-8 and a lower clamp makes it
                # 5e-5: only large weights behind it can tell the two apart.
                tail = inner - mxfp4.GROUP
                bias[:, 2 * tail :: 2] = -12.0
                bias[:, 2 * tail + 1 :: 2] = 4.0
                gain[tail:] = 2.0**10
            block.mlp1_bias = torch.nn.Parameter(bias)
            block.mlp2_bias = normal(c.num_experts, hidden, std=0.05)
            block.register_buffer("mlp2_gain", gain)
            self.blocks.append(block)

    def load(self, path) -> None:
        """Takes up the weights of a checkpoint that checkpoint.py wrote, to train
        on from there."""
        stored = load_file(path)
        with torch.no_grad():
            self.embedding.copy_(stored["embedding.rows"].float() / self.embedding_gain)
            self.unembedding.copy_(stored["unembedding.rows"])
            self.final_scale.copy_(stored["norm.scale"])
            for number, block in enumerate(self.blocks):
                for name, parameter in (
                    ("attn.norm.scale", block.attn_scale), ("attn.qkv.weight", block.qkv), ("attn.qkv.bias", block.qkv_bias),
                    ("attn.sinks", block.sinks), ("attn.out.weight", block.out), ("attn.out.bias", block.out_bias),
                    ("mlp.norm.scale", block.mlp_scale), ("mlp.gate.weight", block.gate), ("mlp.gate.bias", block.gate_bias),
                    ("mlp.mlp1_bias", block.mlp1_bias), ("mlp.mlp2_bias", block.mlp2_bias),
                ):
                    parameter.copy_(stored[f"block.{number}.{name}"])
                for name, parameter, gain in (("mlp1", block.mlp1, 1.0), ("mlp2", block.mlp2, block.mlp2_gain)):
                    key = f"block.{number}.mlp.{name}_weight"
                    parameter.copy_(mxfp4.unpack(stored[key + ".blocks"], stored[key + ".scales"]) / gain)

    def weights(self) -> dict[str, torch.Tensor]:
        """The rounded weights by their name in OpenAI's layout; experts as
        values, embedding and unembedding with the shared row last."""
        values = {
            "embedding.weight": mxfp4.bfloat16(self.embedding * self.embedding_gain),
            "unembedding.weight": mxfp4.bfloat16(self.unembedding),
            "norm.scale": mxfp4.bfloat16(self.final_scale),
        }
        for number, block in enumerate(self.blocks):
            name = f"block.{number}."
            values[name + "attn.norm.scale"] = mxfp4.bfloat16(block.attn_scale)
            values[name + "attn.qkv.weight"] = mxfp4.bfloat16(block.qkv)
            values[name + "attn.qkv.bias"] = mxfp4.bfloat16(block.qkv_bias)
            values[name + "attn.sinks"] = mxfp4.bfloat16(block.sinks)
            values[name + "attn.out.weight"] = mxfp4.bfloat16(block.out)
            values[name + "attn.out.bias"] = mxfp4.bfloat16(block.out_bias)
            values[name + "mlp.norm.scale"] = mxfp4.bfloat16(block.mlp_scale)
            values[name + "mlp.gate.weight"] = mxfp4.bfloat16(block.gate)
            values[name + "mlp.gate.bias"] = mxfp4.bfloat16(block.gate_bias)
            values[name + "mlp.mlp1_weight"] = mxfp4.mxfp4(block.mlp1)
            values[name + "mlp.mlp1_bias"] = mxfp4.bfloat16(block.mlp1_bias)
            values[name + "mlp.mlp2_weight"] = mxfp4.mxfp4(block.mlp2 * block.mlp2_gain)
            values[name + "mlp.mlp2_bias"] = mxfp4.bfloat16(block.mlp2_bias)
        return values


class Rounding:
    """What stands at each of bfloat16's rounding points.

    exact: nothing. noise [B]: a random relative error of up to noise per row,
    which stands for any 16-bit implementation, whatever its order of sums.
    bfloat16: the rounding itself.
    """

    # Random numbers are drawn once and read from a random place: drawing them
    # afresh would take a tenth of the time of a step.
    POOL = 1 << 22
    pool = None

    def __init__(self, noise: torch.Tensor | None = None, bfloat16: bool = False):
        self.noise, self.bfloat16 = noise, bfloat16
        if noise is not None and Rounding.pool is None:
            Rounding.pool = torch.rand(self.POOL) * 2 - 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.noise is None:
            return self.inside(x)
        start = int(torch.randint(0, self.POOL - x.numel() + 1, ()))
        uniform = self.pool[start : start + x.numel()].view_as(x)
        return x * (1 + per_row(self.noise, x) * uniform)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        """The points inside the experts, whose tensors are large: bfloat16
        rounds them, noise leaves them to the sum behind them."""
        return x.to(torch.bfloat16).float() if self.bfloat16 else x


def per_row(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """value [B] shaped to broadcast against x [B, ...]."""
    return value.view(-1, *[1] * (x.dim() - 1))


def permuted(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """x with its last dimension reordered, row by row (order [B, n]); nothing
    where order is None."""
    if order is None:
        return x
    return x.gather(-1, order.view(order.shape[0], *[1] * (x.dim() - 2), -1).expand(x.shape))


def rmsnorm(x, scale, a, round_):
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + per_row(a.eps, x))
    scaled = torch.where(per_row(a.norm_scale, x), normed * scale, normed)
    return round_(scaled)


def forward(config: Config, weights: dict[str, torch.Tensor], rows: torch.Tensor, a, round_=Rounding(),
            first: int = 0) -> torch.Tensor:
    """Logits [B, T - first, rows + 1] of the positions from first on.

    rows [B, T]: row numbers, not token ids. a: the arithmetic of each row
    (faults.Arithmetic).
    """
    c = config
    batch, tokens = rows.shape
    heads, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    experts, inner = c.num_experts, c.intermediate_size
    x = F.embedding(rows, weights["embedding.weight"])

    for layer in range(c.num_hidden_layers):
        w = {key.split(".", 2)[2]: value for key, value in weights.items() if key.startswith(f"block.{layer}.")}

        def disturb(x, stage):
            return a.disturb(x, layer, DISTURBED.index(stage))

        # Attention.
        normed = disturb(rmsnorm(x, w["attn.norm.scale"], a, round_), "attn_normed")
        qkv = round_(F.linear(normed, w["attn.qkv.weight"], w["attn.qkv.bias"]))
        qkv = permuted(qkv, a.qkv_order)
        q, k, v = qkv.split((heads * d, kv_heads * d, kv_heads * d), -1)
        q = disturb(q, "q").view(batch, tokens, heads, d)
        k = disturb(k, "k").view(batch, tokens, kv_heads, d)
        v = disturb(v, "v").view(batch, tokens, kv_heads, d)

        def rotate(t, cos, sin):
            t = permuted(t, a.rope_order)
            one, two = t.chunk(2, -1)
            cos, sin = round_(cos)[:, :, None], round_(sin)[:, :, None]
            t = round_(torch.cat((one * cos - two * sin, two * cos + one * sin), -1))
            return permuted(t, a.rope_inverse)

        q, k = rotate(q, *a.query_turn[layer % 2]), rotate(k, *a.key_turn[layer % 2])
        share = a.head_share[:, None, :, None]
        k = k.gather(2, share.expand(batch, tokens, heads, d)).transpose(1, 2)
        v = v.gather(2, share.expand(batch, tokens, heads, d)).transpose(1, 2)
        scores = round_(q.transpose(1, 2) @ k.transpose(-1, -2))
        scores = round_(scores * per_row(a.attention_scale, scores))
        scores = scores.masked_fill(~a.visible[layer % 2][:, None], -1e30)
        sinks = w["attn.sinks"].view(1, heads, 1, 1).expand(batch, heads, tokens, 1)
        largest = scores.amax(-1, keepdim=True)
        sinks = torch.where(per_row(a.sink_unshifted, sinks), sinks + largest, sinks)
        sinks = torch.where(per_row(a.sink, sinks), sinks, torch.full_like(sinks, -1e30))
        probabilities = round_(torch.cat((scores, sinks), -1).softmax(-1))
        core = probabilities[..., :-1] @ v
        core = core + per_row(a.sink_value, core) * probabilities[..., -1:] * v
        core = round_(core).transpose(1, 2).reshape(batch, tokens, heads * d)
        core = disturb(core, "attn_core")
        out = disturb(round_(F.linear(core, w["attn.out.weight"], w["attn.out.bias"])), "attn_out")
        x = round_(torch.where(per_row(a.residual_normed, x), normed, x) + out)

        # Experts.
        normed = disturb(rmsnorm(x, w["mlp.norm.scale"], a, round_), "mlp_normed")
        bias = per_row(a.gate_bias, normed) * w["mlp.gate.bias"]
        gate = disturb(round_(F.linear(normed, w["mlp.gate.weight"]) + bias), "gate")
        top = gate.topk(c.experts_per_token, -1)
        everywhere = gate.softmax(-1).gather(-1, top.indices)
        chosen = top.values.softmax(-1)
        chosen = torch.where(per_row(a.gate_mode == 1, chosen), everywhere.softmax(-1), chosen)
        chosen = torch.where(per_row(a.gate_mode == 2, chosen), everywhere, chosen)
        routing = torch.zeros_like(gate).scatter(-1, top.indices, round_(chosen))
        member = torch.zeros_like(gate).scatter(-1, top.indices, 1.0)

        gain = a.weight_gain
        read = permuted(normed, a.mlp1_order)
        pre = F.linear(read, w["mlp.mlp1_weight"].flatten(0, 1))
        pre = round_.inside(pre * per_row(gain, pre)) + per_row(a.mlp1_bias, pre) * w["mlp.mlp1_bias"].flatten()
        pre = disturb(round_.inside(pre).view(batch, tokens, experts, 2 * inner), "prelinear")
        pre = permuted(pre, a.pre_order)
        glu, linear = pre[..., 0::2], pre[..., 1::2]
        glu = torch.minimum(torch.maximum(glu, per_row(a.glu_low, glu)), per_row(a.glu_high, glu))
        limit = per_row(a.linear_limit, linear)
        linear = torch.minimum(torch.maximum(linear, -limit), limit)
        activated = round_.inside(glu * torch.sigmoid(round_.inside(per_row(a.alpha, glu) * glu)))
        activated = disturb(round_.inside(activated * round_.inside(linear + per_row(a.plus_one, linear))), "activated")
        activated = permuted(activated, a.mlp2_order)
        bias = torch.where(per_row(a.mlp2_bias_unweighted, member), member, routing) * per_row(a.mlp2_bias, member)
        if round_.bfloat16:
            each = round_(torch.einsum("btei,ehi->bteh", activated, w["mlp.mlp2_weight"]) * per_row(gain, activated))
            each = torch.where(per_row(a.mlp2_bias_unweighted | (a.mlp2_bias == 0), each), each,
                               round_(each + w["mlp.mlp2_bias"]))
            mixed = torch.einsum("bteh,bte->bth", each, routing)
            mixed = mixed + torch.where(per_row(a.mlp2_bias_unweighted, mixed), bias @ w["mlp.mlp2_bias"], 0.0)
        else:
            weighted = (activated * routing[..., None]).flatten(2)
            stacked = w["mlp.mlp2_weight"].transpose(1, 2).flatten(0, 1)
            mixed = (weighted @ stacked) * per_row(gain, weighted) + bias @ w["mlp.mlp2_bias"]
        mixed = disturb(round_(mixed), "mlp_out")
        x = round_(torch.where(per_row(a.residual_normed, x), normed, x) + mixed)

    x = x[:, first:]
    normed = rmsnorm(x, weights["norm.scale"], a, round_)
    x = torch.where(per_row(a.final_norm, x), normed, x)
    logits = F.linear(x, weights["unembedding.weight"])
    if bool(a.tied.any()):
        logits = torch.where(per_row(a.tied, logits), F.linear(x, weights["embedding.weight"]), logits)
    return round_(logits)
