"""Adds gpt-oss's tokenizer to a checkpoint in Hugging Face's layout, so that
`transformers serve` can load it.

  go run ./conformance/backends/server/testdata/vocabulary.go > tokens.tiktoken
  python conformance/backends/server/testdata/huggingface_tokenizer.py tokens.tiktoken CHECKPOINT
"""

import sys

import vocabulary
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# o200k's way of cutting text into words (tiktoken's o200k_base).
WORDS = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])


def main(tokens, checkpoint):
    ordinary, special = vocabulary.read(tokens)
    bpe = models.BPE(vocab={vocabulary.spell(t): i for i, t in enumerate(ordinary)}, merges=list(vocabulary.merges(ordinary)))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|return|>", pad_token="<|endoftext|>", bos_token="<|startoftext|>")
    fast.save_pretrained(checkpoint)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
