"""Texts are cleaned as the released code cleans them, and the run's identity says so."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from pathlib import Path
from typing import Any

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import config, make_dataset, run_config, small_tokenizer
from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.recipes import load_recipe, released_for
from lcl_mcore.config.run_folder import write_config
from lcl_mcore.config.schema import SourceConfig, TokenizerConfig
from lcl_mcore.data.format import Document, ImageEntry, Members
from lcl_mcore.data.loader import DataContext, build_loader
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.tokenized import DocumentTokenizer
from lcl_mcore.data.tokenizer import Tokenizer, build_tokenizer
from lcl_mcore.errors import DataError

MARKERS = ["<img_placehold>", "<start_of_img>", "<end_of_img>"]


def open_clip_file(name: str) -> Path:
    """A file of the package, which is part of the export extra and of what the tests install."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name(name)


def released_tokenizer() -> Any:
    """The released code's tokenizer is open_clip's with three special tokens; its file stands alone."""
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", open_clip_file("tokenizer.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(additional_special_tokens=MARKERS)


VOCABULARY = str(open_clip_file("bpe_simple_vocab_16e6.txt.gz"))
THEIRS = released_tokenizer()
OURS = build_tokenizer(TokenizerConfig(kind="clip", path=VOCABULARY))
PARTS = (
    *("don\u2019t", "\u201cquoted\u201d", "caf\xe9", "caf\xc3\xa9", "voil\xc3\xa0", "\xc3 ", "&amp;amp;", "&lt;b&gt;"),
    *("e&#769;", "\u039f\u0394\u039f\u03a3", "\u0130stanbul", "\ufb01ne", "\uff2c\uff2f", "na\xc3\xafve", "\n", "\t"),
    *("!!!", "12345", "IT'S", "'\u017f", "\u65e5\u672c", "\U0001f389", "fox", "&hellip;", "<b>", "\u200b", "\x85"),
    *("\xe2\u20ac\u0153hi", "\u2028", "a\u0301", "|", "<|endoftext|>", "\x1b[31mred", "\u212a", ".", "  "),
)
TEXT = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(["", " "])), max_size=9).map(
    lambda parts: "".join(part + space for part, space in parts)
)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_ids_are_those_of_the_released_tokenizer(text: str) -> None:
    assert OURS.encode(text) == THEIRS.encode(text)


def test_curly_quotes_give_the_ids_of_straight_ones() -> None:
    assert (
        OURS.encode("A dog\u2019s \u201ctoy\u201d") == OURS.encode('a dog\'s "toy"') == [320, 1929, 568, 257, 5988, 257]
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT.filter(lambda text: "\xe2" not in text), min_size=1, max_size=5), st.integers(0, 2**20))
def test_a_document_is_cleaned_as_a_whole(texts: list[str], seed: int) -> None:
    """What one sentence holds may change how another is read: ids as when images are words of one text.

    Letters after which ftfy would take the marker itself for a damaged one are skipped: there the released code
    loses the image, and here it stays.
    """
    rng = random.Random(seed)
    images = [i for i in range(len(texts)) if rng.random() < 0.6]
    entries = tuple(ImageEntry(f"{i}.jpg", 9, 9, "jpg", "0" * 64, 9, text, 0.3) for i, text in enumerate(images))
    source = SourceConfig(path="x", cut_rule="tokens", image_first_probability=rng.choice([0.0, 1.0]))
    documents = DocumentTokenizer(source, OURS, tokens_per_image=2, sequence_length=2048, seed=0)
    stored = Document("k", "matched", tuple(texts), entries)
    document = documents.tokenize(SampleIndex(0, 0, 0), stored, Members("s.tar", ()))
    marker = " <start_of_img> <img_placehold> <img_placehold> <end_of_img> "
    theirs = list(texts)
    for i in images[: source.max_images]:
        theirs[i] = marker + theirs[i] if source.image_first_probability else theirs[i] + marker
    ours: list[int] = []
    for segment in document.segments if document else ():
        ours += segment.ids if segment.image < 0 else (49409, 49408, 49408, 49410)
    assert ours == THEIRS.encode(" ".join(theirs))


def test_html_is_what_earlier_versions_did() -> None:
    """Its fingerprint, by which they saved positions, is unchanged; each cleaning has another one."""
    former = build_tokenizer(TokenizerConfig(kind="clip", path=VOCABULARY, cleaning="html"))
    assert former.fingerprint == "2ee03f91f84d2e16"
    assert former.encode("don\u2019t &amp;lt;") != OURS.encode("don\u2019t &amp;lt;")
    assert former.encode("&amp;lt;") == OURS.encode("&amp;lt;")
    plain = small_tokenizer()
    tokenizers = [Tokenizer(plain._backend, plain._ids, cleaning=c) for c in ("none", "html", "released")]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 3
    assert [tokenizer.ftfy_version for tokenizer in tokenizers] == [None, None, ftfy.__version__]


@pytest.mark.parametrize(("kind", "cleaning"), [("clip", "released"), ("opt", "none"), ("file", "none")])
def test_what_auto_stands_for(kind: Any, cleaning: str) -> None:
    assert TokenizerConfig(kind=kind).resolved_cleaning == cleaning
    assert TokenizerConfig(kind=kind, cleaning="html").resolved_cleaning == "html"


def test_positions_name_the_cleaning(tmp_path: Path) -> None:
    run = run_config(config(make_dataset(tmp_path / "pairs")))
    plain = small_tokenizer()
    cleaned = Tokenizer(plain._backend, plain._ids, cleaning="released")
    loader = build_loader(run, DataContext(), plain)
    position = next(loader).position
    loader.close()
    assert position["ftfy"] is None
    with pytest.raises(DataError) as caught:
        build_loader(run, DataContext(), cleaned, position)
    assert f"ftfy was None, is {ftfy.__version__}; tokenizer was {plain.fingerprint}" in str(caught.value)


def test_imported_shapes_have_the_released_rules(tmp_path: Path) -> None:
    """Every section of the recipe but what the checkpoint decides, and its rules for sources."""
    for name, positions in (("released-b16-laion", 281), ("released-b32-mmc4", 2049)):
        recipe = load_recipe(name)
        language = dataclasses.replace(recipe.model.language, max_positions=positions)
        model = dataclasses.replace(recipe.model, language=language)
        imported = released_for(model)
        assert imported.model == model
        assert imported.recipe == "imported"
        assert imported.data == dataclasses.replace(recipe.data, sequence_length=positions)
        for section in ("loss", "optim", "parallel", "train", "checkpoint", "log", "faults", "evaluation"):
            assert getattr(imported, section) == getattr(recipe, section), section
        assert released_for(recipe.model) == recipe
        write_config(imported, tmp_path)
        words = ["--data", "a", "--data", "b:2"]
        again = parse_options(["--config", str(tmp_path / "config.yaml"), *words]).run
        assert again.data.sources == parse_options(["--recipe", name, *words]).run.data.sources
        assert again.data.sources[0].ends == "released"
