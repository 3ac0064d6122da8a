"""A lane: the endless sequence of rows at one place of the global batch, with a state of few integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lcl_mcore.data.packing import Chunk, Packer, chunk_from
from lcl_mcore.data.tokenized import Piece, TokenizedDocument
from lcl_mcore.errors import DataError, explain

Row = tuple[Chunk, ...]
Source = Callable[[int], TokenizedDocument | None]  # number of the draw -> document, None if nothing is used
MAX_EMPTY_DRAWS = 10_000


@dataclass(frozen=True)
class StreamState:
    """Where a lane stands: the next draw, rows taken of the current block, documents carried into it.

    A carried document is (number of its draw, piece, token offset) where its unused part begins.
    """

    draw: int = 0
    rows: int = 0
    carry: tuple[tuple[int, int, int], ...] = ()

    def to_list(self) -> list[int]:
        """Plain integers."""
        return [self.draw, self.rows, *(value for item in self.carry for value in item)]

    @staticmethod
    def from_list(values: Sequence[int]) -> StreamState:
        """The inverse of `to_list`."""
        if len(values) < 2 or (len(values) - 2) % 3:
            raise DataError(explain(f"lane state {list(values)}", "is damaged", "Use an older checkpoint."))
        carry = tuple(zip(values[2::3], values[3::3], values[4::3], strict=True))
        return StreamState(values[0], values[1], carry)


class SampleStream:
    """Draws documents and packs them, block by block. A block is a pure function of the state before it."""

    def __init__(
        self,
        source: Source,
        packer: Packer,
        *,
        packing: Literal["best_fit", "windows", "off"],
        block_rows: int,
        state: StreamState,
    ) -> None:
        self._source = source
        self._packer = packer
        self._plan_block = {"best_fit": self._best_fit, "windows": self._window, "off": self._single}[packing]
        self._block_tokens = block_rows * packer.row_tokens
        self._start = state
        self._rows: list[Row] | None = None
        self._after = state
        self._taken = state.rows

    @property
    def state(self) -> StreamState:
        """After the last row that was taken; a new lane from it goes on with the next row."""
        return StreamState(self._start.draw, self._taken, self._start.carry)

    def next_sequence(self) -> Row:
        """The chunks of the next row."""
        if self._rows is None:
            self._rows, self._after = self._plan_block(self._start)
        row = self._rows[self._taken]
        self._taken += 1
        if self._taken == len(self._rows):
            self._start, self._taken, self._rows = self._after, 0, None
        return row

    def _best_fit(self, state: StreamState) -> tuple[list[Row], StreamState]:
        """Rows from the carried documents and as many new ones as make a block."""
        waiting = [self._chunk(*item) for item in state.carry]
        draw = state.draw
        total = sum(chunk.size for chunk in waiting)
        while total < self._block_tokens:
            chunk, draw = self._draw(draw)
            waiting.append(chunk)
            total += chunk.size
        rows, rest = self._packer.plan(waiting)
        return rows, StreamState(draw, 0, tuple((chunk.n, chunk.piece, chunk.offset) for chunk in rest))

    def _single(self, state: StreamState) -> tuple[list[Row], StreamState]:
        """One document per row; what exceeds the row of a document that may be split makes the next."""
        if state.carry:
            chunk, draw = self._chunk(*state.carry[0]), state.draw
        else:
            chunk, draw = self._draw(state.draw)
        if chunk.size <= self._packer.row_tokens:
            return [(chunk,)], StreamState(draw)
        rows, rest = self._packer.plan([chunk], keep=1.0)
        return rows, StreamState(draw, 0, tuple((item.n, item.piece, item.offset) for item in rest))

    def _window(self, state: StreamState) -> tuple[list[Row], StreamState]:
        """The next `row_tokens` tokens of the documents laid end to end; images are never cut."""
        room = self._packer.row_tokens
        row: list[Chunk] = []
        draw, carry = state.draw, state.carry
        while room > 1:
            if carry:
                chunk = self._chunk(*carry[0])
            else:
                chunk, draw = self._draw(draw)
            head, rest = _cut_window(chunk, room, self._packer.image_size)
            carry = rest
            if head.pieces:
                row.append(head)
                room -= head.size
            if rest:
                break
        return [tuple(row)], StreamState(draw, 0, carry)

    def _chunk(self, n: int, piece: int, offset: int) -> Chunk:
        laid = self._source(n)
        if laid is None or piece >= len(laid.pieces):
            raise DataError(
                explain(f"saved document {n}", "has other content now", "Use the data set of the saved run.")
            )
        return chunk_from(n, laid, self._packer.image_size, piece, offset)

    def _draw(self, draw: int) -> tuple[Chunk, int]:
        """The next document that is used, and the draw after it."""
        for n in range(draw, draw + MAX_EMPTY_DRAWS):
            laid = self._source(n)
            if laid is not None:
                return chunk_from(n, laid, self._packer.image_size), n + 1
        rule = "not one of them is used under the settings of its source"
        remedy = "Lower min_images or min_similarity, or lengthen the row."
        raise DataError(explain(f"{MAX_EMPTY_DRAWS} documents in a row", rule, remedy))


def _cut_window(chunk: Chunk, room: int, image_size: int) -> tuple[Chunk, tuple[tuple[int, int, int], ...]]:
    """The part of a chunk that fits in `room`, and where its rest begins (empty if there is none)."""
    left = room - chunk.begin
    taken: list[Piece] = []
    for i, piece in enumerate(chunk.pieces):
        if piece.size(image_size) <= left:
            taken.append(piece)
            left -= piece.size(image_size)
            continue
        offset = chunk.offset if i == 0 else 0
        if piece.image < 0 and left > 0:
            taken.append(Piece(ids=piece.ids[:left]))
            offset, left = offset + left, 0
        size = room - left
        head = Chunk(chunk.n, chunk.laid, tuple(taken), chunk.piece, chunk.offset, chunk.begin, False, size)
        return head, ((chunk.n, chunk.piece + i, offset),)
    end = chunk.end and left > 0
    size = room - left + end
    head = Chunk(chunk.n, chunk.laid, tuple(taken), chunk.piece, chunk.offset, chunk.begin, end, size)
    return head, ()
