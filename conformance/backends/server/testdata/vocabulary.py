"""gpt-oss's vocabulary for the servers that testdata was recorded from.

Reads a file of lines "base64-of-the-token id", as tiktoken has them, with the
special tokens behind the others (testdata/vocabulary.go writes it), and gives what
byte-pair tokenizers of other make want: tokens in GPT-2's printable bytes, and the
merges in order.
"""

import base64

SPECIAL = 199998  # the first special id


def read(path):
    with open(path) as file:
        tokens = [base64.b64decode(line.split()[0]) for line in file]
    return tokens[:SPECIAL], [t.decode() for t in tokens[SPECIAL:]]


def printable():
    """GPT-2's stand-ins for bytes: printable Latin-1 as it is, the rest from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


STAND_INS = printable()


def spell(token):
    return "".join(STAND_INS[b] for b in token)


def merges(tokens):
    """The pair that each token of several bytes is merged from: what is left of it when
    only the merges before its own are made."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if best >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield spell(parts[0]), spell(parts[1])
