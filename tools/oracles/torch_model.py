"""OpenAI's own torch model (gpt_oss.torch.model), observed.

The model's code runs unchanged. Hooks and wrappers around its modules and
functions record what flows through them. Three arithmetics:

float64   the truth of the suite: every weight widened exactly, and everything
          that the code pins to float32 (RMSNorm, the RoPE tables) in float64
float32   every weight widened exactly, otherwise as written
bfloat16  as shipped
"""

import contextlib

import gpt_oss.torch.model as upstream
import torch

import tapnames
from checkpoints import Checkpoint

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load(checkpoint: Checkpoint, precision: str):
    """The model with its weights, as shipped or widened."""
    if checkpoint.is_openai and checkpoint.whole:
        model = upstream.Transformer.from_checkpoint(str(checkpoint.path), device="cpu")
    else:
        model = upstream.Transformer(upstream.ModelConfig(**checkpoint.config), device=torch.device("cpu"))
        if precision != "bfloat16":
            model.to(DTYPES[precision])  # first, for a dense checkpoint may hold float32
        for name, parameter in model.named_parameters():
            parameter.data.copy_(checkpoint.get(name))
    model.eval()
    if precision != "bfloat16":
        model.to(DTYPES[precision])
    return model


class _Namespace:
    """Stands in for the name `torch` inside the upstream module: attributes in
    `replaced` are ours, all others torch's."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def arithmetic(precision: str, **observers):
    """Runs upstream code in a precision. In float64 the types that it names
    (torch.float, torch.float32, Tensor.float) mean float64."""
    replaced = dict(observers)
    keep = torch.Tensor.float
    if precision == "float64":
        replaced |= {"float": torch.float64, "float32": torch.float64}
        torch.Tensor.float = torch.Tensor.double
    upstream.torch = _Namespace(**replaced)
    try:
        yield
    finally:
        upstream.torch = torch
        torch.Tensor.float = keep


def run(checkpoint: Checkpoint, precision: str, tokens, wanted, inject=None):
    """Returns the wanted taps of one run as torch tensors. With inject, a block and
    its input, the run is the same but that block gets this input."""
    model = load(checkpoint, precision)
    config, taps, current = checkpoint.config, {}, {"layer": 0}

    def record(name, value):
        if name in wanted:
            taps[name] = value.detach().reshape(tapnames.shape(config, name, len(tokens))).clone()

    def here(name, value):
        record(tapnames.block(current["layer"], name), value)

    def output_of(module, name):
        module.register_forward_hook(lambda _module, _args, out: (record if name in ("embedding", "final_norm", "logits") else here)(name, out))

    output_of(model.embedding, "embedding")
    output_of(model.norm, "final_norm")
    output_of(model.unembedding, "logits")
    if inject:
        hidden = inject[1].to(DTYPES[precision])
        model.block[inject[0]].register_forward_pre_hook(lambda _module, _args: (hidden,))
    for layer, block in enumerate(model.block):
        block.register_forward_pre_hook(lambda _module, args, layer=layer: (current.update(layer=layer), here("input", args[0]))[0])
        output_of(block.attn.norm, "attn_normed")
        block.attn.rope.register_forward_pre_hook(lambda _module, args: (here("q", args[0]), here("k", args[1]))[0])
        block.attn.rope.register_forward_hook(lambda _module, _args, out: (here("q_rot", out[0]), here("k_rot", out[1]))[0])
        output_of(block.attn, "post_attention")
        output_of(block.mlp.norm, "mlp_normed")
        output_of(block.mlp.gate, "mlp_gate_logits")
        output_of(block, "output")

    # Values that no module boundary shows pass through these functions.
    sdpa, swiglu = upstream.sdpa, upstream.swiglu

    def observed_sdpa(query, key, value, *rest, **named):
        here("v", value)
        out = sdpa(query, key, value, *rest, **named)
        here("attn_core", out)
        return out

    def observed_swiglu(x, *rest, **named):
        here("mlp_prelinear_outputs", x)
        out = swiglu(x, *rest, **named)
        here("mlp_activated_outputs", out)
        return out

    def observed_topk(*args, **named):
        out = torch.topk(*args, **named)
        current["indices"] = out.indices
        here("mlp_expert_indices", out.indices.to(torch.int32))
        return out

    def observed_einsum(equation, *operands):
        out = torch.einsum(equation, *operands)
        if equation == "bec,be->bc":  # the weighted sum of the experts
            outputs, weights = operands
            here("mlp_expert_outputs", outputs)
            here("mlp_expert_weights", weights)
            dense = torch.zeros(len(tokens), config["num_experts"], dtype=weights.dtype)
            here("mlp_dense_gate_weights", dense.scatter(1, current["indices"], weights))
            here("mlp_fused", out)
        return out

    upstream.sdpa, upstream.swiglu = observed_sdpa, observed_swiglu
    try:
        with torch.inference_mode(), arithmetic(precision, topk=observed_topk, einsum=observed_einsum):
            model(torch.tensor(tokens, dtype=torch.int32))
    finally:
        upstream.sdpa, upstream.swiglu = sdpa, swiglu
    for name, value in taps.items():
        expected = torch.int32 if name.endswith("indices") else DTYPES[precision]
        if value.dtype != expected:
            raise SystemExit(f"torch {precision}: {name} came out as {value.dtype}: the upstream code changed, see tools/oracles/torch_model.py")
    return taps
