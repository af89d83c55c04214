"""Writes a gpt-oss checkpoint (OpenAI's layout) as GGUF, for llama.cpp.

  python tools/bench/gguf_checkpoint.py CHECKPOINT OUT.gguf

MXFP4 and bfloat16 stay what they are: only the nibbles of a group and the rows of
mlp1 (glu and linear interleaved) change places. One tensor at a time is in memory.
There is no tokenizer in it, so that it serves for benchmarks alone. Needs numpy, and
the package gguf: installed, or from the source that tools/bench/llama.sh builds.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "build" / "llama"))
import gguf  # noqa: E402

DTYPES = {"BF16": np.uint16, "F32": np.float32, "U8": np.uint8}


def open_weights(directory):
    """Maps every safetensors file of a directory: name -> (stored dtype, array)."""
    weights = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        for name, about in header.items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                weights[name] = about["dtype"], data[start:end].view(DTYPES[about["dtype"]]).reshape(about["shape"])
    return weights


def mxfp4(blocks, scales):
    """OpenAI keeps values 2i and 2i+1 in byte i, GGUF values i and i+16, after the scale."""
    out = np.empty((*blocks.shape[:-1], 17), np.uint8)
    out[..., 0] = scales
    first, second = blocks[..., :8], blocks[..., 8:]
    out[..., 1::2] = first & 15 | second << 4
    out[..., 2::2] = first >> 4 | second & 0xF0
    return out.reshape(*out.shape[:-2], -1)


def tensors(config, weights):
    """Yields name, shape as stored, its type in GGUF, and a function that makes the values."""

    def bf16(name, source, rows=slice(None)):
        values = weights[source][1][rows]
        return name, (*values.shape[:-1], values.shape[-1] * 2), gguf.GGMLQuantizationType.BF16, lambda: np.ascontiguousarray(values).view(np.uint8)

    def f32(name, source, rows=slice(None)):
        dtype, values = weights[source]
        values = values[rows]

        def widen():
            return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else np.ascontiguousarray(values)

        return name, values.shape, gguf.GGMLQuantizationType.F32, widen

    def experts(name, source, rows):
        blocks, scales = weights[source + ".blocks"][1][:, rows], weights[source + ".scales"][1][:, rows]
        shape = (*blocks.shape[:2], blocks.shape[2] * 17)
        return name, shape, gguf.GGMLQuantizationType.MXFP4, lambda: mxfp4(blocks, scales)

    yield bf16("token_embd.weight", "embedding.weight")
    yield bf16("output.weight", "unembedding.weight")
    yield f32("output_norm.weight", "norm.scale")
    query, kv = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    parts = {"q": slice(0, query), "k": slice(query, query + kv), "v": slice(query + kv, query + 2 * kv)}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"block.{layer}.", f"blk.{layer}."
        yield f32(theirs + "attn_norm.weight", ours + "attn.norm.scale")
        yield f32(theirs + "post_attention_norm.weight", ours + "mlp.norm.scale")
        yield f32(theirs + "attn_sinks.weight", ours + "attn.sinks")
        for part, rows in parts.items():
            yield bf16(f"{theirs}attn_{part}.weight", ours + "attn.qkv.weight", rows)
            yield f32(f"{theirs}attn_{part}.bias", ours + "attn.qkv.bias", rows)
        yield bf16(theirs + "attn_output.weight", ours + "attn.out.weight")
        yield f32(theirs + "attn_output.bias", ours + "attn.out.bias")
        yield f32(theirs + "ffn_gate_inp.weight", ours + "mlp.gate.weight")
        yield f32(theirs + "ffn_gate_inp.bias", ours + "mlp.gate.bias")
        for first, name in enumerate(("gate", "up")):
            rows = slice(first, None, 2)
            yield experts(f"{theirs}ffn_{name}_exps.weight", ours + "mlp.mlp1_weight", rows)
            yield f32(f"{theirs}ffn_{name}_exps.bias", ours + "mlp.mlp1_bias", (slice(None), rows))
        yield experts(theirs + "ffn_down_exps.weight", ours + "mlp.mlp2_weight", slice(None))
        yield f32(theirs + "ffn_down_exps.bias", ours + "mlp.mlp2_bias")


def describe(writer, config):
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


def main(source, target):
    config = json.loads((Path(source) / "config.json").read_text())
    weights = open_weights(source)
    writer = gguf.GGUFWriter(target, "gpt-oss")
    describe(writer, config)
    listed = list(tensors(config, weights))
    for name, shape, kind, _ in listed:
        plain = kind == gguf.GGMLQuantizationType.F32
        dtype = np.dtype(np.float32 if plain else np.uint8)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, _, values in listed:
        writer.write_tensor_data(values())
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
