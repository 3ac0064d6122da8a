"""Vocabularies that others wrote: ids within bounds, and patterns that end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from corpora import small_tokenizer
from lcl_mcore.config.schema import TokenizerConfig
from lcl_mcore.data import vocabulary_file
from lcl_mcore.data.tokenizer import build_tokenizer, panics_are_errors
from lcl_mcore.errors import DataError


def sound() -> dict[str, Any]:
    tokenizer = small_tokenizer()
    definition: dict[str, Any] = json.loads(tokenizer._definition)
    return definition


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        build_tokenizer(TokenizerConfig(path=str(path)))
    return str(caught.value).replace(str(path), "FILE")


def test_ids_are_bounded_and_dense(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for value, message in {
        2**31: f"tokenizer FILE: id {2**31}: ids are integers from 0 on, below 4194304. Download it again.",
        -1: "tokenizer FILE: id -1: ids are integers from 0 on, below 4194304. Download it again.",
        1.5: "tokenizer FILE: id 1.5: ids are integers from 0 on, below 4194304. Download it again.",
        1_000_000: "tokenizer FILE: id 1000000: leaves most ids without an entry: there are 298. Download it again.",
    }.items():
        content = sound()
        content["model"]["vocab"]["a"] = value
        path.write_text(json.dumps(content))
        assert refusal(path).replace(str(len(content["model"]["vocab"])), "298") == message
    content = sound()
    content["added_tokens"] = [{"id": 2**31, "content": "x"}]
    path.write_text(json.dumps(content))
    assert refusal(path) == f"tokenizer FILE: id {2**31}: ids are integers from 0 on, below 4194304. Download it again."
    path.write_text(json.dumps(sound()))
    assert build_tokenizer(TokenizerConfig(path=str(path))).encode("a cat") == small_tokenizer().encode("a cat")


def test_merges_of_entries_that_are_not_there(tmp_path: Path) -> None:
    """Two readers of the library find different faults."""
    content = sound()["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    gone = "".join(merges[-1].split(" "))
    (tmp_path / "vocab.json").write_text(json.dumps({k: v for k, v in content["vocab"].items() if k != gone}))
    assert "out of vocabulary" in refusal(tmp_path)


def test_two_files_of_a_vocabulary(tmp_path: Path) -> None:
    content = sound()["model"]
    merges = ["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in content["merges"])]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    assert build_tokenizer(TokenizerConfig(path=str(tmp_path))).encode("a cat") == small_tokenizer().encode("a cat")
    (tmp_path / "vocab.json").write_text(json.dumps({**content["vocab"], "z": 2**40}))
    assert "ids are integers from 0 on" in refusal(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({**content["vocab"], "z": 7}))
    assert refusal(tmp_path).endswith("vocab.json: id 7: stands for two entries. Download it again.")


def test_a_panic_of_the_library_is_an_error() -> None:
    """Its `PanicException` is no `Exception`: nothing else would catch it."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("((a|a?)+)+$"), "isolated")
    with pytest.raises(ValueError, match="retry-limit-in-match over"), panics_are_errors():
        split.pre_tokenize_str("a" * 50 + "b")


def test_patterns_that_never_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    content = sound()

    def with_pattern(pattern: str) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        both = {"type": "Sequence", "pretokenizers": [split, {**content["pre_tokenizer"], "use_regex": False}]}
        path.write_text(json.dumps({**content, "pre_tokenizer": both}))

    with_pattern("((a|a?)+)+$")
    assert refusal(path) == (
        "tokenizer FILE: is not a readable vocabulary (pyo3_runtime.PanicException: Onig: Regex search error: "
        "retry-limit-in-match over). Give a tokenizer.json, or the folder of a model that has one."
    )
    with_pattern("(")
    assert "is not a readable vocabulary" in refusal(path)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    with_pattern(words + r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    assert build_tokenizer(TokenizerConfig(path=str(path))).text_size == small_tokenizer().text_size
    monkeypatch.setattr(vocabulary_file, "SECONDS", 0.001)
    assert "takes more than 0 s to cut a few kilobytes of text" in refusal(path)


def test_no_vocabulary_is_read_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    assert "no tokenizer.json" in refusal(tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / "merges.txt.gz")
    assert "not a regular file" in refusal(tmp_path / "merges.txt.gz")
