"""Rows: exact best fit, whole pieces, full on real proportions, and a state of few integers."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from lcl_mcore.data.dataset import Members
from lcl_mcore.data.document import Document, ImageEntry
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import Packer, best_subset, chunk_from
from lcl_mcore.data.sample_stream import SampleStream, StreamState
from lcl_mcore.data.tokenized import Piece, TokenizedDocument

IMAGE = 198


def laid(
    n: int, pieces: list[int | str], *, kind: str = "matched", may_split: bool = False
) -> TokenizedDocument:
    """A document of texts (token counts) and images ("i")."""
    images = tuple(ImageEntry("0.jpg", 9, 9, "jpg", "0" * 64, 9) for p in pieces if p == "i")
    made, seen = [], 0
    for p in pieces:
        made.append(Piece(image=seen) if p == "i" else Piece(ids=tuple(range(int(p)))))
        seen += p == "i"
    stored = Document(f"d{n}", kind, (), images)  # type: ignore[arg-type]
    return TokenizedDocument(
        SampleIndex(0, 0, n), "s", stored, Members("x.tar", ()), tuple(made), may_split=may_split
    )


def lane(documents, packing: str = "best_fit", state: StreamState | None = None, **options) -> SampleStream:
    packer = Packer(options.pop("tokens", 2048), IMAGE, **options)
    return SampleStream(documents, packer, packing=packing, block_rows=8, state=state or StreamState())  # type: ignore[arg-type]


def test_best_subset_is_exact() -> None:
    rng = random.Random(1)
    for _ in range(60):
        sizes = [rng.randint(3, 60) for _ in range(9)]
        chunks = [chunk_from(i, laid(i, [size - 2]), IMAGE) for i, size in enumerate(sizes)]
        room = rng.randint(10, 200)
        best = max(s for k in range(10) for c in itertools.combinations(sizes, k) if (s := sum(c)) <= room)
        assert sum(sizes[i] for i in best_subset(chunks, room, None, 0)) == best


def mixed(rng: random.Random) -> list[int | str]:
    """Sentences and up to three images, in all shorter than a row (as MMC4 documents are)."""
    pieces: list[int | str] = [max(4, int(rng.lognormvariate(3.1, 0.5))) for _ in range(rng.randint(3, 30))]
    for _ in range(rng.randint(1, 3)):
        pieces.insert(rng.randint(0, len(pieces)), "i")
    return pieces


@pytest.mark.parametrize("balance", [False, True])
def test_fill_is_above_97_percent_and_nothing_is_lost(balance: bool) -> None:
    documents = [laid(n, mixed(random.Random(n))) for n in range(3000)]
    one = lane(lambda n: documents[n], balance_images=balance)
    rows = [one.next_sequence() for _ in range(300)]
    used = np.array([sum(chunk.size for chunk in row) for row in rows])
    assert used.max() <= 2048
    assert used.mean() / 2048 > 0.98
    pieces = [(chunk.n, chunk.piece + i) for row in rows for chunk in row for i in range(len(chunk.pieces))]
    assert len(set(pieces)) == len(pieces)
    oldest_waiting = min(set(range(3000)) - {n for n, _ in pieces})
    complete = {(n, i) for n in range(oldest_waiting) for i in range(len(documents[n].pieces))}
    assert len(complete - set(pieces)) < 200  # rests of the documents that wait to go on
    assert len(one.state.to_list()) < 40


def test_balancing_evens_the_images_out() -> None:
    spread = []
    for balance in (False, True):
        one = lane(lambda n: laid(n, mixed(random.Random(n))), balance_images=balance)
        spread.append(np.std([sum(chunk.images for chunk in one.next_sequence()) for _ in range(200)]))
    assert spread[1] < 0.75 * spread[0]


def test_pairs_fill_rows_and_are_never_divided() -> None:
    def pair(n: int) -> TokenizedDocument:
        return laid(n, [random.Random(n).randint(5, 60), "i"], kind="pair")

    one = lane(pair)
    rows = [one.next_sequence() for _ in range(200)]
    assert all(len(chunk.pieces) == 2 for row in rows for chunk in row)
    assert sum(chunk.size for row in rows for chunk in row) / (200 * 2048) > 0.98


@pytest.mark.parametrize("packing", ["best_fit", "windows", "off"])
def test_a_lane_goes_on_from_its_state(packing: str) -> None:
    def source(n: int) -> TokenizedDocument | None:
        rng = random.Random(n)
        return None if rng.random() < 0.2 else laid(n, mixed(rng) * rng.randint(1, 4), may_split=True)

    one = lane(source, packing)
    for _ in range(37):
        state = StreamState.from_list(json.loads(json.dumps(one.state.to_list())))
        wanted = one.next_sequence()
        assert lane(source, packing, state).next_sequence() == wanted


def test_windows_cut_texts_anywhere_and_images_nowhere() -> None:
    documents = [laid(n, [700, "i", 900, "i", 80], may_split=True) for n in range(50)]
    one = lane(lambda n: documents[n], "windows", tokens=1000)
    ids: dict[int, list[int]] = {}
    images: dict[int, int] = {}
    for _ in range(60):
        row = one.next_sequence()
        used = sum(chunk.size for chunk in row)
        assert used <= 1000
        assert used == 1000 or 1000 - used < IMAGE
        for chunk in row:
            assert chunk.size == chunk.begin + chunk.end + sum(p.size(IMAGE) for p in chunk.pieces)
            ids.setdefault(chunk.n, []).extend(i for piece in chunk.pieces for i in piece.ids)
            images[chunk.n] = images.get(chunk.n, 0) + chunk.images
    for n in range(25):
        assert ids[n] == [*range(700), *range(900), *range(80)]
        assert images[n] == 2


def test_long_documents_go_on_in_other_rows() -> None:
    one = lane(lambda n: laid(n, [500, "i"] * 12, may_split=True))
    pieces = [
        (chunk.n, chunk.piece + i)
        for _ in range(40)
        for chunk in one.next_sequence()
        for i in range(len(chunk.pieces))
    ]
    assert len(set(pieces)) == len(pieces)
    assert {i for n, i in pieces if n == 0} == set(range(24))
