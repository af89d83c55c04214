"""How far an implementation's taps are from the float64 truth.

The free-running budgets are calibrated from these figures: they cover every row
of every tap, of which the golden files store only some.
"""

import json

import torch

QUANTILES = (0.5, 0.9, 0.99)
SLOTS = ("mlp_expert_weights", "mlp_prelinear_outputs", "mlp_activated_outputs", "mlp_expert_outputs")


def measure(truth, subject):
    """Per tap: max and rms of the error over all elements, quantiles over tokens of
    the error's rms within a token; scale is the rms of the truth. Slots are
    aligned by expert; slots whose expert the truth did not choose are left out.
    For the expert indices: flips, the tokens whose set of experts differs."""
    out = {}
    for tap, exact in truth.items():
        if tap not in subject:
            continue
        layer, _, inner = tap.partition(".")
        if inner == "mlp_expert_indices":
            same = (exact.sort(-1).values == subject[tap].sort(-1).values).all(-1)
            out[tap] = {"flips": int((~same).sum()), "tokens": len(same)}
            continue
        value = subject[tap].double()
        if inner in SLOTS:
            exact, value = _align(exact, value, truth[f"{layer}.mlp_expert_indices"], subject[f"{layer}.mlp_expert_indices"])
        error = (value - exact).flatten(1)
        per_token = error.pow(2).mean(1).sqrt()
        out[tap] = {
            "max": error.abs().max().item(),
            "rms": error.pow(2).mean().sqrt().item(),
            "quantiles": dict(zip(map(str, QUANTILES), torch.quantile(per_token, torch.tensor(QUANTILES, dtype=torch.float64)).tolist())),
            "scale": exact.pow(2).mean().sqrt().item(),
        }
    return out


def _align(exact, value, exact_indices, indices):
    """Pairs slots of the same token and expert; returns [pairs, ...] each."""
    token, mine, theirs = torch.where(exact_indices[:, :, None] == indices[:, None, :])
    return exact[token, mine].reshape(len(token), -1), value[token, theirs].reshape(len(token), -1)


def dump(fixture, runs):
    """One tap per line, six digits: these are statistics, not tensors."""
    short = lambda value: json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))  # noqa: E731
    blocks = []
    for entry in runs:
        head = json.dumps({k: v for k, v in entry.items() if k != "taps"})[:-1]
        taps = ",\n".join(f"  {json.dumps(tap)}: {json.dumps(short(figures))}" for tap, figures in entry["taps"].items())
        blocks.append(f'{head}, "taps": {{\n{taps}\n}}}}')
    return f'{{"fixture": "{fixture}", "prompt": "full", "against": "torch float64", "runs": [\n' + ",\n".join(blocks) + "\n]}\n"
