"""Which documents share a row: an exact best fit over a bounded set, in a reproducible order.

The oldest waiting document always comes first, so none waits for ever. Among all subsets of the others
the one that fills the row best is found by dynamic programming on the bits of one integer. A row that
is still not full enough takes the leading pieces of one more document, whose rest waits for a later row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcl_mcore.data.tokenized import Piece, TokenizedDocument


@dataclass(frozen=True)
class Chunk:
    """Consecutive pieces of one document that lie in one row and attend to each other only.

    n             the lane's number of the document
    piece, offset where in the document it begins: a piece, and a token of it (windows only)
    """

    n: int
    laid: TokenizedDocument
    pieces: tuple[Piece, ...]
    piece: int
    offset: int
    begin: bool
    end: bool
    size: int

    @property
    def images(self) -> int:
        """How many images it holds."""
        return sum(piece.image >= 0 for piece in self.pieces)

    @property
    def divisible(self) -> bool:
        """Whether it may be spread over rows: a image is never parted from its caption."""
        return len(self.pieces) > 1 and self.laid.document.kind != "pair"


def chunk_from(n: int, laid: TokenizedDocument, image_size: int, piece: int = 0, offset: int = 0) -> Chunk:
    """What is left of a document from a piece on (to its end)."""
    pieces = laid.pieces[piece:]
    if offset:
        pieces = (Piece(ids=pieces[0].ids[offset:]), *pieces[1:])
    begin = laid.begin and piece == 0 and offset == 0
    size = sum(p.size(image_size) for p in pieces) + begin + laid.end
    return Chunk(n, laid, pieces, piece, offset, begin, laid.end, size)


def divide(chunk: Chunk, room: int, image_size: int) -> tuple[Chunk, Chunk] | None:
    """Leading whole pieces that fit in `room` tokens, and the rest; None if no piece fits."""
    used = int(chunk.begin)
    count = 0
    for piece in chunk.pieces[:-1]:
        if used + piece.size(image_size) > room:
            break
        used += piece.size(image_size)
        count += 1
    if not count:
        return None
    head, tail = chunk.pieces[:count], chunk.pieces[count:]
    first = Chunk(chunk.n, chunk.laid, head, chunk.piece, chunk.offset, chunk.begin, False, used)
    rest_size = chunk.size - used
    rest = Chunk(chunk.n, chunk.laid, tail, chunk.piece + count, 0, False, chunk.end, rest_size)
    return first, rest


@dataclass(frozen=True)
class Packer:
    """Fills rows of `row_tokens` from waiting chunks."""

    row_tokens: int
    image_size: int
    min_fill: float = 0.98
    balance_images: bool = False

    def plan(
        self, waiting: Sequence[Chunk], keep: float = 1.25
    ) -> tuple[list[tuple[Chunk, ...]], list[Chunk]]:
        """Rows from the waiting chunks, until what waits is less than `keep` rows; and what waits then."""
        rest = list(waiting)
        rows = []
        total = sum(chunk.size for chunk in rest)
        while total >= keep * self.row_tokens:
            row, rest = self._fill(rest)
            rows.append(row)
            total -= sum(chunk.size for chunk in row)
        return rows, rest

    def _fill(self, waiting: list[Chunk]) -> tuple[tuple[Chunk, ...], list[Chunk]]:
        """One row that begins with the oldest chunk, and what still waits."""
        oldest, others = waiting[0], waiting[1:]
        rest: list[Chunk] = []
        if oldest.size > self.row_tokens:
            divided = divide(oldest, self.row_tokens, self.image_size)
            if divided is None:
                raise AssertionError("a piece is longer than a row")
            oldest, remainder = divided
            rest.append(remainder)
        room = self.row_tokens - oldest.size
        wanted = None
        if self.balance_images:
            images = sum(chunk.images for chunk in waiting)
            tokens = sum(chunk.size for chunk in waiting)
            wanted = max(0.0, images * self.row_tokens / tokens - oldest.images)
        chosen = set(best_subset(others, room, wanted, room - self.row_tokens // 10))
        row = [oldest] + [chunk for i, chunk in enumerate(others) if i in chosen]
        rest += [chunk for i, chunk in enumerate(others) if i not in chosen]
        room = self.row_tokens - sum(chunk.size for chunk in row)
        if room > (1 - self.min_fill) * self.row_tokens and self.min_fill > 0:
            self._top_up(row, rest, room)
        return tuple(row), rest

    def _top_up(self, row: list[Chunk], rest: list[Chunk], room: int) -> None:
        """Add the leading pieces of the waiting chunk whose pieces use the room best."""
        taken = {chunk.n for chunk in row}
        best: tuple[int, int, Chunk, Chunk] | None = None
        for i, chunk in enumerate(rest):
            if not chunk.divisible or chunk.n in taken:
                continue
            divided = divide(chunk, room, self.image_size)
            if divided and (best is None or divided[0].size > best[0]):
                best = (divided[0].size, i, *divided)
        if best:
            _, i, head, tail = best
            row.append(head)
            rest[i] = tail


def best_subset(chunks: Sequence[Chunk], room: int, wanted_images: float | None, enough: int) -> list[int]:
    """Indices of the subset with the largest total size that is at most `room`; older chunks preferred.

    With `wanted_images`, the subset of at least `enough` tokens whose number of images is nearest it.
    """
    if room <= 0 or not chunks:
        return []
    # Bit `images * lane + tokens` of `reachable` says that such a subset exists. A lane is wide enough
    # that adding one chunk never spills into the next; `valid` then clears what exceeds the room.
    lane = 2 * (room + 1)
    count = _image_counter(wanted_images)
    lanes = sum(count(chunk) for chunk in chunks) + 1
    valid = sum(((1 << (room + 1)) - 1) << (lane * i) for i in range(lanes))
    history = [1]
    for chunk in chunks:
        before = history[-1]
        shift = count(chunk) * lane + chunk.size
        history.append(before if chunk.size > room else before | (before << shift & valid))
    target = _best_bit(history[-1], lane, lanes, room, wanted_images, enough)
    chosen = []
    for i in reversed(range(len(chunks))):
        if not history[i] >> target & 1:
            chosen.append(i)
            target -= count(chunks[i]) * lane + chunks[i].size
    return chosen[::-1]


def _image_counter(wanted_images: float | None) -> Callable[[Chunk], int]:
    return (lambda chunk: 0) if wanted_images is None else (lambda chunk: chunk.images)


def _best_bit(reachable: int, lane: int, lanes: int, room: int, wanted: float | None, enough: int) -> int:
    """The bit of the best subset: nearest the wanted images if full enough, else the fullest."""
    row = (1 << (room + 1)) - 1
    fullest = [((reachable >> (lane * images)) & row).bit_length() - 1 for images in range(lanes)]
    candidates = [images for images in range(lanes) if fullest[images] >= max(enough, 0)]
    if wanted is not None and candidates:
        images = min(candidates, key=lambda c: (abs(c - wanted), -fullest[c]))
    else:
        images = max(range(lanes), key=lambda c: (fullest[c], -c))
    return images * lane + fullest[images]
