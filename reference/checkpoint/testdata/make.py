"""Makes the checkpoints in this folder with the real libraries: python
reference/checkpoint/testdata/make.py, in the environment that `make oracles`
sets up. All hold the same small random model, but for the gate bias of the
Equinox files, from which jax2onnx's own loader takes 1e-6 · expert index."""

import dataclasses
import json
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"

import equinox as eqx
import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.torch
import torch
from gpt_oss.torch.weights import Checkpoint
from jax2onnx.plugins.examples.eqx.gpt_oss import load_pretrained_gpt_oss

here = pathlib.Path(__file__).parent
config = {
    "num_hidden_layers": 2, "num_experts": 3, "experts_per_token": 2, "vocab_size": 11, "hidden_size": 64,
    "intermediate_size": 32, "swiglu_limit": 7.0, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "sliding_window": 3, "initial_context_length": 64, "rope_theta": 150000.0, "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1.0, "rope_ntk_beta": 8.0,
}
torch.manual_seed(1)
tensors = {}


def bf16(name, *shape):
    tensors[name] = (0.5 * torch.randn(shape)).bfloat16()


def mxfp4(name, experts, rows, cols):
    tensors[name + ".blocks"] = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
    tensors[name + ".scales"] = torch.randint(118, 126, (experts, rows, cols // 32), dtype=torch.uint8)


bf16("embedding.weight", 11, 64)
for n in range(2):
    b = f"block.{n}."
    bf16(b + "attn.norm.scale", 64), bf16(b + "attn.qkv.weight", 64, 64), bf16(b + "attn.qkv.bias", 64)
    bf16(b + "attn.sinks", 4), bf16(b + "attn.out.weight", 64, 32), bf16(b + "attn.out.bias", 64)
    bf16(b + "mlp.norm.scale", 64), bf16(b + "mlp.gate.weight", 3, 64), bf16(b + "mlp.gate.bias", 3)
    mxfp4(b + "mlp.mlp1_weight", 3, 64, 64), bf16(b + "mlp.mlp1_bias", 3, 64)
    mxfp4(b + "mlp.mlp2_weight", 3, 64, 32), bf16(b + "mlp.mlp2_bias", 3, 64)
bf16("norm.scale", 64), bf16("unembedding.weight", 11, 64)

(here / "openai").mkdir(exist_ok=True)
(here / "openai" / "config.json").write_text(json.dumps(config))
safetensors.torch.save_file(tensors, here / "openai" / "model.safetensors", metadata={"format": "pt"})
os.chmod(here / "openai" / "model.safetensors", 0o644)

reader = Checkpoint(str(here / "openai"), torch.device("cpu"))


def bundle(dtype):
    def get(name, to=dtype):
        return reader.get(name).float().numpy().astype(to)

    tree = {"embedding": {"embedding": get("embedding.weight")}}
    for n in range(2):
        b = f"block.{n}."
        tree[f"block_{n}"] = {
            "attn": {"norm": {"scale": get(b + "attn.norm.scale", np.float32)},
                     "qkv": {"kernel": get(b + "attn.qkv.weight").T.copy(), "bias": get(b + "attn.qkv.bias")},
                     "sinks": get(b + "attn.sinks"),
                     "out": {"kernel": get(b + "attn.out.weight").T.copy(), "bias": get(b + "attn.out.bias")}},
            "mlp": {"norm": {"scale": get(b + "mlp.norm.scale", np.float32)},
                    "gate": {"kernel": get(b + "mlp.gate.weight").T.copy(), "bias": get(b + "mlp.gate.bias")},
                    "mlp1_weight": get(b + "mlp.mlp1_weight"), "mlp1_bias": get(b + "mlp.mlp1_bias"),
                    "mlp2_weight": get(b + "mlp.mlp2_weight"), "mlp2_bias": get(b + "mlp.mlp2_bias")}}
    tree["norm"] = {"scale": get("norm.scale", np.float32)}
    tree["unembedding"] = {"kernel": get("unembedding.weight").T.copy()}
    return tree


(here / "flax_bfloat16.msgpack").write_bytes(flax.serialization.to_bytes(bundle(ml_dtypes.bfloat16)))
(here / "flax_bfloat16.config.json").write_text(json.dumps(config))
flax.serialization.MAX_CHUNK_SIZE = 1000  # so that this small file has chunked arrays too
(here / "flax_chunked.msgpack").write_bytes(flax.serialization.to_bytes({"params": bundle(np.float32)}))
(here / "flax_chunked.msgpack.config.json").write_text(json.dumps(config))

for name, dtype in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
    model = load_pretrained_gpt_oss(here / "openai", param_dtype=dtype)
    eqx.tree_serialise_leaves(here / f"equinox_{name}.eqx", model)
    meta = {"config": dataclasses.asdict(model.config), "param_dtype": name, "seed": 0}
    (here / f"equinox_{name}.eqx.meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True))
