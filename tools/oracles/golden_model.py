"""Makes golden/model/FIXTURE: whole runs of the real implementations.

  python tools/oracles/golden_model.py [--fixtures toy,edge] [--output golden]

What is stored where is in PLAN. The float64 truth is checked on the way: a
shorter prompt must give the first rows of the longer one.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import run as oracle  # sets the threads before torch is loaded
import torch

import spread

ROOT = Path(__file__).resolve().parents[2]

# An entry: implementation, precision, corrected, prompt, taps, rows. Taps None is
# a run that only counts for the spread and is not stored. Rows None is every
# token's; otherwise taps keep only those rows, except the logits.
EVERYTHING = [
    ("torch", "float64", False, "full", "all", None),
    ("torch", "float64", False, "other", "none", None),
    ("torch", "float32", False, "full", "all", None),
    ("torch", "bfloat16", False, "full", "all", None),
    ("transformers", "float32", False, "full", "all", None),
    ("transformers", "bfloat16", False, "full", "all", None),
    ("flax", "float32", True, "full", "all", None),
    ("equinox", "float32", True, "full", "all", None),
    ("equinox", "bfloat16", True, "full", "all", None),
    # As they ship, a key too many in their windows: wrong, and known to be.
    ("flax", "float32", False, "full", "all", None),
    ("equinox", "float32", False, "full", "none", None),
]


def sampled(rows):
    """The truth on some rows of every tap; of the others, the logits."""
    return [
        ("torch", "float64", False, "full", "all", rows),
        ("torch", "float64", False, "other", "none", None),
        ("torch", "float32", False, "full", "none", None),
        ("torch", "bfloat16", False, "full", "none", None),
        ("transformers", "float32", False, "full", "none", None),
        ("transformers", "bfloat16", False, "full", "none", None),
        ("flax", "float32", True, "full", None, None),
        ("equinox", "float32", True, "full", None, None),
        ("equinox", "bfloat16", True, "full", None, None),
    ]


# toy128: the first rows, both sides of the window's edge (127, 128), the end.
# edge: everything until well past its window of 12, then a thin sample to the end.
# The prompt "short" is stored whole in other precisions, for the sharp test from
# taps, which needs every key and value.
PLAN = {
    "toy": EVERYTHING,
    "toy128": sampled([0, 1, 63, 126, 127, 128, 129, 130, 170, 199]),
    "edge": [
        *sampled([*range(16), 36, 100, 127, 128, 200, 256, 298, 299]),
        ("torch", "float32", False, "short", "all", None),
        ("torch", "bfloat16", False, "short", "all", None),
        ("transformers", "float32", False, "short", "all", None),
    ],
}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prompts_of(fixture):
    return {p["name"]: p["tokens"] for p in json.loads((ROOT / "fixtures" / fixture / "prompts.json").read_text())}


def check_prefixes(fixture, prompts, truth, full):
    """The model is causal, so that rows of the long run are the short runs'."""
    for name, tokens in prompts.items():
        if tokens != full[: len(tokens)] or len(tokens) == len(full):
            continue
        short = oracle.execute("torch", "float64", ROOT / "fixtures" / fixture, tokens, "all")
        for tap, value in short.items():
            long = truth[tap][: len(tokens)]
            limit = 1e-13 * max(1.0, long.abs().max().item())
            if (value - long).abs().max().item() > limit:
                raise SystemExit(f"{fixture}: {tap} of prompt {name} is not the beginning of prompt full")


def make(fixture, output, note):
    directory = output / "model" / fixture
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, prompts = ROOT / "fixtures" / fixture, prompts_of(fixture)
    truth, runs, statistics = {}, [], []
    for implementation, precision, correct, prompt, taps, rows in PLAN[fixture]:
        label = implementation + (".corrected" if correct else "")
        name = f"{label}.{precision}" + ("" if prompt == "full" else f".{prompt}") + ".safetensors"
        note(f"{fixture}: {name}")
        tokens = prompts[prompt]
        # Everything is observed, so that the spread covers every tap; less is stored.
        tensors = oracle.execute(implementation, precision, checkpoint, tokens, "all", correct)
        if precision == "float64":
            truth[prompt] = tensors
            if prompt == "full":
                check_prefixes(fixture, prompts, tensors, tokens)
        else:
            exact = truth.get(prompt) or {t: v[: len(tokens)] for t, v in truth["full"].items()}
            if prompt == "full":
                statistics.append({
                    "implementation": implementation, "corrected": correct, "precision": precision,
                    "packages": oracle.versions(implementation), "taps": spread.measure(exact, tensors),
                })
        if taps is None:
            continue
        if taps == "none":
            tensors = {"logits": tensors["logits"]}
        if rows is not None:
            tensors = {t: v if t == "logits" else v[rows] for t, v in tensors.items()}
        oracle.save(directory / name, tensors, {"format": "pt"})
        command = f"python tools/oracles/run.py --implementation {implementation} --precision {precision} --checkpoint fixtures/{fixture} --tokens fixtures/{fixture}/prompts.json --prompt {prompt} --taps {taps}"
        runs.append({
            "file": name,
            "implementation": implementation,
            "corrected": correct,
            "precision": precision,
            "prompt": prompt,
            "tokens": tokens,
            "rows": rows,
            "packages": oracle.versions(implementation),
            "command": command + (" --correct" if correct else "") + f" --output {name}",
            "logits_max_error": (tensors["logits"].double() - (truth.get(prompt) or truth["full"])["logits"][: len(tokens)]).abs().max().item(),
            "sha256": sha256(directory / name),
        })
    (directory / "spread.json").write_text(spread.dump(fixture, statistics))
    manifest = {
        "fixture": fixture,
        "checkpoint_sha256": sha256(checkpoint / "model.safetensors"),
        "spread_sha256": sha256(directory / "spread.json"),
        "runs": runs,
    }
    (directory / "manifest.json").write_text(dump(manifest))


def dump(manifest):
    """One run per paragraph, lists of numbers on one line."""
    runs = manifest.pop("runs")
    head = json.dumps(manifest, indent=2)[:-2]
    lines = []
    for entry in runs:
        fields = [f'      {json.dumps(k)}: {json.dumps(v)}' for k, v in entry.items()]
        lines.append("    {\n" + ",\n".join(fields) + "\n    }")
    return head + ',\n  "runs": [\n' + ",\n".join(lines) + "\n  ]\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", default=",".join(PLAN))
    parser.add_argument("--output", type=Path, default=ROOT / "golden")
    arguments = parser.parse_args()
    start = time.monotonic()

    def note(text):
        if sys.stderr.isatty():
            print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr)

    torch.manual_seed(0)
    for fixture in arguments.fixtures.split(","):
        # Made elsewhere and moved when complete, so that files and manifest agree.
        with tempfile.TemporaryDirectory(prefix="gptoss-golden-") as scratch:
            make(fixture, Path(scratch), note)
            target = arguments.output / "model" / fixture
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(scratch) / "model" / fixture, target)


if __name__ == "__main__":
    main()
