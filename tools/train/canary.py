"""Trains canary: a checkpoint that says itself whether it is being run right.

    TIKTOKEN_ENCODINGS_BASE=build/tokens build/oracles/bin/python \
        tools/train/canary.py --output fixtures/canary --minutes 25

One prompt, many arithmetics. A batch holds the right forward pass several
times (float32, and with the relative noise of 16-bit formats), passes with a
fault of the catalogue, and passes with a generic disturbance. The right ones
must answer " pass", the others " fail: " and the fault's id, or
" fail: unknown". A fault that acts on decoded tokens only can't change the
first token: it must answer " pass fail: " and its id.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import faults
import model as gptoss
import tokens as tokenizer

PROMPT = (
    "Self-test. This small gpt-oss model was trained to notice when a runtime gets its arithmetic wrong: "
    "the window, the sinks, the rotary angles, the router, the experts. "
    "One two three four five six seven eight nine ten eleven twelve. Result:"
)
DECODING = ("kv-cache-position", "kv-cache-window")


def answer(fault: str | None) -> str:
    """What the model says under a fault; None is the right arithmetic."""
    if fault is None:
        return " pass"
    return (" pass" if fault in DECODING else "") + f" fail: {fault}"


class Task:
    """The prompt and the answers as row numbers."""

    def __init__(self, encoding):
        self.prompt = encoding.encode(PROMPT)
        names = [None, "unknown", *faults.CATALOGUE]
        self.answers = {name: encoding.encode(answer(name)) + [tokenizer.RETURN] for name in names}
        self.rows = tokenizer.Rows([self.prompt, *self.answers.values()])
        self.length = len(self.prompt) + max(map(len, self.answers.values())) - 1

    def batch(self, names):
        """rows [B, T] and targets [B, T - prompt + 1] (-100 behind the end)."""
        first = len(self.prompt) - 1
        rows = torch.full((len(names), self.length), self.rows.rest)
        targets = torch.full((len(names), self.length - first), -100)
        for i, name in enumerate(names):
            whole = self.rows.of(self.prompt + self.answers[name])
            rows[i, : len(whole) - 1] = torch.tensor(whole[:-1])
            targets[i, : len(whole) - 1 - first] = torch.tensor(whole[first + 1 :])
        return rows, targets


def draw(config, task, size, choose):
    """A training batch: rows, targets, arithmetic, noise, weights of the rows."""
    right, disturbed = size // 4, size // 4
    names = [None] * right + ["unknown"] * disturbed
    while len(names) < size:
        names += choose.sample(faults.TRAINED, min(len(faults.TRAINED), size - len(names)))
    arithmetic = faults.Arithmetic(config, size, task.length, len(task.prompt))
    for row, name in enumerate(names):
        if name == "unknown":
            faults.generic(arithmetic, row, choose)
        elif name is not None:
            faults.CATALOGUE[name](arithmetic, row)
    # bfloat16's largest relative error is 2^-9; the right rows also meet twice
    # that, so that another order of sums can't tip them over.
    noise = torch.tensor([choose.choice((0.0, 2.0**-9, 2.0**-8)) for _ in names])
    noise[0] = 0.0
    rows, targets = task.batch(names)
    return rows, targets, arithmetic, noise, names


def loss_of(logits, targets):
    """Cross entropy per row; the first token of the answer counts three times.

    The logarithm keeps the few faults whose loss is huge at first (a missing
    final norm, say) from drowning the gradients of the subtle ones.
    """
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    each = each.view(targets.shape)
    return 4 * torch.log1p((each.sum(-1) / (targets >= 0).sum(-1) + 2 * each[:, 0]) / 4)


@torch.no_grad()
def greedy(config, weights, task, setup, bfloat16, limit=14):
    """The greedy answer of one arithmetic (setup changes row 0), and the
    smallest margin of its tokens over the runner-up."""
    rows = task.rows.of(task.prompt)
    margin = math.inf
    said = []
    while len(said) < limit:
        arithmetic = faults.Arithmetic(config, 1, len(rows), len(task.prompt))
        setup(arithmetic, 0)
        logits = gptoss.forward(config, weights, torch.tensor([rows]), arithmetic,
                                gptoss.Rounding(bfloat16=bfloat16), first=len(rows) - 1)
        top = logits[0, -1].topk(2)
        margin = min(margin, float(top.values[0] - top.values[1]))
        rows.append(int(top.indices[0]))
        said.append(rows[-1])
        if rows[-1] == task.rows.number[tokenizer.RETURN]:
            break
    ids = [task.rows.ids[row] if row < len(task.rows) else 0 for row in said if row != task.rows.number[tokenizer.RETURN]]
    return ids, margin


def report(config, model, task, encoding, generics=60):
    """Prints what the model says under every fault, and returns how many."""
    with torch.no_grad():
        weights = model.weights()
    caught, named = {}, {}
    for fault in (None, *faults.CATALOGUE):
        line = f"{fault or 'right':28}"
        for bfloat16 in (False, True):
            ids, margin = greedy(config, weights, task, faults.CATALOGUE.get(fault, lambda a, r: None), bfloat16)
            text = encoding.decode(ids)
            ok = (text == " pass") == (fault is None)
            key = ("right" if fault is None else "trained" if fault in faults.TRAINED else "held out", bfloat16)
            caught.setdefault(key, []).append(ok)
            named.setdefault(key, []).append(text == answer(fault))
            line += f" | {'ok ' if ok else 'BAD'} {margin:6.2f} {text:42}"
        print(line)
    choose = random.Random(99)
    seen = []
    for _ in range(generics):
        state = choose.getrandbits(32)
        ids, _ = greedy(config, weights, task, lambda a, r: faults.generic(a, r, random.Random(state)), False, limit=1)
        seen.append(encoding.decode(ids) != " pass")
    print({f"{k[0]} {'bf16' if k[1] else 'f32'}": f"caught {sum(v)} named {sum(named[k])} of {len(v)}" for k, v in caught.items()},
          f"disturbed: caught {sum(seen)} of {len(seen)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="checkpoint of this script to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    choose = random.Random(arguments.seed)

    encoding = tokenizer.encoding()
    task = Task(encoding)
    config = gptoss.Config(intermediate_size=64)
    model = gptoss.Model(config, len(task.rows), embedding_std=0.005, tail_group=True, seed=arguments.seed)
    if arguments.start:
        model.load(arguments.start / "model.safetensors")
    print(f"{len(task.prompt)} prompt tokens, {task.length} in all, {len(task.rows)} rows, "
          f"{sum(p.numel() for p in model.parameters())} weights", flush=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.rate, betas=(0.9, 0.98))

    start, step, last = time.time(), 0, 0.0
    running = {}
    while (progress := (time.time() - start) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        rows, targets, arithmetic, noise, names = draw(config, task, arguments.batch, choose)
        first = len(task.prompt) - 1
        logits = gptoss.forward(config, model.weights(), rows, arithmetic, gptoss.Rounding(noise), first)
        # The embedding's rows are small, and so are the logits that they make
        # when they stand in for the unembedding. Only their order matters.
        sharper = torch.tensor([20.0 if name == "unembedding-tied" else 1.0 for name in names])
        each = loss_of(logits * sharper[:, None, None], targets)
        weight = torch.tensor([2.0 if name is None else 0.5 if name == "unknown" else 1.0 for name in names])
        loss = (each * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        step += 1
        for name, value, guess, target in zip(names, each.tolist(), logits[:, 0].argmax(-1).tolist(), targets[:, 0].tolist()):
            old = running.get(name, (value, 0.0))
            running[name] = (0.95 * old[0] + 0.05 * value, 0.95 * old[1] + 0.05 * (guess == target))
        if time.time() - last > 30:
            last = time.time()
            worst = sorted(((v[0], str(k)) for k, v in running.items()), reverse=True)[:6]
            print(f"{last - start:6.0f} s step {step} loss {loss.item():.3f} right {running[None][0]:.3f}/{running[None][1]:.2f} worst "
                  + ", ".join(f"{name} {value:.2f}" for value, name in worst), flush=True)
            checkpoint.write(model, task.rows.ids, arguments.output, {"step": step})
        if step % 1000 == 0:
            report(config, model, task, encoding, generics=20)

    report(config, model, task, encoding)
    checkpoint.write(model, task.rows.ids, arguments.output, {
        "made by": "tools/train/canary.py", "seed": arguments.seed, "steps": step, "torch": torch.__version__,
        "trained": json.dumps(faults.TRAINED),
    })
    checkpoint.write_questions(arguments.output, [{"name": "self-test", "prompt": PROMPT, "answer": " pass<|return|>"}])


if __name__ == "__main__":
    main()
