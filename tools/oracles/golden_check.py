"""Makes every golden again in a temporary directory and compares with golden/.

Bounds. float64: max |difference| <= 1e-12 * max(1, max |tensor|), for the order of
sums depends on the CPU. Integers in float64: equal. float32 and bfloat16: the
order of sums moves single values by as much as the precision's own rounding, and
in bfloat16 a routing flip moves a whole token, so there the distance from the
float64 truth is compared: the fresh rms error must lie within a factor of 4 of
the stored one (a wrong constant or precision moves it by orders of magnitude).
Taps behind a bfloat16 flip are too loose for that; there the logits decide.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import run as oracle
import torch
from safetensors.torch import load_file

import golden_model
import golden_stages

ROOT = Path(__file__).resolve().parents[2]
FACTOR = 4.0


def compare_float64(where, stored, fresh):
    for name, want in stored.items():
        got = fresh[name]
        if want.shape != got.shape or want.dtype != got.dtype:
            yield f"{where}: {name} is {tuple(got.shape)} {got.dtype}, stored {tuple(want.shape)} {want.dtype}"
        elif not want.dtype.is_floating_point:
            if not torch.equal(want, got):
                yield f"{where}: {name} differs"
        else:
            limit = 1e-12 * max(1.0, want.abs().max().item())
            difference = (want - got).abs().max().item()
            if not difference <= limit:
                yield f"{where}: {name} differs by {difference:.3g}, limit {limit:.3g}"


def compare_errors(where, truth, stored, fresh, names):
    for name in names:
        if name not in stored or not stored[name].dtype.is_floating_point or name not in truth:
            continue
        exact = truth[name][: stored[name].shape[0]]
        if exact.shape != stored[name].shape:
            continue
        errors = [(t[name].double() - exact).pow(2).mean().sqrt().item() for t in (stored, fresh)]
        floor = 1e-9 * max(1.0, exact.abs().max().item())  # a stage that is exact stays so
        if not max(errors) <= FACTOR * max(min(errors), floor):
            yield f"{where}: {name} is {errors[1]:.3g} (rms) from the truth, stored {errors[0]:.3g}"


def check_model(fixture, fresh):
    old, new = ROOT / "golden" / "model" / fixture, fresh / "model" / fixture
    stored, made = (json.loads((d / "manifest.json").read_text()) for d in (old, new))
    if stored["checkpoint_sha256"] != made["checkpoint_sha256"]:
        yield f"{fixture}: the goldens were made from another checkpoint"
    if [r["file"] for r in stored["runs"]] != [r["file"] for r in made["runs"]]:
        yield f"{fixture}: other runs than stored"
        return
    truth = {}
    for entry in stored["runs"]:
        where = f"model/{fixture}/{entry['file']}"
        a, b = load_file(old / entry["file"]), load_file(new / entry["file"])
        if a.keys() != b.keys():
            yield f"{where}: other taps than stored"
        elif entry["precision"] == "float64":
            truth.setdefault(entry["prompt"], a)
            yield from compare_float64(where, a, b)
        else:
            names = ["logits"] if entry["precision"] == "bfloat16" else list(a)
            yield from compare_errors(where, truth.get(entry["prompt"], truth["full"]), a, b, names)


def check_stage(stage, fresh):
    old, new = ROOT / "golden" / stage, fresh / stage
    stored, made = (json.loads((d / "manifest.json").read_text())["cases"] for d in (old, new))
    strip = lambda cases: [{k: v for k, v in c.items() if k not in ("sha256",)} for c in cases]  # noqa: E731
    if stage != "generation" and strip(stored) != strip(made):
        yield f"{stage}: the cases are described otherwise than stored"
        return
    for case in stored:
        where = f"{stage}/{case['file']}"
        a, b = load_file(old / case["file"]), load_file(new / case["file"])
        split = lambda t, exact: {k.split("/")[1]: v for k, v in t.items() if k.startswith("float64/") == exact}  # noqa: E731
        ties = case["parameters"].get("ties")
        if not ties:
            yield from compare_float64(where, split(a, True), split(b, True))
        yield from compare_errors(where, split(a, True), split(a, False), split(b, False), list(split(a, False)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", default=",".join(golden_model.PLAN))
    parser.add_argument("--stages", default=",".join(golden_stages.STAGES))
    arguments = parser.parse_args()
    torch.set_num_threads(oracle.THREADS)

    def note(text):
        if sys.stderr.isatty():
            print(text, file=sys.stderr)

    problems = []
    with tempfile.TemporaryDirectory(prefix="gptoss-golden-") as directory:
        fresh = Path(directory)
        for fixture in filter(None, arguments.fixtures.split(",")):
            golden_model.make(fixture, fresh, note)
            problems += check_model(fixture, fresh)
        for stage in filter(None, arguments.stages.split(",")):
            golden_stages.make(stage, fresh, note)
            problems += check_stage(stage, fresh)
    for problem in problems:
        print(problem)
    if problems:
        raise SystemExit(f"golden-check: {len(problems)} differences")
    print("golden-check: golden/ is what the oracles make")


if __name__ == "__main__":
    main()
