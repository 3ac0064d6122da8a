"""Which documents share a sequence: sample streams that pack their own documents, in a reproducible order.

A sample stream is the endless succession of packed sequences at one place of the global batch. `best_fit` packs block
by block. The oldest waiting document always comes first, so none waits for ever; among all subsets of the others the
one that fills the sequence best is found by dynamic programming on the bits of one integer. A sequence that is still
not full enough takes the leading segments of one more document, whose rest waits for a later sequence; `whole` never
does that. `windows` puts documents end to end and cuts them every sequence; `off` gives every document a sequence of
its own. Where sources differ in packing, each packing reads its own documents of the stream, and the one that has read
least far gives the next sequence, so that documents come as often as the mixture says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

from lcl_mcore.config.schema import DataConfig, Packing
from lcl_mcore.data.tokenized import MARKERS_PER_IMAGE, Segment, TokenizedDocument
from lcl_mcore.errors import DataError, explain

MAX_UNUSED_SAMPLES = 10_000


@dataclass(frozen=True)
class Span:
    """Consecutive segments of one document that lie in one sequence and attend to each other only.

    Attributes:
        n: the sample stream's number of the document.
        first_segment, offset: where in the document it begins: a segment, and a token of it (windows only).
        begin, end: whether the begin and the end token belong to it.
        length: tokens it takes.
    """

    n: int
    document: TokenizedDocument
    segments: tuple[Segment, ...]
    first_segment: int
    offset: int
    begin: bool
    end: bool
    length: int

    @cached_property
    def images(self) -> int:
        """How many images it holds."""
        return sum(segment.image >= 0 for segment in self.segments)

    @property
    def divisible(self) -> bool:
        """Whether it may be spread over sequences: an image is never parted from its caption."""
        return len(self.segments) > 1 and self.document.stored.kind != "pair"


PackedSequence = tuple[Span, ...]


def span_from(n: int, document: TokenizedDocument, image_length: int, first_segment: int = 0, offset: int = 0) -> Span:
    """What is left of a document from a segment on (to its end); `image_length` is that of an image with markers."""
    segments = document.segments[first_segment:]
    if offset:
        segments = (Segment(ids=segments[0].ids[offset:]), *segments[1:])
    begin = document.begin and first_segment == 0 and offset == 0
    length = sum(segment.length(image_length) for segment in segments) + begin + document.end
    return Span(n, document, segments, first_segment, offset, begin, document.end, length)


def divide(span: Span, room: int, image_length: int) -> tuple[Span, Span] | None:
    """Leading whole segments that fit in `room` tokens, and the rest; None if no segment fits."""
    used = int(span.begin)
    count = 0
    for segment in span.segments[:-1]:
        if used + segment.length(image_length) > room:
            break
        used += segment.length(image_length)
        count += 1
    if not count:
        return None
    head, tail = span.segments[:count], span.segments[count:]
    first = Span(span.n, span.document, head, span.first_segment, span.offset, span.begin, False, used)
    rest_length = span.length - used
    rest = Span(span.n, span.document, tail, span.first_segment + count, 0, False, span.end, rest_length)
    return first, rest


def cut_window(span: Span, room: int, image_length: int) -> tuple[Span, tuple[tuple[int, int, int], ...]]:
    """The part of a span that fits in `room` tokens, and where its rest begins (empty if there is none)."""
    left = room - span.begin
    taken: list[Segment] = []
    for i, segment in enumerate(span.segments):
        if segment.length(image_length) <= left:
            taken.append(segment)
            left -= segment.length(image_length)
            continue
        offset = span.offset if i == 0 else 0
        if segment.image < 0 and left > 0:
            taken.append(Segment(ids=segment.ids[:left]))
            offset, left = offset + left, 0
        head = Span(
            span.n, span.document, tuple(taken), span.first_segment, span.offset, span.begin, False, room - left
        )
        return head, ((span.n, span.first_segment + i, offset),)
    end = span.end and left > 0
    length = room - left + end
    head = Span(span.n, span.document, tuple(taken), span.first_segment, span.offset, span.begin, end, length)
    return head, ()


@dataclass(frozen=True)
class BestFitPacker:
    """Fills sequences from waiting spans.

    Attributes:
        sequence_length: tokens of a sequence.
        image_length: tokens of an image with its markers.
        min_fill: share of a sequence below which a waiting document is divided to fill it (0: never).
        balance_images: prefer the choice whose number of images is nearest the average.
    """

    sequence_length: int
    image_length: int
    min_fill: float = 0.98
    balance_images: bool = False

    def pack(self, waiting: Sequence[Span], keep: float = 1.25) -> tuple[list[PackedSequence], list[Span]]:
        """Sequences from the waiting spans, until what waits is less than `keep` sequences; and what waits then."""
        rest = list(waiting)
        sequences = []
        total = sum(span.length for span in rest)
        while total >= keep * self.sequence_length:
            sequence, rest = self._fill(rest)
            sequences.append(sequence)
            total -= sum(span.length for span in sequence)
        return sequences, rest

    def _fill(self, waiting: list[Span]) -> tuple[PackedSequence, list[Span]]:
        """One sequence that begins with the oldest span, and what still waits."""
        oldest, others = waiting[0], waiting[1:]
        rest: list[Span] = []
        if oldest.length > self.sequence_length:
            divided = divide(oldest, self.sequence_length, self.image_length)
            if divided is None:
                raise AssertionError("a segment is longer than a sequence")
            oldest, remainder = divided
            rest.append(remainder)
        room = self.sequence_length - oldest.length
        wanted = None
        if self.balance_images:
            images = sum(span.images for span in waiting)
            tokens = sum(span.length for span in waiting)
            wanted = max(0.0, images * self.sequence_length / tokens - oldest.images)
        chosen = set(best_subset(others, room, wanted, room - self.sequence_length // 10))
        sequence = [oldest] + [span for i, span in enumerate(others) if i in chosen]
        rest += [span for i, span in enumerate(others) if i not in chosen]
        room = self.sequence_length - sum(span.length for span in sequence)
        if room > (1 - self.min_fill) * self.sequence_length and self.min_fill > 0:
            self._top_up(sequence, rest, room)
        return tuple(sequence), rest

    def _top_up(self, sequence: list[Span], rest: list[Span], room: int) -> None:
        """Add the leading segments of the waiting span whose segments use the room best."""
        taken = {span.n for span in sequence}
        best: tuple[int, int, Span, Span] | None = None
        for i, span in enumerate(rest):
            if not span.divisible or span.n in taken:
                continue
            divided = divide(span, room, self.image_length)
            if divided and (best is None or divided[0].length > best[0]):
                best = (divided[0].length, i, *divided)
        if best:
            _, i, head, tail = best
            sequence.append(head)
            rest[i] = tail


def best_subset(spans: Sequence[Span], room: int, wanted_images: float | None, enough: int) -> list[int]:
    """Indices of the subset with the largest total length that is at most `room`; older spans preferred.

    With `wanted_images`, the subset of at least `enough` tokens whose number of images is nearest it.
    """
    if room <= 0 or not spans:
        return []
    # Bit `images * stride + tokens` of `reachable` says that such a subset exists. The stride is wide enough
    # that adding one span never spills into the next number of images; `valid` then clears what exceeds the room.
    stride = 2 * (room + 1)
    images = [0 if wanted_images is None else span.images for span in spans]
    # No subset has more images than fit in the room, however many wait: so the work grows with the spans alone.
    densest = max(count * room // span.length for count, span in zip(images, spans, strict=True))
    image_counts = min(sum(images), densest) + 1
    valid = sum(((1 << (room + 1)) - 1) << (stride * i) for i in range(image_counts))
    history = [1]
    for count, span in zip(images, spans, strict=True):
        before = history[-1]
        shift = count * stride + span.length
        history.append(before if span.length > room else before | (before << shift & valid))
    target = _best_bit(history[-1], stride, image_counts, room, wanted_images, enough)
    chosen = []
    for i in reversed(range(len(spans))):
        if not history[i] >> target & 1:
            chosen.append(i)
            target -= images[i] * stride + spans[i].length
    return chosen[::-1]


def _best_bit(reachable: int, stride: int, image_counts: int, room: int, wanted: float | None, enough: int) -> int:
    """The bit of the best subset: nearest the wanted images if full enough, else the fullest."""
    mask = (1 << (room + 1)) - 1
    fullest = [((reachable >> (stride * images)) & mask).bit_length() - 1 for images in range(image_counts)]
    candidates = [images for images in range(image_counts) if fullest[images] >= max(enough, 0)]
    if wanted is not None and candidates:
        images = min(candidates, key=lambda c: (abs(c - wanted), -fullest[c]))
    else:
        images = max(range(image_counts), key=lambda c: (fullest[c], -c))
    return images * stride + fullest[images]


@dataclass(frozen=True)
class StreamState:
    """Where a sample stream stands, in a few integers.

    Attributes:
        next_sample: number of the next document that it reads.
        taken: sequences taken of the current block.
        carry: documents carried into the block: (number, segment, token offset) where the unused part begins.
    """

    next_sample: int = 0
    taken: int = 0
    carry: tuple[tuple[int, int, int], ...] = ()

    def to_list(self) -> list[int]:
        """Plain integers."""
        return [self.next_sample, self.taken, *(value for item in self.carry for value in item)]

    @staticmethod
    def from_list(values: Sequence[int]) -> StreamState:
        """The inverse of `to_list`.

        Raises:
            DataError: no state has this many integers.
        """
        if len(values) < 2 or (len(values) - 2) % 3:
            raise DataError(explain(f"sample stream state {list(values)}", "is damaged", "Use an older checkpoint."))
        carry = tuple(zip(values[2::3], values[3::3], values[4::3], strict=True))
        return StreamState(values[0], values[1], carry)


class StreamDocuments(Protocol):
    """The documents of one sample stream, by their number in it."""

    @property
    def packings(self) -> Sequence[Packing]:
        """What its sources ask for, each once."""

    def packing(self, n: int) -> Packing:
        """That of document `n`."""

    def document(self, n: int) -> TokenizedDocument | None:
        """Tokenized; None if nothing of it is used."""


class SampleStream:
    """Packed sequences from the documents of one stream.

    Args:
        config: what belongs to packing.
        documents: of this stream.
        tokens_per_image: LM positions of an image without its markers.
        state: where to begin, as `state` was before; none: at the beginning.
    """

    def __init__(
        self, config: DataConfig, documents: StreamDocuments, tokens_per_image: int, state: Sequence[int] = ()
    ) -> None:
        packings = documents.packings
        states = _states(state, len(packings)) if state else [StreamState()] * len(packings)
        self._streams = [
            PackingStream(config, packing, documents, tokens_per_image, state)
            for packing, state in zip(packings, states, strict=True)
        ]

    @property
    def state(self) -> list[int]:
        """After the last sequence that was taken; a new stream from it goes on with the next one."""
        states = [stream.state.to_list() for stream in self._streams]
        return states[0] if len(states) == 1 else [value for state in states for value in (len(state), *state)]

    def next_sequence(self) -> PackedSequence:
        """The spans of the next sequence."""
        return min(self._streams, key=lambda stream: stream.progress).next_sequence()


def _states(values: Sequence[int], count: int) -> list[StreamState]:
    """One state for each of `count` packings."""
    if count == 1:
        return [StreamState.from_list(values)]
    states, rest = [], list(values)
    for _ in range(count):
        length = rest[0] if rest else 0
        states.append(StreamState.from_list(rest[1 : length + 1]))
        rest = rest[length + 1 :]
    if rest:
        raise DataError(explain(f"sample stream state {list(values)}", "is damaged", "Use an older checkpoint."))
    return states


class PackingStream:
    """Reads the documents of one packing and packs them, block by block.

    A block is a pure function of the state before it.
    """

    def __init__(
        self,
        config: DataConfig,
        packing: Packing,
        documents: StreamDocuments,
        tokens_per_image: int,
        state: StreamState,
    ) -> None:
        self._packing = packing
        self._documents = documents
        min_fill = 0.0 if packing == "whole" else config.min_fill
        image_length = tokens_per_image + MARKERS_PER_IMAGE
        self._packer = BestFitPacker(config.sequence_length, image_length, min_fill, config.balance_images)
        blocks: dict[Packing, Callable[[StreamState], tuple[list[PackedSequence], StreamState]]] = {
            "best_fit": self._best_fit,
            "whole": self._best_fit,
            "windows": self._window,
            "off": self._single,
        }
        self._next_block = blocks[packing]
        self._block_tokens = config.packing_buffer * config.sequence_length
        self._start = state
        self._block: list[PackedSequence] | None = None
        self._after = state
        self._taken = state.taken
        self._read_documents: dict[int, TokenizedDocument] = {}

    @property
    def state(self) -> StreamState:
        """After the last sequence that was taken; a new stream from it goes on with the next one."""
        return StreamState(self._start.next_sample, self._taken, self._start.carry)

    @property
    def progress(self) -> Fraction:
        """How many documents of the sample stream it has gone through; those of a block in equal parts."""
        if not self._taken:
            return Fraction(self._start.next_sample)
        sequences = len(self._read_block())
        read = self._after.next_sample - self._start.next_sample
        return self._start.next_sample + Fraction(self._taken * read, sequences)

    def next_sequence(self) -> PackedSequence:
        """The spans of the next sequence."""
        block = self._read_block()
        sequence = block[self._taken]
        self._taken += 1
        if self._taken == len(block):
            self._start, self._taken, self._block = self._after, 0, None
        return sequence

    def _read_block(self) -> list[PackedSequence]:
        if self._block is None:
            self._block, self._after = self._next_block(self._start)
            # what is carried into the next block need not be read again for it
            self._read_documents = {n: self._read_documents[n] for n, _, _ in self._after.carry}
        return self._block

    def _best_fit(self, state: StreamState) -> tuple[list[PackedSequence], StreamState]:
        """Sequences from the carried documents and as many new ones as make a block."""
        waiting = [self._carried(*item) for item in state.carry]
        next_sample = state.next_sample
        total = sum(span.length for span in waiting)
        while total < self._block_tokens:
            span, next_sample = self._read(next_sample)
            waiting.append(span)
            total += span.length
        sequences, rest = self._packer.pack(waiting)
        return sequences, StreamState(next_sample, 0, _carry(rest))

    def _single(self, state: StreamState) -> tuple[list[PackedSequence], StreamState]:
        """One document per sequence; what exceeds the sequence of a document that goes on makes the next."""
        if state.carry:
            span, next_sample = self._carried(*state.carry[0]), state.next_sample
        else:
            span, next_sample = self._read(state.next_sample)
        if span.length <= self._packer.sequence_length:
            return [(span,)], StreamState(next_sample)
        sequences, rest = self._packer.pack([span], keep=1.0)
        return sequences, StreamState(next_sample, 0, _carry(rest))

    def _window(self, state: StreamState) -> tuple[list[PackedSequence], StreamState]:
        """The next `sequence_length` tokens of the documents put end to end; images are never cut."""
        room = self._packer.sequence_length
        sequence: list[Span] = []
        next_sample, carry = state.next_sample, state.carry
        while room > 1:
            if carry:
                span = self._carried(*carry[0])
            else:
                span, next_sample = self._read(next_sample)
            head, carry = cut_window(span, room, self._packer.image_length)
            if head.segments:
                sequence.append(head)
                room -= head.length
            if carry:
                break
        return [tuple(sequence)], StreamState(next_sample, 0, carry)

    def _carried(self, n: int, first_segment: int, offset: int) -> Span:
        document = self._document(n)
        if document is None or first_segment >= len(document.segments):
            raise DataError(
                explain(f"saved document {n}", "has other content now", "Use the data set of the saved run.")
            )
        return span_from(n, document, self._packer.image_length, first_segment, offset)

    def _document(self, n: int) -> TokenizedDocument | None:
        document = self._read_documents.get(n) or self._documents.document(n)
        if document is not None:
            self._read_documents[n] = document
        return document

    def _read(self, next_sample: int) -> tuple[Span, int]:
        """The next document of this packing that is used, and the number after it."""
        own = (n for n in itertools.count(next_sample) if self._documents.packing(n) == self._packing)
        for n in itertools.islice(own, MAX_UNUSED_SAMPLES):
            document = self._document(n)
            if document is not None:
                return span_from(n, document, self._packer.image_length), n + 1
        rule = "not one of them is used under the settings of its source"
        remedy = "Lower min_images or min_similarity, or lengthen the sequence."
        raise DataError(explain(f"{MAX_UNUSED_SAMPLES} documents one after the other", rule, remedy))


def _carry(spans: Sequence[Span]) -> tuple[tuple[int, int, int], ...]:
    return tuple((span.n, span.first_segment, span.offset) for span in spans)
