"""jax2onnx's Equinox model, as shipped or corrected.

As shipped a sliding layer sees window + 1 keys, and the loader takes
1e-6 · expert index from the router's bias. Corrected, both are put right.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax2onnx.plugins.examples.eqx import gpt_oss as upstream

import tapnames
from checkpoints import Checkpoint

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load(checkpoint: Checkpoint, precision: str, correct: bool):
    """Their own loader for OpenAI's layout; for others it reads through ours."""
    dtype = DTYPES[precision]
    config = upstream.GPTOSSConfig(**checkpoint.config)
    model = upstream.Transformer(config=config, key=jax.random.PRNGKey(0), param_dtype=dtype)
    model = upstream._populate_eqx_from_checkpoint(checkpoint, model, param_dtype=dtype)
    if correct:
        for layer in range(checkpoint.layers):
            bias = jnp.asarray(checkpoint.get(f"block.{layer}.mlp.gate.bias").float().numpy()).astype(dtype)
            model = eqx.tree_at(lambda m, layer=layer: m.blocks[layer].mlp.gate.bias, model, bias)
    return model


# jax2onnx's names where they differ from the registry's.
RENAMED = {
    "attn_norm": "attn_normed", "attn_q": "q", "attn_k": "k", "attn_v": "v",
    "mlp_norm": "mlp_normed", "gate_logits": "mlp_gate_logits",
    "expert_indices": "mlp_expert_indices", "expert_weights": "mlp_expert_weights",
    "mlp_proj1": "mlp_prelinear_outputs", "mlp_act": "mlp_activated_outputs",
    "mlp_proj2": "mlp_expert_outputs", "mlp_output": "mlp_fused",
    "input": "input", "output": "output",
}


def run(checkpoint: Checkpoint, precision: str, tokens, wanted, correct=False, inject=None):
    model = load(checkpoint, precision, correct)
    config, found, rotated = checkpoint.config, {}, []
    if len(tokens) > config["initial_context_length"]:
        raise SystemExit(f"equinox: its RoPE tables end at {config['initial_context_length']} positions")

    rope, sdpa, attention = upstream.RotaryEmbedding.__call__, upstream._sdpa_torch_style, upstream.AttentionBlock.debug
    linears = {name: getattr(upstream, name) for name in ("_apply_linear_nd", "_apply_linear_float32_accum")}
    attended, inputs = [], []

    def observed_rope(self, query, key, **named):
        rotated.append(rope(self, query, key, **named))
        return rotated[-1]

    def observed_attention(self, x):
        out, debug = attention(self, x)
        attended.append(out)
        return out, debug

    def observe(linear):
        def observed(module, x):
            inputs.append((module, x))
            return linear(module, x)

        return observed

    def corrected_sdpa(*args, sliding_window, **named):
        # Their function shows window + 1 keys.
        return sdpa(*args, sliding_window=sliding_window - 1 if sliding_window > 0 else 0, **named)

    upstream.RotaryEmbedding.__call__, upstream.AttentionBlock.debug = observed_rope, observed_attention
    for name, linear in linears.items():
        setattr(upstream, name, observe(linear))
    if correct:
        if config["sliding_window"] == 1:
            raise SystemExit("equinox: a window of 1 cannot be corrected (0 means none)")
        upstream._sdpa_torch_style = corrected_sdpa
    try:
        if inject:
            first, hidden = inject[0], jnp.asarray(inject[1].float().numpy()).astype(DTYPES[precision])
            debug = [model.blocks[first].debug(hidden[None])[1]]
        else:
            first = 0
            found["logits"], debug = model.debug(jnp.asarray(tokens, jnp.int32))
    finally:
        upstream.RotaryEmbedding.__call__, upstream._sdpa_torch_style, upstream.AttentionBlock.debug = rope, sdpa, attention
        for name, linear in linears.items():
            setattr(upstream, name, linear)
    # What goes into a projection is the attention's output or the final norm's.
    into = {id(module): x for module, x in inputs}
    if not inject:
        found["final_norm"], found["embedding"] = into[id(model.unembedding)], debug[0]["input"]
    for layer, (entry, (query, key), out) in enumerate(zip(debug, rotated, attended, strict=True), start=first):
        here = {ours: entry[theirs] for theirs, ours in RENAMED.items()}
        here["q_rot"], here["k_rot"] = query, key
        here["attn_core"] = into[id(model.blocks[layer].attn.out)]
        here["post_attention"] = out
        chosen = jax.nn.one_hot(here["mlp_expert_indices"], config["num_experts"])
        here["mlp_dense_gate_weights"] = (chosen * here["mlp_expert_weights"][..., None]).sum(-2)
        found |= {tapnames.block(layer, name): value for name, value in here.items()}
    return {
        name: as_torch(found[name]).reshape(tapnames.shape(config, name, len(tokens)))
        for name in tapnames.every(config)
        if name in found and name in wanted
    }


def as_torch(value):
    """bfloat16 stays bfloat16; their bfloat16 model has float32 inside the experts."""
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(value.astype(jnp.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(value))
