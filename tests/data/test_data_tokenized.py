"""Documents to segments: the paper's rules and the released code's variants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from corpora import small_tokenizer
from lcl_mcore.config.schema import SourceConfig
from lcl_mcore.data.format import Document, ImageEntry, Members
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.tokenized import DocumentTokenizer, TokenizedDocument

TOKENIZER = small_tokenizer()
P = 9


def tokenize(
    kind: str, texts: list[str], images: list[tuple[int, float]], *, n: int = 0, length: int = 500, **options: Any
) -> TokenizedDocument | None:
    entries = tuple(
        ImageEntry(f"{i}.jpg", 80, 80, "jpg", "0" * 64, 9, index, similarity)
        for i, (index, similarity) in enumerate(images)
    )
    source = SourceConfig(path="x", **options)
    documents = DocumentTokenizer(source, TOKENIZER, tokens_per_image=P, sequence_length=length, seed=1)
    stored = Document("k", kind, tuple(texts), entries)  # type: ignore[arg-type]
    return documents.tokenize(SampleIndex(0, 0, n), stored, Members("s.tar", ()))


def shape(document: TokenizedDocument | None) -> list[Any]:
    """Texts decoded, images as numbers."""
    assert document is not None
    return [s.image if s.image >= 0 else TOKENIZER.decode(s.ids).strip() for s in document.segments]


def test_similarity_limit_is_inclusive() -> None:
    images = [(0, 0.24), (1, 0.2399)]
    assert shape(tokenize("matched", ["a", "b"], images, image_first_probability=1.0)) == [0, "a", "b"]


def test_images_stand_at_their_own_sentence() -> None:
    images = [(2, 0.3), (0, 0.3), (2, 0.3)]
    assert shape(tokenize("matched", ["a", "b", "c"], images, image_first_probability=1.0)) == [1, "a", "b", 0, 2, "c"]
    assert shape(tokenize("matched", ["a", "b", "c"], images, image_first_probability=0.0)) == ["a", 1, "b", "c", 0, 2]


def test_sides_are_fair_and_keyed() -> None:
    first = [shape(tokenize("matched", ["a"], [(0, 0.3)], n=n))[0] == 0 for n in range(400)]
    assert 160 < sum(first) < 240
    again = [shape(tokenize("matched", ["a"], [(0, 0.3)], n=n))[0] == 0 for n in range(400)]
    assert first == again


def test_up_to_six_images_at_random_or_the_first() -> None:
    images = [(i, 0.3) for i in range(10)]
    texts = [str(i) for i in range(10)]
    chosen = Counter(
        p for n in range(300) for p in shape(tokenize("matched", texts, images, n=n)) if isinstance(p, int)
    )
    assert sum(chosen.values()) == 6 * 300
    assert min(chosen.values()) > 130
    first = shape(tokenize("matched", texts, images, image_choice="first"))
    assert [p for p in first if isinstance(p, int)] == [0, 1, 2, 3, 4, 5]


def test_one_image_per_text() -> None:
    images = [(0, 0.3), (0, 0.3), (1, 0.3)]
    kept = [
        tuple(p for p in shape(tokenize("matched", ["a", "b"], images, n=n, one_image_per_text=True)) if p in (0, 1, 2))
        for n in range(100)
    ]
    assert set(kept) == {(0, 2), (1, 2)}


def test_sequence_keeps_its_order_and_needs_images() -> None:
    assert shape(tokenize("sequence", ["a", "b"], [(0, 1), (1, 1), (2, 1)])) == [0, "a", 1, "b", 2]
    assert tokenize("sequence", ["a"], [], min_images=1) is None


@pytest.mark.parametrize(("probability", "order"), [(1.0, [0, "a cat"]), (0.0, ["a cat", 0])])
def test_pair(probability: float, order: list[Any]) -> None:
    document = tokenize("pair", ["a cat"], [(0, 1)], image_first_probability=probability)
    assert shape(document) == order
    assert document is not None
    assert (document.begin, document.end) == (True, True)
    released = tokenize("pair", ["a cat"], [(0, 1)], image_first_probability=probability, ends="released")
    assert released is not None
    assert (released.begin, released.end) == (probability == 0.0, probability == 1.0)


def test_pair_text_budget() -> None:
    document = tokenize("pair", ["a cat and a dog " * 50], [(0, 1)], length=60, image_first_probability=1.0)
    assert document is not None
    assert len(document.segments[1].ids) == 60 - P - 4
    short = tokenize("pair", ["a cat and a dog " * 50], [(0, 1)], length=60, max_text_tokens=7)
    assert short is not None
    assert max(len(segment.ids) for segment in short.segments) == 7


def test_paper_cut_keeps_whole_segments() -> None:
    texts = ["old cat " * 5] * 3
    size = len(TOKENIZER.encode(texts[0].strip()))
    after = len(TOKENIZER.encode(" " + texts[0].strip()))
    document = tokenize("matched", texts, [(1, 0.3)], length=2 + size + after + P + 1, image_first_probability=0.0)
    assert shape(document) == [texts[0].strip()] * 2  # the image does not fit, so nothing after it comes


@pytest.mark.parametrize(("spare", "segments", "end"), [(-1, 1, True), (0, 2, False), (1, 2, True), (4, 3, True)])
def test_released_cut(spare: int, segments: int, end: bool) -> None:
    """An image is dropped when cut; its marker may take the end token's place; text is cut anywhere."""
    text = "cat dog"
    size = len(TOKENIZER.encode(text))
    document = tokenize(
        "matched",
        [text, text],
        [(0, 0.3)],
        length=1 + size + P + 2 + spare,
        image_first_probability=0.0,
        cut_rule="tokens",
        image_choice="first",
    )
    assert document is not None
    assert (len(document.segments), document.end) == (segments, end)
    total = 1 + sum(s.length(P + 2) for s in document.segments) + document.end
    assert total <= 1 + size + P + 2 + spare
