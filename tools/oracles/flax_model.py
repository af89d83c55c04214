"""jax2onnx's Flax model, as shipped or with its window corrected.

As shipped it masks q - k > window, so that a sliding layer sees one key too
many; corrected, q - k >= window is masked, as in OpenAI's model.
"""

import jax.numpy as jnp
import numpy as np
import torch
from jax2onnx.plugins.examples.nnx import gpt_oss_flax as upstream

import tapnames
from checkpoints import Checkpoint


def array(tensor):
    return jnp.asarray(tensor.float().numpy())


def load(checkpoint: Checkpoint, length: int, correct: bool):
    config = upstream.GPTOSSConfig(**checkpoint.config)
    cos, sin = upstream._rotary_tables_for_config(config, min_length=length)
    # Their mask for a window w shows w + 1 keys.
    window = config.sliding_window - (1 if correct else 0)
    model = upstream.Transformer(
        config=config,
        cos_table=cos,
        sin_table=sin,
        sequence_length=length,
        mask_sliding=upstream._causal_mask(length, length, sliding_window=window) if window else jnp.asarray(np.where(np.eye(length), 0, -np.inf), jnp.float32),
        mask_causal=upstream._causal_mask(length, length),
        dtype=jnp.float32,
        rng=0,
    )
    get = lambda name: array(checkpoint.get(name))  # noqa: E731
    model.token_embedding.embedding.value = get("embedding.weight")
    model.norm.scale.value = get("norm.scale")
    model.unembedding_kernel.value = get("unembedding.weight").T
    for layer in range(checkpoint.layers):
        block, name = model.blocks[f"block_{layer}"], f"block.{layer}."
        block.norm1.scale.value = get(name + "attn.norm.scale")
        block.norm2.scale.value = get(name + "mlp.norm.scale")
        attention, mlp = block.attention, block.mlp
        attention.qkv_kernel.value = get(name + "attn.qkv.weight").T
        attention.qkv_bias.value = get(name + "attn.qkv.bias")
        attention.out_kernel.value = get(name + "attn.out.weight").T
        attention.out_bias.value = get(name + "attn.out.bias")
        attention.sinks.value = get(name + "attn.sinks")
        mlp.gate_kernel.value = get(name + "mlp.gate.weight").T
        mlp.gate_bias.value = get(name + "mlp.gate.bias")
        for part in ("mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias"):
            getattr(mlp, part).value = get(name + "mlp." + part)
    return model


# jax2onnx's names where they differ from the registry's.
RENAMED = {"attn_q": "q", "attn_k": "k", "attn_v": "v"}


def run(checkpoint: Checkpoint, precision: str, tokens, wanted, correct=False, inject=None):
    model = load(checkpoint, len(tokens), correct)
    config, found, debug, rotated, cores = checkpoint.config, {}, [], [], []

    # Between the captured taps: the rotation and the attention itself.
    rope, sdpa = upstream.RotaryEmbedding.__call__, upstream.sdpa

    def observed_rope(self, query, key, **named):
        rotated.append(rope(self, query, key, **named))
        return rotated[-1]

    def observed_sdpa(*args, **named):
        cores.append(sdpa(*args, **named))
        return cores[-1]

    upstream.RotaryEmbedding.__call__, upstream.sdpa = observed_rope, observed_sdpa
    try:
        if inject:
            first, hidden = inject[0], jnp.asarray(inject[1].float().numpy())
            debug.append({"input": hidden})
            debug[0]["output"] = model.blocks[f"block_{first}"](hidden, capture_debug=debug[0])
        else:
            first = 0
            found["logits"] = model(jnp.asarray(tokens, jnp.int32), capture_block_debug=debug)
            found["embedding"] = debug[0]["input"]
            found["final_norm"] = model.norm(debug[-1]["output"])
    finally:
        upstream.RotaryEmbedding.__call__, upstream.sdpa = rope, sdpa
    for layer, (entry, (query, key), core) in enumerate(zip(debug, rotated, cores, strict=True), start=first):
        for name, value in entry.items():
            if name != "attn_projected":
                found[tapnames.block(layer, RENAMED.get(name, name))] = value
        found[tapnames.block(layer, "q_rot")], found[tapnames.block(layer, "k_rot")] = query, key
        found[tapnames.block(layer, "attn_core")] = core
    return {
        name: torch.from_numpy(np.array(found[name]).reshape(tapnames.shape(config, name, len(tokens))))
        for name in tapnames.every(config)
        if name in found and name in wanted
    }
