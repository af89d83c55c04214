"""Goldens of generation: what torch and transformers answer to a trained
fixture's questions.

    build/gptoss expand --from fixtures/capitals --output build/capitals
    TIKTOKEN_ENCODINGS_BASE=build/tokens build/oracles/bin/python \
        tools/oracles/tokens/answers.py fixtures/capitals build/capitals golden/answers/capitals.json

`make golden-answers` does this for both fixtures. With --check in front, nothing
is written: the answers are made again and compared with the file's, tokens
exactly and margins within MARGIN_LIMIT.

torch is OpenAI's model, without a cache, in float32 and bfloat16; transformers
decodes with its KV cache, in float32. Tokens are the greedy ones, and a margin is
the distance of torch's chosen logit from the second, per token, in float32.
Prompts are rendered by OpenAI's harmony, so that the file tests the tokenizer
too. The sha256 is that of the fixture's model.safetensors: a model that was
trained anew needs new answers.
"""

import hashlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from openai_harmony import (Conversation, HarmonyEncodingName, Message, Role, SystemContent, load_harmony_encoding)

import torch_model
import transformers_model
from checkpoints import Checkpoint

LIMIT, RETURN = 24, 200002

# Margins are stored to 4 digits. Another CPU's order of sums moves one by about
# 1e-4 (decidedMargin in conformance/capitals_test.go has the derivation).
MARGIN_LIMIT = 1e-3

# What made each part of the file.
RUNS = {"torch float32": "tokens and margins; OpenAI's model, without a cache",
        "torch bfloat16": "where it differs; OpenAI's model, without a cache",
        "transformers float32": "where it differs; decoded with its KV cache"}


def prompt_of(encoding, question):
    if not question.get("chat"):
        return encoding.encode(question["prompt"], allowed_special="all")
    messages = [Message.from_role_and_content(Role.SYSTEM, SystemContent.new()),
                Message.from_role_and_content(Role.USER, question["prompt"])]
    return encoding.render_conversation_for_completion(Conversation.from_messages(messages), Role.ASSISTANT)


def by_torch(checkpoint, precision, prompts, guesses):
    """Greedy answers and margins. A guess that is the greedy answer is confirmed
    by one run over prompt and guess; another one is replaced token by token."""
    model = torch_model.load(checkpoint, precision)
    wanted = [1]  # how many of the last positions' logits are needed
    model.unembedding.register_forward_pre_hook(lambda _module, args: (args[0][-wanted[0]:],))

    def tops(tokens, count):
        wanted[0] = count
        top = model(torch.tensor(tokens)).double().topk(2)
        margins = [round(float(first - second), 4) for first, second in top.values]
        return top.indices[:, 0].tolist(), margins

    answers = []
    with torch.inference_mode():
        for prompt, guess in zip(prompts, guesses):
            said, margins = tops(prompt + guess[:-1], len(guess))
            if said != guess:
                said, margins = [], []
                while len(said) < LIMIT and (not said or said[-1] != RETURN):
                    token, margin = tops(prompt + said, 1)
                    said, margins = said + token, margins + margin
            answers.append((said, margins))
    return answers


def by_transformers(checkpoint, precision, prompts):
    model = transformers_model.load(checkpoint, precision)
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=False,
                                 use_cache=True, eos_token_id=RETURN, pad_token_id=RETURN)
            answers.append((out[0, len(prompt):].tolist(), None))
    return answers


def make(fixture: Path, expanded: Path):
    """Returns where the answers come from, and a case per question."""
    torch.set_num_threads(2)
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    questions = json.loads((fixture / "questions.json").read_text())
    prompts = [prompt_of(encoding, question) for question in questions]
    checkpoint = Checkpoint(expanded)
    guesses = [encoding.encode(question["answer"], allowed_special="all") for question in questions]
    runs = {"torch float32": by_torch(checkpoint, "float32", prompts, guesses)}
    print("torch float32", flush=True)
    runs["transformers float32"] = by_transformers(checkpoint, "float32", prompts)
    print("transformers float32", flush=True)
    runs["torch bfloat16"] = by_torch(checkpoint, "bfloat16", prompts, [said for said, _ in runs["torch float32"]])
    cases = []
    for i, (question, prompt) in enumerate(zip(questions, prompts)):
        said, margins = runs["torch float32"][i]
        case = {"name": question["name"], "prompt": prompt, "tokens": said, "margins": margins,
                "right": encoding.decode(said) == question["answer"]}
        # The others only where they differ.
        case |= {name: run[i][0] for name, run in runs.items() if run[i][0] != said}
        cases.append(case)
    right = sum(case["right"] for case in cases)
    others = {name: sum(name in case for case in cases) for name in list(runs)[1:]}
    print(f"{len(cases)} questions, {right} answered right by torch in float32; "
          + ", ".join(f"{name} differs in {count}" for name, count in others.items()), flush=True)
    digest = hashlib.sha256((fixture / "model.safetensors").read_bytes()).hexdigest()
    about = {"fixture": fixture.name, "sha256": digest, "runs": RUNS,
             "oracles": {name: version(name) for name in ("torch", "gpt-oss", "transformers", "openai-harmony")},
             "command": f"tools/oracles/tokens/answers.py fixtures/{fixture.name} build/{fixture.name} golden/answers/{fixture.name}.json"}
    return about, cases


def write(output, about, cases):
    lines = ",\n  ".join(json.dumps(case, separators=(",", ":"), ensure_ascii=False) for case in cases)
    part = output.with_suffix(".part")
    part.write_text(f'{{"about": {json.dumps(about)},\n "cases": [\n  {lines}\n]}}\n')
    os.replace(part, output)


def differences(path, about, cases):
    """Says in what the stored answers are not these."""
    stored = json.loads(path.read_text())
    for key in ("fixture", "sha256"):
        if stored["about"][key] != about[key]:
            yield f"{path}: {key} is {stored['about'][key]}, now {about[key]}"
    if [case["name"] for case in stored["cases"]] != [case["name"] for case in cases]:
        yield f"{path}: other questions than now"
        return
    for old, new in zip(stored["cases"], cases):
        exact = [{key: value for key, value in case.items() if key != "margins"} for case in (old, new)]
        if exact[0] != exact[1]:
            keys = [key for key in exact[0].keys() | exact[1].keys() if exact[0].get(key) != exact[1].get(key)]
            yield f"{path}: {old['name']}: other {', '.join(sorted(keys))} than now"
        elif not max(abs(a - b) for a, b in zip(old["margins"], new["margins"], strict=True)) <= MARGIN_LIMIT:
            yield f"{path}: {old['name']}: margins {old['margins']}, now {new['margins']}"


def main(arguments):
    check = arguments[:1] == ["--check"]
    fixture, expanded, output = (Path(argument) for argument in arguments[check:])
    about, cases = make(fixture, expanded)
    if not check:
        write(output, about, cases)
        return
    problems = list(differences(output, about, cases))
    for problem in problems:
        print(problem)
    if problems:
        raise SystemExit(f"{output}: {len(problems)} differences")
    print(f"{output} is what the oracles answer")


if __name__ == "__main__":
    main(sys.argv[1:])
