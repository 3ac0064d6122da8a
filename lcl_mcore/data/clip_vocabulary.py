"""CLIP's vocabulary from the merge list that CLIP and OpenCLIP ship.

`bpe_simple_vocab_16e6.txt.gz`, or the same list as a Hugging Face repository's `merges.txt`.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

MERGES = 48_894
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MAX_BYTES = 16 << 20


def clip_tokenizer_from_merges(path: Path) -> tokenizers.Tokenizer:
    """Lower-cased byte-pair vocabulary of 49,408 ids: bytes, bytes ending a word, merges, two markers."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        lines = stream.read(MAX_BYTES).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    letters = _bytes_in_clip_order()
    names = letters + [letter + "</w>" for letter in letters]
    names += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[(left, right) for left, right in merges],
            end_of_word_suffix="</w>",
            unk_token="<|endoftext|>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return backend


def _bytes_in_clip_order() -> list[str]:
    """The 256 printable stand-ins for bytes: printable Latin-1 first, the others after them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
