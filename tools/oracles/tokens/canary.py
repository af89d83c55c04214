"""Asks published implementations the canary's question, as they are shipped.

    build/gptoss expand --from fixtures/canary --output build/canary
    TIKTOKEN_ENCODINGS_BASE=build/tokens build/oracles/bin/python \
        tools/oracles/tokens/canary.py build/canary flax equinox

They have no decoding, so each token is a run over the whole text, and JAX
compiles every length anew: a minute or two for each answer.
"""

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
from openai_harmony import HarmonyEncodingName, load_harmony_encoding

from checkpoints import Checkpoint

LIMIT, RETURN = 12, 200002


def main(expanded: Path, names):
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    golden = HERE.parents[2] / "golden" / "answers" / "canary.json"
    prompt = json.loads(golden.read_text())["cases"][0]["prompt"]
    checkpoint = Checkpoint(expanded)
    for name in names:
        model = importlib.import_module(name + "_model")
        for correct in (False, True):
            said = []
            while len(said) < LIMIT and RETURN not in said:
                logits = model.run(checkpoint, "float32", prompt + said, ["logits"], correct=correct)["logits"]
                said.append(int(np.asarray(logits)[-1].argmax()))
            print(f"{name}, {'corrected' if correct else 'as shipped'}: {encoding.decode(said)!r}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
