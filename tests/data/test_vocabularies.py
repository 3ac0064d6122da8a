"""Which vocabularies a run accepts: every text must have ids, and each refusal says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from lcl_mcore.config.schema import TokenizerConfig
from lcl_mcore.data.tokenizer import build_tokenizer, train_bpe
from lcl_mcore.errors import DataError

TEXTS = ["a red fox on a wall"] * 50
REMEDY = "Give a tokenizer.json, or the folder of a model that has one."


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        build_tokenizer(TokenizerConfig(path=str(path)))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value).removeprefix(f"tokenizer {path}")


def trained(kind: str, unknown: bool, folder: Path) -> Path:
    """A vocabulary of a few letters, without bytes to fall back on."""
    special = ["<unk>"] if unknown else []
    if kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=40, special_tokens=special, unk_token="<unk>" if unknown else None, show_progress=False
        )
    elif kind == "bpe":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>" if unknown else None))
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    elif kind == "word":
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    else:
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["unigram", "bpe", "word", "piece"])
def test_a_vocabulary_needs_an_unknown_token(kind: str, tmp_path: Path) -> None:
    message = refusal(trained(kind, False, tmp_path))
    if kind == "bpe":  # the library drops what it does not know
        assert message == (
            ": gives no ids at all for 'Z', '7', '~', '\\xe9', which would vanish from every text. Train it with an "
            "unknown token (unk_token) or on bytes."
        )
    else:
        assert message.startswith(": has no unknown token for texts outside its vocabulary (")
        assert message.endswith("Train it with an unknown token (unk_token, for Unigram also unk_id) or on bytes.")
    assert build_tokenizer(TokenizerConfig(path=str(trained(kind, True, tmp_path)))).encode("\U0001f389")


def test_bytes_need_no_unknown_token(tmp_path: Path) -> None:
    train_bpe(TEXTS, 300).save(tmp_path / "tokenizer.json")
    assert build_tokenizer(TokenizerConfig(path=str(tmp_path))).encode("\U0001f389")


def test_sentencepiece_must_be_converted(tmp_path: Path) -> None:
    content = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2" * 20
    expected = (
        ": a SentencePiece model is not read here, it must be converted to tokenizer.json. With transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT), then give OUT."
    )
    for name in ("tokenizer.model", "spiece", "sp.json"):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name) == expected
    assert refusal(tmp_path) == f"{os.sep}tokenizer.model{expected}"  # a folder that has nothing else


def test_nothing_stands_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelled file or a pipe beside a good vocabulary is not that vocabulary."""
    train_bpe(TEXTS, 300).save(tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / "pipe")
    for name in ("tokeniser.json", "pipe"):
        assert refusal(tmp_path / name).startswith(": no tokenizer.json, vocab.json with merges.txt, or bpe_simple")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer typo: no tokenizer\.json"):
        build_tokenizer(TokenizerConfig(path="typo"))


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff" * 99, b"[1", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        message = refusal(path)
        assert message.removeprefix("/tokenizer.json").startswith(": is not a readable vocabulary (")
        assert message.endswith(f"). {REMEDY}")


def test_either_of_two_files_names_the_pair(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    backend = tokenizers.Tokenizer.from_str(tokenizer._definition)
    backend.model.save(str(tmp_path))
    ids = [build_tokenizer(TokenizerConfig(path=str(p))).encode("fox") for p in (tmp_path, *tmp_path.iterdir())]
    assert len(ids) == 3
    assert ids[0] == ids[1] == ids[2]
