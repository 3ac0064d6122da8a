"""From a stored document to its segments in reading order: which texts, which images, and where.

Happens before any pixel is decoded, because an image always takes the same number of tokens. Every
choice is keyed by seed, epoch, source, document and image, so it does not depend on who makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lcl_mcore.config.schema import SourceConfig
from lcl_mcore.data.format import Document, Members
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.rng import KeyedRandom, key63

MARKERS_PER_IMAGE = 2  # <BoI> and <EoI>
BEGIN_AND_END = 2


@dataclass(frozen=True)
class Segment:
    """What best-fit packing never divides: the ids of one text, or one image (its number in the document)."""

    ids: tuple[int, ...] = ()
    image: int = -1

    def length(self, image_length: int) -> int:
        """Tokens it takes in a sequence, where an image with its markers takes `image_length`."""
        return len(self.ids) if self.image < 0 else image_length


@dataclass(frozen=True)
class TokenizedDocument:
    """A document ready to be packed: `segments` between an optional begin and an optional end token.

    Attributes:
        sample: which document of the mixture it is, and in which epoch.
        source: label of its data set.
        stored: the document as it is stored.
        members: where its images lie.
    """

    sample: SampleIndex
    source: str
    stored: Document
    members: Members
    segments: tuple[Segment, ...]
    begin: bool = True
    end: bool = True

    @property
    def name(self) -> str:
        """`source/shard/key`, for the order hash and for messages."""
        return f"{self.source}/{self.members.shard}/{self.stored.key}"

    @property
    def group(self) -> int:
        """The same for all images of this document."""
        return key63("document", self.source, self.sample.index)


PlacedSegment = tuple[int, Segment]
"""A segment with the text that it is of, or that its image belongs to; or NO_TEXT."""
NO_TEXT = -1


class DocumentTokenizer:
    """Tokenizes the documents of one source by its rules."""

    def __init__(
        self, source: SourceConfig, tokenizer: Tokenizer, *, tokens_per_image: int, sequence_length: int, seed: int
    ) -> None:
        self.source = source
        self.label = source.label
        self._tokenizer = tokenizer
        self._image_length = tokens_per_image + MARKERS_PER_IMAGE
        self._sequence_length = sequence_length
        self._seed = seed

    def tokenize(
        self, sample: SampleIndex, stored: Document, members: Members, *, first_caption: bool = False
    ) -> TokenizedDocument | None:
        """The document's segments, or None if nothing of it is used.

        A pair takes one of its captions at random, or its first one.
        """
        if stored.kind == "pair" and first_caption:
            stored = replace(stored, texts=stored.texts[:1])
        # "layout" is the name that these choices have been keyed by in every saved run
        random = KeyedRandom(self._seed, "layout", sample.epoch, self.label, sample.index)
        images = self._choose_images(stored, random)
        if len(images) < self.source.min_images:
            return None
        document = TokenizedDocument(sample, self.label, stored, members, ())
        if stored.kind == "pair":
            return self._pair(document, images, random)
        placed = self._interleave(stored, images, random)
        cut_rule = None if self._goes_on(stored) else self.source.cut_rule
        if cut_rule == "segments":
            placed = self._cut_segments(placed)
        document = replace(document, segments=tuple(segment for _, segment in placed))
        if cut_rule == "tokens":
            document = self._cut_tokens(document)
        left = sum(segment.image >= 0 for segment in document.segments)
        return document if document.segments and left >= self.source.min_images else None

    def _goes_on(self, stored: Document) -> bool:
        """Whether what exceeds a sequence is kept for another one."""
        long = self.source.long_documents
        return long == "split" or (long == "auto" and stored.kind == "sequence" and self.source.packing != "whole")

    def _choose_images(self, stored: Document, random: KeyedRandom) -> list[int]:
        """Numbers of the images that are used, in document order."""
        images = [
            (image.text_index, number)
            for number, image in enumerate(stored.images)
            if stored.kind != "matched" or image.similarity >= self.source.min_similarity
        ]
        images.sort()
        if self.source.one_image_per_text and stored.kind == "matched":
            images = _one_of_each(images, random)
        limit = self.source.max_images
        if len(images) > limit and self.source.image_choice == "random":
            images = [images[i] for i in random.sample(len(images), limit)]
        return [number for _, number in images[:limit]]

    def _interleave(self, stored: Document, images: Sequence[int], random: KeyedRandom) -> list[PlacedSegment]:
        """Texts and images of a document of kind `matched` or `sequence`, in reading order."""
        before: dict[int, list[int]] = {}  # text index -> images that stand before this text
        for number in images:
            place = stored.images[number].text_index
            if stored.kind == "matched" and random.uniform() >= self.source.image_first_probability:
                place += 1
            before.setdefault(place, []).append(number)
        if stored.kind == "matched" and self.source.cut_rule == "tokens" and self._tokenizer.cleaning == "released":
            return self._interleave_as_released(stored, before)
        encoded = self._tokenizer.encode_batch(_with_leading_space([self._stripped(text) for text in stored.texts]))
        segments: list[PlacedSegment] = []
        for place in range(len(encoded) + 1):
            for number in before.get(place, ()):
                text = stored.images[number].text_index if stored.kind == "matched" else NO_TEXT
                segments.append((text, Segment(image=number)))
            if place < len(encoded) and encoded[place]:
                segments += [(place, segment) for segment in self._text_segments(encoded[place])]
        return segments

    def _interleave_as_released(self, stored: Document, before: dict[int, list[int]]) -> list[PlacedSegment]:
        """The document as one text with images in it, which is cleaned as a whole; cut anywhere, it needs no others."""
        sentences = list(stored.texts)
        for place, numbers in before.items():
            for number in numbers:
                own = stored.images[number].text_index
                sentences[own] = f" \0 {sentences[own]}" if place == own else f"{sentences[own]} \0 "
        texts = self._tokenizer.encode_parts(" ".join(sentences).split("\0"))
        images = [number for place in sorted(before) for number in before[place]]
        segments = [Segment(ids=tuple(texts[0]))]
        for number, text in zip(images, texts[1:], strict=True):
            segments += [Segment(image=number), Segment(ids=tuple(text))]
        return [(NO_TEXT, segment) for segment in segments if segment.image >= 0 or segment.ids]

    def _stripped(self, text: str) -> str:
        """Without outer white space; the released cleaning does that itself, after ftfy has seen it."""
        return text if self._tokenizer.cleaning == "released" else text.strip()

    def _text_segments(self, ids: list[int]) -> list[Segment]:
        """One segment, or several where a single text is longer than a sequence."""
        longest = self._sequence_length - BEGIN_AND_END
        if self.source.cut_rule == "tokens":
            longest = len(ids)
        return [Segment(ids=tuple(ids[i : i + longest])) for i in range(0, len(ids), longest)]

    def _pair(
        self, document: TokenizedDocument, images: Sequence[int], random: KeyedRandom
    ) -> TokenizedDocument | None:
        """One image before or after one of its captions."""
        texts = document.stored.texts
        text = texts[random.below(len(texts))] if texts else ""
        room = self._sequence_length - BEGIN_AND_END - (self._image_length if images else 0)
        limit = min(room, self.source.max_text_tokens or room)
        ids = self._tokenizer.encode(self._stripped(text))[:limit]
        words = [Segment(ids=tuple(ids))] if ids else []
        image = [Segment(image=images[0])] if images else []
        image_first = random.uniform() < self.source.image_first_probability
        segments = tuple(image + words if image_first else words + image)
        if not segments:
            return None
        if self.source.ends == "released":
            return replace(document, segments=segments, begin=not image_first, end=image_first)
        return replace(document, segments=segments)

    def _cut_segments(self, placed: list[PlacedSegment]) -> list[PlacedSegment]:
        """The leading whole segments that fit in a sequence with begin and end.

        Where documents stay whole, an image in front of its text goes with it.
        """
        ends = itertools.accumulate(segment.length(self._image_length) for _, segment in placed)
        count = sum(end <= self._sequence_length - BEGIN_AND_END for end in ends)
        kept, cut = placed[:count], placed[count:]
        if self.source.packing == "whole":
            lost = {text for text, segment in cut if segment.image < 0}
            lost -= {text for text, segment in kept if segment.image < 0}
            while kept and kept[-1][1].image >= 0 and kept[-1][0] in lost:
                kept.pop()
        return kept

    def _cut_tokens(self, document: TokenizedDocument) -> TokenizedDocument:
        """The released cut: text anywhere; an image only whole; an end token in the last place.

        An image whose `<EoI>` falls on the last place stays, and the document then has no end token.
        """
        room = self._sequence_length - BEGIN_AND_END  # behind the begin token, before the last place
        kept: list[Segment] = []
        for segment in document.segments:
            length = segment.length(self._image_length)
            if length <= room:
                kept.append(segment)
                room -= length
                continue
            if segment.image >= 0:
                if length == room + 1:
                    kept.append(segment)
                    return replace(document, segments=tuple(kept), end=False)
            elif room:
                kept.append(Segment(ids=segment.ids[:room]))
            break
        return replace(document, segments=tuple(kept))


def _one_of_each(images: list[tuple[int, int]], random: KeyedRandom) -> list[tuple[int, int]]:
    """One image of those that share a text, at random."""
    shared: dict[int, list[tuple[int, int]]] = {}
    for image in images:
        shared.setdefault(image[0], []).append(image)
    return [group[random.below(len(group))] for group in shared.values()]


def _with_leading_space(texts: Sequence[str]) -> list[str]:
    """Every text but the first is separated from what stands before it by one space."""
    return [text if i == 0 or not text else f" {text}" for i, text in enumerate(texts)]
