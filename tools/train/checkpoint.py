"""Writes a trained model in OpenAI's layout, with the used vocabulary rows only.

config.json is OpenAI's. model.safetensors has every tensor of OpenAI's layout
but embedding.weight and unembedding.weight. In their place stand
vocabulary.ids (I32, ascending), and NAME.rows with one row per id and a last
one for every other id. fixtures.Expand makes the usual checkpoint of it.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

import mxfp4


def tensors(model, ids) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        weights = model.weights()
    result = {"vocabulary.ids": torch.tensor(ids, dtype=torch.int32)}
    for name, value in weights.items():
        if name.endswith(("mlp1_weight", "mlp2_weight")):
            blocks, scales = mxfp4.pack(*mxfp4.encode(value))
            result[name + ".blocks"], result[name + ".scales"] = blocks, scales
        elif name in ("embedding.weight", "unembedding.weight"):
            result[name.replace(".weight", ".rows")] = value.to(torch.bfloat16)
        else:
            result[name] = value.to(torch.bfloat16)
    return {name: value.contiguous() for name, value in result.items()}


def write(model, ids, directory: Path, metadata: dict[str, str]) -> None:
    """Writes config.json and model.safetensors; each appears whole or not."""
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / "model.safetensors.part"
    save_file(tensors(model, ids), part, metadata={key: str(value) for key, value in metadata.items()})
    os.chmod(part, 0o644)
    os.replace(part, directory / "model.safetensors")
    part = directory / "config.json.part"
    part.write_text(json.dumps(model.config.json(), indent=2) + "\n")
    os.replace(part, directory / "config.json")


def write_questions(directory: Path, questions: list[dict]) -> None:
    """Writes questions.json, one question per line."""
    lines = ",\n  ".join(json.dumps(question, ensure_ascii=False) for question in questions)
    part = directory / "questions.json.part"
    part.write_text(f"[\n  {lines}\n]\n")
    os.replace(part, directory / "questions.json")
