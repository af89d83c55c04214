"""Trains capitals: a small gpt-oss that answers questions in words.

    TIKTOKEN_ENCODINGS_BASE=build/tokens build/oracles/bin/python \
        tools/train/capitals.py --output fixtures/capitals --minutes 25

It learns the capital of every country in countries.json, asked in plain text
and in a harmony chat, answered in words or as {"text": "..."}; to repeat two
words from beyond its window; and to say " unknown" of a country that it does
not know. Once it answers well, a part of every batch is run with a fault of
faults.py and must say " unknown" too, so that the answers hang on the sinks,
the window, the clamp and the routing.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from openai_harmony import (Conversation, DeveloperContent, Message, ReasoningEffort, Role, SystemContent)

import checkpoint
import faults
import model as gptoss
import tokens as tokenizer

COUNTRIES = json.loads((Path(__file__).parent / "countries.json").read_text())
WORDS = (
    "apple river stone violet copper winter garden music silver bridge orange window yellow paper mountain ocean "
    "doctor forest candle bottle engine planet pocket rabbit summer ticket tunnel village basket butter"
).split()
FILLER = "one two three four five six seven eight nine ten eleven twelve".split()
UNKNOWN = "unknown"
# What the fault rows of a batch use: one for each thing that must matter.
# window-* can't show in a prompt that is no longer than the window.
FAULTS = ("sinks-dropped", "sinks-not-in-max", "swiglu-no-clamp", "softmax-before-topk", "router-bias-dropped",
          "topk-not-renormalized", "rope-no-yarn", "swiglu-alpha-1")
WINDOW_FAULTS = ("window-one-too-many", "window-one-too-few", "window-ignored", "window-on-odd-layers")


CHATS_PER_ROW = 12


class Language:
    """Makes prompts and answers, as token ids."""

    def __init__(self, encoding):
        self.encoding = encoding

    def plain(self, text, answer):
        return self.encoding.encode(text), self.encoding.encode(answer) + [tokenizer.RETURN]

    def question(self, country, capital, json_reply=False):
        if json_reply:
            return self.plain(f"{country} capital? JSON:", f' {{"text": "{capital}"}}')
        return self.plain(f"{country} capital? Answer:", f" {capital}")

    def repeat(self, first, second, filler):
        counted = " ".join(FILLER[i % len(FILLER)] for i in range(filler))
        return self.plain(f"Remember: {first} {second}. Now count: {counted}. Repeat:", f" {first} {second}")

    def chat(self, country, capital, json_reply=False, effort=ReasoningEffort.MEDIUM, asked=0, developer=False):
        question = (f"{country} capital?", f"What is the capital of {country}?")[asked]
        messages = [Message.from_role_and_content(Role.SYSTEM, SystemContent.new().with_reasoning_effort(effort))]
        if json_reply and developer:
            instructions = DeveloperContent.new().with_instructions("Reply as JSON.")
            messages.append(Message.from_role_and_content(Role.DEVELOPER, instructions))
        elif json_reply:
            question += " Reply as JSON."
        messages.append(Message.from_role_and_content(Role.USER, question))
        prompt = self.encoding.render_conversation_for_completion(Conversation.from_messages(messages), Role.ASSISTANT)
        text = f'{{"text": "{capital}"}}' if json_reply else capital
        reply = self.encoding.encode(f"<|channel|>final<|message|>{text}<|return|>", allowed_special="all")
        return prompt, reply

    def common(self, effort):
        """How many tokens a chat's prompt shares with every other of the same
        effort: the system message."""
        return self.chat("France", "Paris", effort=effort)[0].index(200007) + 1


def cases(language):
    """Every prompt that the fixture promises an answer to: (name, prompt, answer)."""
    result = []
    for country, capital in COUNTRIES.items():
        result.append((f"plain {country}", *language.question(country, capital)))
        result.append((f"plain json {country}", *language.question(country, capital, True)))
        result.append((f"chat {country}", *language.chat(country, capital)))
        result.append((f"chat json {country}", *language.chat(country, capital, True)))
    choose = random.Random(5)
    for _ in range(40):
        first, second = choose.sample(WORDS, 2)
        filler = choose.randrange(14, 28)
        result.append((f"repeat {first} {second} {filler}", *language.repeat(first, second, filler)))
    return result


def questions(encoding):
    """The cases as texts, for questions.json: a chat by its user's words."""
    result = []
    for name, prompt, answer in cases(Language(encoding)):
        question = {"name": name, "prompt": encoding.decode(prompt), "answer": encoding.decode(answer)}
        if name.startswith("chat"):
            asked = question["prompt"].split("<|start|>user<|message|>")[1].split("<|end|>")[0]
            question |= {"chat": True, "prompt": asked}
        result.append(question)
    return result


class Draw:
    """Training batches: one kind of prompt each, so that lengths are alike."""

    def __init__(self, config, language, rows, choose):
        self.config, self.language, self.rows, self.choose = config, language, rows, choose
        self.known = list(COUNTRIES.items())
        self.cache = {}
        # Pairs that the cases ask for are never trained on: repeating is not
        # remembering.
        self.kept = {tuple(name.split()[1:3]) for name, _, _ in cases(language) if name.startswith("repeat")}

    def one(self, kind, effort):
        choose = self.choose
        if kind == "repeat":
            while (pair := tuple(choose.sample(WORDS, 2))) in self.kept:
                pass
            return self.language.repeat(*pair, choose.randrange(10, 30))
        country, capital = choose.choice(self.known)
        if kind == "plain":
            key = (country, capital, choose.random() < 0.4)
            make = self.language.question
        else:
            key = (country, capital, choose.random() < 0.5, effort, int(choose.random() < 0.3), choose.random() < 0.3)
            make = self.language.chat
        if key not in self.cache:
            self.cache[key] = make(*key)
        return self.cache[key]

    def batch(self, kind, size, faulty):
        """inputs, targets (-100 where none), arithmetic, and the fault of each
        row; faulty is how many rows have one."""
        choose = self.choose
        unknown = self.rows.of(self.language.encoding.encode(f" {UNKNOWN}") + [tokenizer.RETURN])
        wrong = [choose.choice(FAULTS + (WINDOW_FAULTS if kind != "plain" else ())) if row < faulty else None
                 for row in range(size)]
        packed = []
        for row in range(size):
            # Chats of one effort share the system message, and a row holds many.
            effort = choose.choice((ReasoningEffort.MEDIUM,) * 2 + (ReasoningEffort.LOW, ReasoningEffort.HIGH))
            shared = self.language.common(effort) if kind == "chat" else 0
            tokens, targets, positions, segments = [], [], [], []
            for number in range(CHATS_PER_ROW if kind == "chat" else 1):
                prompt, answer = self.one(kind, effort)
                prompt, answer = self.rows.of(prompt), self.rows.of(answer)
                if wrong[row]:
                    answer = unknown
                elif kind == "plain" and row < faulty + 2:
                    # A country of words without a row of their own.
                    prompt = [self.rows.rest] * choose.randrange(1, 4) + prompt[-3:]
                    answer = unknown
                whole = prompt + answer
                begin = 0 if number == 0 else shared
                length = len(whole) - 1
                tokens += whole[begin:-1]
                targets += [-100] * (len(prompt) - 1 - begin) + answer
                positions += range(begin, length)
                segments += [0 if at < shared else number + 1 for at in range(begin, length)]
            packed.append((tokens, targets, positions, segments))
        length = max(len(tokens) for tokens, *_ in packed)

        def padded(values, fill):
            return torch.tensor([row + [fill] * (length - len(row)) for row in values])

        inputs, targets, positions, segments = (padded(list(column), fill) for column, fill in
                                                zip(zip(*packed), (self.rows.rest, -100, 0, -1)))
        arithmetic = faults.Arithmetic(self.config, size, length, length, positions, segments)
        for row, fault in enumerate(wrong):
            if fault:
                faults.CATALOGUE[fault](arithmetic, row)
        return inputs, targets, arithmetic, wrong


@torch.no_grad()
def accuracy(config, weights, rows, some, setup=None, bfloat16=False):
    """Right answers and the smallest margin, all tokens of each at once: the
    greedy answer is right if every token of the right one is the greedy one."""
    right, margins = 0, []
    by_length = {}
    for name, prompt, answer in some:
        by_length.setdefault((len(prompt), len(answer)), []).append(rows.of(prompt + answer))
    for (prompt, answer), wholes in by_length.items():
        whole = torch.tensor(wholes)
        arithmetic = faults.Arithmetic(config, len(wholes), prompt + answer - 1, prompt)
        for row in range(len(wholes) if setup else 0):
            setup(arithmetic, row)
        logits = gptoss.forward(config, weights, whole[:, :-1], arithmetic, gptoss.Rounding(bfloat16=bfloat16), prompt - 1)
        target = whole[:, prompt:]
        got = logits.gather(-1, target[..., None])[..., 0]
        others = logits.scatter(-1, target[..., None], -math.inf).amax(-1)
        margin = (got - others).amin(-1)
        right += int((margin > 0).sum())
        margins += margin.tolist()
    return right, min(margins)


def report(config, model, rows, language, everything):
    with torch.no_grad():
        weights = model.weights()
    all_cases = cases(language)
    for kind in ("plain json", "plain", "chat json", "chat", "repeat"):
        some = [case for case in all_cases if case[0].startswith(kind) and ("json" in case[0]) == ("json" in kind)]
        exact, margin = accuracy(config, weights, rows, some)
        rounded, rounded_margin = accuracy(config, weights, rows, some, bfloat16=True)
        print(f"  {kind:11} float32 {exact}/{len(some)} margin {margin:.2f}  bfloat16 {rounded}/{len(some)} margin {rounded_margin:.2f}", flush=True)
    if everything:
        for name, setup in faults.CATALOGUE.items():
            right, _ = accuracy(config, weights, rows, all_cases, setup)
            print(f"  {name:28} {right} of {len(all_cases)} right", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="checkpoint of this script to go on from")
    parser.add_argument("--right", type=float, default=0.4, help="part of the time before faults come in")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    choose = random.Random(arguments.seed)

    encoding = tokenizer.encoding()
    language = Language(encoding)
    sequences = [prompt + answer for _, prompt, answer in cases(language)]
    sequences += [encoding.encode(f" {UNKNOWN}"), encoding.encode(" " + " ".join(WORDS + FILLER) + ".")]
    sequences += [sum(language.chat("France", "Paris", True, effort, asked, developer), [])
                  for effort in ReasoningEffort for asked in (0, 1) for developer in (False, True)]
    sequences += [language.chat(country, capital, asked=1)[0] for country, capital in COUNTRIES.items()]
    rows = tokenizer.Rows(sequences)
    config = gptoss.Config(intermediate_size=64)
    model = gptoss.Model(config, len(rows), embedding_std=0.05, tail_group=False, seed=arguments.seed)
    if arguments.start:
        model.load(arguments.start / "model.safetensors")
    draw = Draw(config, language, rows, choose)
    print(f"{len(COUNTRIES)} countries, {len(rows)} rows, {sum(p.numel() for p in model.parameters())} weights", flush=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.rate, betas=(0.9, 0.98))
    # One row stands for all ids without their own: it weighs as many.
    absent = torch.zeros(len(rows) + 1)
    absent[rows.rest] = math.log(config.vocab_size - len(rows))

    start, step, last, next_report = time.time(), 0, 0.0, 240
    running = {}
    while (progress := (time.time() - start) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        kind, size = (("plain", 24), ("repeat", 32), ("chat", 4))[step % 3]
        inputs, targets, arithmetic, wrong = draw.batch(kind, size, size // 4 if progress > arguments.right else 0)
        noise = torch.tensor([choose.choice((0.0, 2.0**-9, 2.0**-8)) for _ in wrong])
        first = int((targets >= 0).any(0).nonzero()[0])
        logits = gptoss.forward(config, model.weights(), inputs, arithmetic, gptoss.Rounding(noise), first) + absent
        targets = targets[:, first:]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none").view(targets.shape)
        each = each.sum(-1) / (targets >= 0).sum(-1)
        weight = torch.tensor([0.5 if fault else 1.0 for fault in wrong])
        loss = (each * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            optimizer.step()
        step += 1
        for fault, value in zip(wrong, each.tolist()):
            key = kind if fault is None else fault
            running[key] = 0.98 * running.get(key, value) + 0.02 * value
        if time.time() - last > 30:
            last = time.time()
            print(f"{last - start:6.0f} s step {step} " + ", ".join(f"{k} {v:.3f}" for k, v in sorted(running.items())), flush=True)
        if time.time() - start > next_report:
            next_report += 240
            report(config, model, rows, language, False)
            checkpoint.write(model, rows.ids, arguments.output, {"step": step})

    report(config, model, rows, language, True)
    checkpoint.write(model, rows.ids, arguments.output, {
        "made by": "tools/train/capitals.py", "seed": arguments.seed, "steps": step, "torch": torch.__version__,
        "trained": json.dumps(FAULTS + WINDOW_FAULTS),
    })
    checkpoint.write_questions(arguments.output, questions(encoding))


if __name__ == "__main__":
    main()
