"""Goldens of generation: what torch and transformers answer to a trained
fixture's questions.

    build/gptoss expand --from fixtures/capitals --output build/capitals
    TIKTOKEN_ENCODINGS_BASE=build/tokens build/oracles/bin/python \
        tools/oracles/tokens/answers.py fixtures/capitals build/capitals golden/answers/capitals.json

torch is OpenAI's model, without a cache, in float32 and bfloat16; transformers decodes with its KV cache, in float32. Tokens
are the greedy ones, and a margin is the distance of torch's chosen logit from
the second, per token, in float32. Prompts are rendered by OpenAI's harmony, so
that the file tests the tokenizer too. The sha256 is that of the fixture's
model.safetensors: a model that was trained anew needs new answers.
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


def main(fixture: Path, expanded: Path, output: Path):
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
    digest = hashlib.sha256((fixture / "model.safetensors").read_bytes()).hexdigest()
    about = {"fixture": fixture.name, "sha256": digest, "oracles": {name: version(name) for name in ("torch", "gpt-oss", "transformers", "openai-harmony")},
             "command": f"tools/oracles/tokens/answers.py fixtures/{fixture.name} build/{fixture.name} golden/answers/{fixture.name}.json"}
    lines = ",\n  ".join(json.dumps(case, separators=(",", ":"), ensure_ascii=False) for case in cases)
    part = output.with_suffix(".part")
    part.write_text(f'{{"about": {json.dumps(about)},\n "cases": [\n  {lines}\n]}}\n')
    os.replace(part, output)
    right = sum(case["right"] for case in cases)
    others = {name: sum(name in case for case in cases) for name in list(runs)[1:]}
    print(f"{len(cases)} questions, {right} answered right by torch in float32; "
          + ", ".join(f"{name} differs in {count}" for name, count in others.items()))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
