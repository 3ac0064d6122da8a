"""Packed sequences: exact best fit, whole segments, full on real proportions, and a state of few integers."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_mcore.config.schema import DataConfig, Packing
from lcl_mcore.data import packing
from lcl_mcore.data.format import Document, ImageEntry, Members
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import SampleStream, best_subset, span_from
from lcl_mcore.data.tokenized import MARKERS_PER_IMAGE, Segment, TokenizedDocument

IMAGE = 198


def document(n: int, contents: list[int | str], *, kind: str = "matched") -> TokenizedDocument:
    """A document of texts (token counts) and images ("i")."""
    images = tuple(ImageEntry("0.jpg", 9, 9, "jpg", "0" * 64, 9) for c in contents if c == "i")
    made, seen = [], 0
    for c in contents:
        made.append(Segment(image=seen) if c == "i" else Segment(ids=tuple(range(int(c)))))
        seen += c == "i"
    stored = Document(f"d{n}", kind, (), images)  # type: ignore[arg-type]
    return TokenizedDocument(SampleIndex(0, 0, n), "s", stored, Members("x.tar", ()), tuple(made))


class OnePacking:
    """The documents of a stream whose sources agree."""

    def __init__(self, documents: Callable[[int], TokenizedDocument | None], packing: Packing) -> None:
        self.packings, self.document = (packing,), documents

    def packing(self, n: int) -> Packing:
        return self.packings[0]


def stream(documents, packing: Packing = "best_fit", state: Sequence[int] = (), **options) -> SampleStream:
    config = DataConfig(packing=packing, **options)
    return SampleStream(config, OnePacking(documents, packing), IMAGE - MARKERS_PER_IMAGE, state)


def test_best_subset_is_exact() -> None:
    rng = random.Random(1)
    for _ in range(60):
        sizes = [rng.randint(3, 60) for _ in range(9)]
        spans = [span_from(i, document(i, [size - 2]), IMAGE) for i, size in enumerate(sizes)]
        room = rng.randint(10, 200)
        best = max(s for k in range(10) for c in itertools.combinations(sizes, k) if (s := sum(c)) <= room)
        assert sum(sizes[i] for i in best_subset(spans, room, None, 0)) == best


def best_subset_by_every_subset(
    sizes: Sequence[tuple[int, int]], room: int, wanted: float | None, enough: int
) -> list[int]:
    """The rule, spelt out: (tokens, images) of all subsets; of equal ones that of the older spans."""
    best: dict[tuple[int, int], list[int]] = {(0, 0): []}
    for i, (length, images) in enumerate(sizes):
        for (tokens, count), chosen in list(best.items()):
            found = (tokens + length, count + (0 if wanted is None else images))
            if found[0] <= room and found not in best:
                best[found] = [*chosen, i]
    fullest = {count: max(t for t, c in best if c == count) for _, count in best}
    full = [count for count in sorted(fullest) if fullest[count] >= max(enough, 0)]
    if wanted is not None and full:
        count = min(full, key=lambda c: (abs(c - wanted), -fullest[c]))
    else:
        count = max(fullest, key=lambda c: (fullest[c], -c))
    return best[fullest[count], count]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), max_size=24),
    room=st.integers(0, 120),
    wanted=st.none() | st.floats(0, 12, allow_nan=False),
    enough=st.integers(-10, 120),
)
def test_subsets_are_those_of_the_rule(
    sizes: list[tuple[int, int]], room: int, wanted: float | None, enough: int
) -> None:
    """However dense the images are: bounding their number by the room loses nothing."""
    spans = [
        span_from(i, document(i, [*(["i"] * images), *([words] if words else [])]), 5)
        for i, (words, images) in enumerate(sizes)
    ]
    measured = [(span.length, span.images) for span in spans]
    assert best_subset(spans, room, wanted, enough) == best_subset_by_every_subset(measured, room, wanted, enough)


def test_work_grows_with_the_documents_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of images that are looked at: as many as fit in a sequence, with 64 or 512 documents waiting."""
    asked: list[int] = []
    best_bit = packing._best_bit

    def watched(reachable: int, stride: int, image_counts: int, *more: Any) -> int:
        asked.append(image_counts)
        return best_bit(reachable, stride, image_counts, *more)

    monkeypatch.setattr(packing, "_best_bit", watched)
    for count in (64, 512):
        spans = [span_from(n, document(n, ["i", "i", 10 + n % 50]), IMAGE) for n in range(count)]
        best_subset(spans, 8192, 30.0, 7000)
    assert asked == [41, 41]


def mixed(rng: random.Random) -> list[int | str]:
    """Sentences and up to three images, in all shorter than a sequence (as MMC4 documents are)."""
    contents: list[int | str] = [max(4, int(rng.lognormvariate(3.1, 0.5))) for _ in range(rng.randint(3, 30))]
    for _ in range(rng.randint(1, 3)):
        contents.insert(rng.randint(0, len(contents)), "i")
    return contents


@pytest.mark.parametrize("balance", [False, True])
def test_fill_is_above_97_percent_and_nothing_is_lost(balance: bool) -> None:
    documents = [document(n, mixed(random.Random(n))) for n in range(3000)]
    one = stream(lambda n: documents[n], balance_images=balance)
    sequences = [one.next_sequence() for _ in range(300)]
    used = np.array([sum(span.length for span in sequence) for sequence in sequences])
    assert used.max() <= 2048
    assert used.mean() / 2048 > 0.98
    segments = [
        (span.n, span.first_segment + i)
        for sequence in sequences
        for span in sequence
        for i in range(len(span.segments))
    ]
    assert len(set(segments)) == len(segments)
    oldest_waiting = min(set(range(3000)) - {n for n, _ in segments})
    complete = {(n, i) for n in range(oldest_waiting) for i in range(len(documents[n].segments))}
    assert len(complete - set(segments)) < 200  # rests of the documents that wait to go on
    assert len(one.state) < 40


def test_balancing_evens_the_images_out() -> None:
    spread = []
    for balance in (False, True):
        one = stream(lambda n: document(n, mixed(random.Random(n))), balance_images=balance)
        spread.append(np.std([sum(span.images for span in one.next_sequence()) for _ in range(200)]))
    assert spread[1] < 0.75 * spread[0]


def test_pairs_fill_sequences_and_are_never_divided() -> None:
    def pair(n: int) -> TokenizedDocument:
        return document(n, [random.Random(n).randint(5, 60), "i"], kind="pair")

    one = stream(pair)
    sequences = [one.next_sequence() for _ in range(200)]
    assert all(len(span.segments) == 2 for sequence in sequences for span in sequence)
    assert sum(span.length for sequence in sequences for span in sequence) / (200 * 2048) > 0.98


@pytest.mark.parametrize("packing", ["best_fit", "windows", "off"])
def test_a_stream_goes_on_from_its_state(packing: str) -> None:
    def source(n: int) -> TokenizedDocument | None:
        rng = random.Random(n)
        return None if rng.random() < 0.2 else document(n, mixed(rng) * rng.randint(1, 4))

    one = stream(source, packing)
    for _ in range(37):
        state = json.loads(json.dumps(one.state))
        wanted = one.next_sequence()
        assert stream(source, packing, state).next_sequence() == wanted


def test_windows_cut_texts_anywhere_and_images_nowhere() -> None:
    documents = [document(n, [700, "i", 900, "i", 80]) for n in range(50)]
    one = stream(lambda n: documents[n], "windows", sequence_length=1000)
    ids: dict[int, list[int]] = {}
    images: dict[int, int] = {}
    for _ in range(60):
        sequence = one.next_sequence()
        used = sum(span.length for span in sequence)
        assert used <= 1000
        assert used == 1000 or 1000 - used < IMAGE
        for span in sequence:
            assert span.length == span.begin + span.end + sum(s.length(IMAGE) for s in span.segments)
            ids.setdefault(span.n, []).extend(i for segment in span.segments for i in segment.ids)
            images[span.n] = images.get(span.n, 0) + span.images
    for n in range(25):
        assert ids[n] == [*range(700), *range(900), *range(80)]
        assert images[n] == 2


def test_long_documents_go_on_in_other_sequences() -> None:
    one = stream(lambda n: document(n, [500, "i"] * 12))
    segments = [
        (span.n, span.first_segment + i)
        for _ in range(40)
        for span in one.next_sequence()
        for i in range(len(span.segments))
    ]
    assert len(set(segments)) == len(segments)
    assert {i for n, i in segments if n == 0} == set(range(24))


@pytest.mark.parametrize(
    ("packing", "balance", "digest"),
    [
        ("best_fit", False, "56057b0c8ec46b69"),
        ("best_fit", True, "68f7b435d1a9ce8f"),
        ("windows", False, "479059e8f6537a03"),
        ("off", False, "42583b3708939b98"),
    ],
)
def test_packing_is_that_of_earlier_versions(packing: str, balance: bool, digest: str) -> None:
    """Computed at commit 02e64cf: saved positions would otherwise go on with other sequences."""

    def contents(n: int) -> list[int | str]:
        rng = random.Random(n)
        made: list[int | str] = [rng.randint(4, 90) for _ in range(rng.randint(3, 40))]
        for _ in range(rng.randint(1, 4)):
            made.insert(rng.randint(0, len(made)), "i")
        return made

    one = stream(lambda n: document(n, contents(n)), packing, balance_images=balance)
    packed = [
        [(s.n, s.first_segment, s.offset, s.begin, s.end, s.length) for s in one.next_sequence()] for _ in range(60)
    ]
    found = hashlib.sha256(repr((packed, one.state)).encode()).hexdigest()
    assert found[:16] == digest
