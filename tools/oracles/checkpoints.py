"""Reads a gpt-oss checkpoint directory, OpenAI's layout or Hugging Face's.

Whatever the layout, names and shapes are OpenAI's afterwards, so that every
oracle can be loaded from either. Nothing here computes: tensors are renamed,
concatenated and transposed, and MXFP4 is decoded by OpenAI's own loader.
"""

import json
import tempfile
from pathlib import Path

import torch
from gpt_oss.torch.weights import Checkpoint as OpenAICheckpoint
from safetensors import safe_open
from safetensors.torch import save_file

# OpenAI's config.json: key -> Hugging Face's key.
HUGGINGFACE_KEYS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
}
# Inside rope_parameters (transformers 5) or rope_scaling (before).
HUGGINGFACE_ROPE_KEYS = {
    "initial_context_length": "original_max_position_embeddings",
    "rope_scaling_factor": "factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
}

FLOATS = ("swiglu_limit", "rope_theta", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")

# OpenAI's tensor -> Hugging Face's, within a layer. Where there are several,
# they are stacked along the first axis.
LAYER_NAMES = {
    "attn.norm.scale": ["input_layernorm.weight"],
    "attn.qkv.weight": [f"self_attn.{p}_proj.weight" for p in "qkv"],
    "attn.qkv.bias": [f"self_attn.{p}_proj.bias" for p in "qkv"],
    "attn.sinks": ["self_attn.sinks"],
    "attn.out.weight": ["self_attn.o_proj.weight"],
    "attn.out.bias": ["self_attn.o_proj.bias"],
    "mlp.norm.scale": ["post_attention_layernorm.weight"],
    "mlp.gate.weight": ["mlp.router.weight"],
    "mlp.gate.bias": ["mlp.router.bias"],
    "mlp.mlp1_bias": ["mlp.experts.gate_up_proj_bias"],
    "mlp.mlp2_bias": ["mlp.experts.down_proj_bias"],
}
EXPERT_NAMES = {"mlp.mlp1_weight": "mlp.experts.gate_up_proj", "mlp.mlp2_weight": "mlp.experts.down_proj"}
MODEL_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}


class Checkpoint:
    """config: OpenAI's keys. get(name): a tensor under OpenAI's name, experts decoded."""

    def __init__(self, path, max_layers=None):
        self.path = Path(path)
        with open(self.path / "config.json") as file:
            config = json.load(file)
        self.is_openai = "num_experts" in config
        self.reader = OpenAICheckpoint(str(self.path), torch.device("cpu"))
        self.config = config if self.is_openai else self._convert_config(config)
        for key in FLOATS:  # transformers refuses 7 where it wants 7.0
            self.config[key] = float(self.config[key])
        self.whole = max_layers is None or max_layers >= self.layers
        if not self.whole:
            self.config["num_hidden_layers"] = max_layers

    def _convert_config(self, config):
        rope = config.get("rope_parameters") or config["rope_scaling"]
        if config.get("rms_norm_eps", 1e-5) != 1e-5 or config.get("swiglu_alpha", 1.702) != 1.702:
            raise SystemExit(f"{self.path}/config.json: OpenAI's model has norm eps 1e-5 and SwiGLU alpha 1.702 in code")
        if rope.get("rope_type", "yarn") != "yarn" or rope.get("truncate", True):
            raise SystemExit(f"{self.path}/config.json: gpt-oss has YaRN with truncate false")
        converted = {ours: config[theirs] for ours, theirs in HUGGINGFACE_KEYS.items()}
        converted |= {ours: rope[theirs] for ours, theirs in HUGGINGFACE_ROPE_KEYS.items()}
        converted["rope_theta"] = rope.get("rope_theta", config.get("rope_theta"))
        return converted

    @property
    def layers(self):
        return self.config["num_hidden_layers"]

    def has(self, name):
        return name in self.reader.tensor_name_to_file

    def raw(self, name):
        """A stored tensor under its own name, as it is."""
        with safe_open(self.reader.tensor_name_to_file[name], framework="pt") as file:
            return file.get_tensor(name)

    def get(self, name):
        layer, inner = _split(name)
        if self.is_openai:
            if inner in EXPERT_NAMES:
                return self.reader._get_mxfp4_tensor(name + ".blocks", name + ".scales")
            return self.raw(name)
        if layer is None:
            return self.raw(MODEL_NAMES[name])
        prefix = f"model.layers.{layer}."
        if inner in EXPERT_NAMES:
            theirs = prefix + EXPERT_NAMES[inner]
            if self.has(theirs + "_blocks"):
                return self.reader._get_mxfp4_tensor(theirs + "_blocks", theirs + "_scales")
            return self.raw(theirs).transpose(1, 2).contiguous()
        return torch.cat([self.raw(prefix + theirs) for theirs in LAYER_NAMES[inner]])

    def names(self):
        """All tensors under OpenAI's names, one per expert matrix."""
        yield "embedding.weight"
        for layer in range(self.layers):
            for inner in [*LAYER_NAMES, *EXPERT_NAMES]:
                yield f"block.{layer}.{inner}"
        yield "norm.scale"
        yield "unembedding.weight"

    def write_huggingface(self, directory, packed=False, shards=1):
        """Writes the checkpoint in Hugging Face's layout, MXFP4 (packed) or dense bfloat16."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        out = {}
        for name in self.names():
            layer, inner = _split(name)
            if layer is None:
                out[MODEL_NAMES[name]] = self.get(name)
                continue
            prefix = f"model.layers.{layer}."
            if inner in EXPERT_NAMES:
                theirs = prefix + EXPERT_NAMES[inner]
                if packed:
                    out[theirs + "_blocks"] = self.raw(name + ".blocks")
                    out[theirs + "_scales"] = self.raw(name + ".scales")
                else:
                    out[theirs] = self.get(name).transpose(1, 2)
                continue
            value, parts = self.get(name), LAYER_NAMES[inner]
            if len(parts) == 3:
                query, kv = (self.config[k] * self.config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
                values = value.split([query, kv, kv])
            else:
                values = [value]
            for theirs, part in zip(parts, values, strict=True):
                out[prefix + theirs] = part
        out = {name: tensor.contiguous() for name, tensor in out.items()}
        (directory / "config.json").write_text(json.dumps(self.huggingface_config(packed), indent=2) + "\n")
        _save_shards(out, directory, shards)

    def huggingface_config(self, packed):
        c = self.config
        config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
        config |= {theirs: c[ours] for ours, theirs in HUGGINGFACE_KEYS.items()}
        config |= {
            "attention_bias": True,
            "hidden_act": "silu",
            "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(self.layers)],
            "max_position_embeddings": int(c["initial_context_length"] * c["rope_scaling_factor"]),
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"rope_type": "yarn", "truncate": False}
            | {theirs: c[ours] for ours, theirs in HUGGINGFACE_ROPE_KEYS.items()},
            "rope_theta": c["rope_theta"],
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            # The defaults are ids of the real vocabulary, which small models lack.
            "pad_token_id": None,
            "eos_token_id": None,
            "bos_token_id": None,
        }
        if packed:
            config["quantization_config"] = {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            }
        return config


def _split(name):
    """block.3.attn.sinks -> (3, "attn.sinks"); others -> (None, name)."""
    if not name.startswith("block."):
        return None, name
    _, layer, inner = name.split(".", 2)
    return int(layer), inner


def _save_shards(tensors, directory, shards):
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(t.nbytes for t in tensors.values())
    groups, used = [{} for _ in range(shards)], 0
    for name, tensor in tensors.items():
        groups[min(shards - 1, used * shards // total)][name] = tensor
        used += tensor.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for number, group in enumerate(groups):
        # Counted from 00000, as in OpenAI's own release.
        file = f"model-{number:05d}-of-{shards - 1:05d}.safetensors"
        save_file(group, directory / file, metadata={"format": "pt"})
        index["weight_map"] |= {name: file for name in group}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def temporary_huggingface(checkpoint):
    """A temporary directory with the dense Hugging Face twin; delete with .cleanup()."""
    directory = tempfile.TemporaryDirectory(prefix="gptoss-oracle-")
    checkpoint.write_huggingface(directory.name)
    return directory
