"""A vocabulary's files, looked at before the tokenizers library reads them.

The library believes them: a single id of 2^31 takes gigabytes, and a regular expression may take hours for a few
kilobytes of text.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lcl_mcore.errors import DataError, explain
from lcl_mcore.untrusted import BadJsonError, parse_object, read_regular

MAX_BYTES = 256 << 20
MAX_IDS = 1 << 22
SECONDS = 20.0
"""For a vocabulary's patterns to cut the probes, the start of a process included."""

KNOWN_PATTERNS = frozenset((r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", r"\s+", " {2,}"))
"""Of CLIP's vocabulary as we make it; others are tried."""
_PROBE = """
import json, sys, tokenizers
content = json.loads(sys.stdin.buffer.read())
backend = tokenizers.Tokenizer.from_str(content["definition"])
for text in content["probes"]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        backend.pre_tokenizer.pre_tokenize_str(text)
"""


def read_vocabulary(path: Path) -> bytes:
    """The content of `tokenizer.json`, `vocab.json` or a list of merges.

    Raises:
        DataError: it is no regular file, or longer than any vocabulary.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise DataError(explain(path, f"cannot be read ({error.strerror})", "Download it again.")) from None


def require_sound_ids(where: str, own: list[Any], added: Sequence[Any] = ()) -> None:
    """Refuse ids that are no integers, or leave most of their range empty, or stand for two entries.

    Args:
        own: of the vocabulary.
        added: of tokens that are named once more, or beside it.

    Raises:
        DataError: it is so.
    """
    ids = [*own, *added]
    wrong = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < MAX_IDS]
    if wrong:
        rule = f"ids are integers from 0 on, below {MAX_IDS}"
        raise DataError(explain(f"tokenizer {where}: id {str(wrong[0])[:40]}", rule, "Download it again."))
    if len(set(own)) < len(own):
        twice = next(i for i, count in Counter(own).items() if count > 1)
        raise DataError(explain(f"tokenizer {where}: id {twice}", "stands for two entries", "Download it again."))
    if ids and max(ids) >= 2 * len(ids) + 1000:
        rule = f"leaves most ids without an entry: there are {len(ids)}"
        raise DataError(explain(f"tokenizer {where}: id {max(ids)}", rule, "Download it again."))


def read_definition(path: Path) -> str:
    """The text of a `tokenizer.json` that is safe to load and to use.

    Raises:
        DataError: unreadable, ids out of bounds, or its patterns take too long.
    """
    try:
        content = parse_object(read_vocabulary(path), max_bytes=MAX_BYTES)
    except BadJsonError as error:
        raise _unreadable(path, str(error)) from None
    model, added = content.get("model"), content.get("added_tokens")
    entries = model.get("vocab") if isinstance(model, dict) else ()
    ids = list(
        entries.values() if isinstance(entries, dict) else range(len(entries) if isinstance(entries, list) else 0)
    )
    extra = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    require_sound_ids(str(path), ids, extra)
    definition = json.dumps(content)
    unknown = set(_patterns({k: v for k, v in content.items() if k != "model"})) - KNOWN_PATTERNS
    if unknown:
        _require_fast(path, definition, sorted(unknown))
    return definition


def _patterns(tree: Any) -> Iterator[str]:
    """Regular expressions in a definition."""
    if isinstance(tree, dict):
        if isinstance(tree.get("Regex"), str):
            yield tree["Regex"]
        for value in tree.values():
            yield from _patterns(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _patterns(value)


def _require_fast(path: Path, definition: str, patterns: list[str]) -> None:
    """Cut texts that make careless patterns slow, in a process of its own with a time limit."""
    letters = sorted({*re.findall(r"\w| ", "".join(patterns)), *"a 0.\n"})[:40]
    probes = [unit * 4096 + end for unit in (*letters, "ab ", " \n", "a1 ") for end in ("", "!", "\x01")]
    content = json.dumps({"definition": definition, "probes": probes})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], input=content.encode(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        rule = f"takes more than {SECONDS:.0f} s to cut a few kilobytes of text: {patterns[0][:200]!r}"
        raise DataError(explain(f"tokenizer {path}: pattern", rule, "Do not use it.")) from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _unreadable(path, last[:300])


def _unreadable(path: Path, reason: str) -> DataError:
    remedy = "Give a tokenizer.json, or the folder of a model that has one."
    return DataError(explain(f"tokenizer {path}", f"is not a readable vocabulary ({reason})", remedy))
