"""Loads checkpoints with the real loader of their layout and compares logits.

    python tools/oracles/layouts.py [--length N] PATH...

Every path holds the same model, in any layout: a directory in OpenAI's or
Hugging Face's, a .msgpack or a .eqx file (or a directory with one). Each is
loaded by what its users load it with:

openai       gpt_oss.torch.model.Transformer.from_checkpoint
huggingface  transformers' GptOssForCausalLM.from_pretrained
flax         flax.serialization.msgpack_restore, into jax2onnx's Flax model
equinox      equinox.tree_deserialise_leaves, into jax2onnx's Equinox model

and run in float32 on the same tokens, jax2onnx's models with their window
corrected. The first path is what the others are compared with. For Flax it is
also said whether flax.serialization.to_bytes gives the file's bytes again.
Prints JSON; the exit status is 1 if a difference exceeds --tolerance.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import equinox as eqx  # noqa: E402
import flax.serialization  # noqa: E402
import gpt_oss.torch.model as openai_model  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from jax2onnx.plugins.examples.eqx import gpt_oss as eqx_model  # noqa: E402
from jax2onnx.plugins.examples.nnx import gpt_oss_flax as nnx_model  # noqa: E402
from transformers import GptOssForCausalLM, Mxfp4Config  # noqa: E402


def tokens_of(vocabulary, length):
    """Ids that are spread over the vocabulary, the same on every run."""
    return [(i * 2654435761 + 12345) % vocabulary for i in range(length)]


def openai(path, length):
    model = openai_model.Transformer.from_checkpoint(str(path), device="cpu").float().eval()
    vocabulary = model.embedding.weight.shape[0]
    with torch.inference_mode():
        return model(torch.tensor(tokens_of(vocabulary, length))).numpy(), {}


def huggingface(path, length):
    config = json.loads((path / "config.json").read_text())
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    if "quantization_config" in config:
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    model, info = GptOssForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([tokens_of(config["vocab_size"], length)]), use_cache=False).logits[0]
    problems = {k: sorted(map(str, v)) for k, v in info.items() if k in ("missing_keys", "unexpected_keys", "mismatched_keys") and v}
    return logits.float().numpy(), problems


def flax_bundle(path, length):
    data = path.read_bytes()
    bundle = flax.serialization.msgpack_restore(data)
    again = flax.serialization.to_bytes(bundle)
    config = next(p for p in (path.with_suffix(".config.json"), Path(str(path) + ".config.json")) if p.exists())
    config = nnx_model.GPTOSSConfig(**json.loads(config.read_text()))
    cos, sin = nnx_model._rotary_tables_for_config(config, min_length=length)
    window = config.sliding_window
    model = nnx_model.Transformer(
        config=config, cos_table=cos, sin_table=sin, sequence_length=length,
        # Their mask for w shows w + 1 keys.
        mask_sliding=nnx_model._causal_mask(length, length, sliding_window=window - 1 if window > 1 else window),
        mask_causal=nnx_model._causal_mask(length, length), rng=0)
    params = bundle.get("params", bundle)

    def put(variable, value):
        value = jnp.asarray(value, jnp.float32)
        if variable.value.shape != value.shape:
            raise SystemExit(f"{path}: {value.shape} where jax2onnx has {variable.value.shape}")
        variable.value = value

    put(model.token_embedding.embedding, params["embedding"]["embedding"])
    put(model.norm.scale, params["norm"]["scale"])
    put(model.unembedding_kernel, params["unembedding"]["kernel"])
    for n in range(config.num_hidden_layers):
        block, attn, mlp = model.blocks[f"block_{n}"], params[f"block_{n}"]["attn"], params[f"block_{n}"]["mlp"]
        put(block.norm1.scale, attn["norm"]["scale"])
        put(block.norm2.scale, mlp["norm"]["scale"])
        put(block.attention.sinks, attn["sinks"])
        for name in ("qkv", "out"):
            put(getattr(block.attention, name + "_kernel"), attn[name]["kernel"])
            put(getattr(block.attention, name + "_bias"), attn[name]["bias"])
        put(block.mlp.gate_kernel, mlp["gate"]["kernel"])
        put(block.mlp.gate_bias, mlp["gate"]["bias"])
        for name in ("mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias"):
            put(getattr(block.mlp, name), mlp[name])
    logits = model(jnp.asarray(tokens_of(config.vocab_size, length), jnp.int32))
    return np.asarray(logits, np.float32), {"same_bytes_from_flax": again == data}


def equinox_file(path, length):
    meta = json.loads(Path(str(path) + ".meta.json").read_text())
    config = eqx_model.GPTOSSConfig(**meta["config"])
    dtype = jnp.dtype(meta["param_dtype"])
    template = eqx_model.Transformer(config=config, key=jax.random.PRNGKey(meta["seed"]), param_dtype=dtype)
    extra = {}
    try:
        model = eqx.tree_deserialise_leaves(path, template)
    except RuntimeError as error:
        # jax2onnx 0.17.1's own bfloat16 files fail too: in the model that it makes
        # to read them the experts' weights are float32.
        extra["jax2onnx_template"] = str(error).splitlines()[0]
        template = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) and x.ndim == 3 else x, template)
        model = eqx.tree_deserialise_leaves(path, template)
    if dtype != jnp.float32:  # run it in float32 like the others
        wide = eqx_model.Transformer(config=config, key=jax.random.PRNGKey(0), param_dtype=jnp.float32)
        leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
        model = eqx.combine(jax.tree.unflatten(jax.tree.structure(eqx.filter(wide, eqx.is_array)), leaves), wide)
    sdpa = eqx_model._sdpa_torch_style
    eqx_model._sdpa_torch_style = lambda *a, sliding_window, **k: sdpa(*a, sliding_window=max(sliding_window - 1, 0), **k)
    try:
        logits = model(jnp.asarray(tokens_of(config.vocab_size, length), jnp.int32))
    finally:
        eqx_model._sdpa_torch_style = sdpa
    return np.asarray(logits, np.float32), extra


def find(path):
    path = Path(path)
    if path.is_dir():
        files = [*path.glob("*.msgpack"), *path.glob("*.eqx")]
        if files:
            path = files[0]
    if path.suffix == ".msgpack":
        return path, "flax", flax_bundle
    if path.suffix == ".eqx":
        return path, "equinox", equinox_file
    config = json.loads((path / "config.json").read_text())
    return (path, "openai", openai) if "rope_scaling_factor" in config else (path, "huggingface", huggingface)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--length", type=int, default=40, help="tokens to run (40)")
    # Two float32 implementations of the small fixtures agree to about 1e-5, and
    # a weight in the wrong place moves logits by 0.1 and more.
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    first, report = None, []
    for given in arguments.paths:
        path, layout, load = find(given)
        logits, extra = load(path, arguments.length)
        first = logits if first is None else first
        difference = float(np.abs(logits - first).max()) if logits.shape == first.shape and np.isfinite(logits).all() else float("inf")
        report.append({"path": given, "layout": layout, "max_difference": difference, "rms": float(np.sqrt(np.mean(logits**2))), **extra})
    json.dump(report, sys.stdout, indent=2)
    print()
    sys.exit(any(not r["max_difference"] <= arguments.tolerance for r in report))


if __name__ == "__main__":
    main()
