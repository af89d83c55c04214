"""Writes a gpt-oss checkpoint (OpenAI's layout) as GGUF, for llama.cpp.

  python tools/bench/gguf_checkpoint.py CHECKPOINT OUT.gguf

MXFP4 and bfloat16 stay what they are: only the nibbles of a group and the rows of
mlp1 (glu and linear interleaved) change places. There is no tokenizer in it, so
that it serves for benchmarks alone. Needs the package gguf.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open


def mxfp4(blocks, scales):
    """OpenAI keeps values 2i and 2i+1 in byte i, GGUF values i and i+16, after the scale."""
    blocks = blocks.numpy()
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    packed = codes[..., :16] | codes[..., 16:] << 4
    out = np.concatenate([scales.numpy()[..., None], packed], axis=-1)
    return out.reshape(*out.shape[:-2], -1)


def main(source, target):
    config = json.loads((Path(source) / "config.json").read_text())
    weights = safe_open(Path(source) / "model.safetensors", "pt")
    writer = gguf.GGUFWriter(target, "gpt-oss")
    writer.add_name("synthetic gpt-oss")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(int(config["initial_context_length"] * config["rope_scaling_factor"]))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["experts_per_token"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(config["rope_scaling_factor"]))
    writer.add_rope_scaling_orig_ctx_len(config["initial_context_length"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def bf16(name, value):
        data = value.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)

    def f32(name, value):
        writer.add_tensor(name, value.float().numpy())

    bf16("token_embd.weight", weights.get_tensor("embedding.weight"))
    bf16("output.weight", weights.get_tensor("unembedding.weight"))
    f32("output_norm.weight", weights.get_tensor("norm.scale"))
    query, kv = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    for layer in range(config["num_hidden_layers"]):
        def get(name):
            return weights.get_tensor(f"block.{layer}.{name}")

        prefix = f"blk.{layer}."
        f32(prefix + "attn_norm.weight", get("attn.norm.scale"))
        f32(prefix + "post_attention_norm.weight", get("mlp.norm.scale"))
        f32(prefix + "attn_sinks.weight", get("attn.sinks"))
        for part, w, b in zip("qkv", get("attn.qkv.weight").split([query, kv, kv]), get("attn.qkv.bias").split([query, kv, kv])):
            bf16(f"{prefix}attn_{part}.weight", w)
            f32(f"{prefix}attn_{part}.bias", b)
        bf16(prefix + "attn_output.weight", get("attn.out.weight"))
        f32(prefix + "attn_output.bias", get("attn.out.bias"))
        f32(prefix + "ffn_gate_inp.weight", get("mlp.gate.weight"))
        f32(prefix + "ffn_gate_inp.bias", get("mlp.gate.bias"))
        blocks, scales = get("mlp.mlp1_weight.blocks"), get("mlp.mlp1_weight.scales")
        for first, name in enumerate(("gate", "up")):
            writer.add_tensor(f"{prefix}ffn_{name}_exps.weight", mxfp4(blocks[:, first::2], scales[:, first::2]), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
            f32(f"{prefix}ffn_{name}_exps.bias", get("mlp.mlp1_bias")[:, first::2].contiguous())
        writer.add_tensor(prefix + "ffn_down_exps.weight", mxfp4(get("mlp.mlp2_weight.blocks"), get("mlp.mlp2_weight.scales")), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        f32(prefix + "ffn_down_exps.bias", get("mlp.mlp2_bias"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
