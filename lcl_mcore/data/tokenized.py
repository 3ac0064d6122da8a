"""From a stored document to its pieces in reading order: which texts, which images, and where.

Happens before any pixel is decoded, because an image always takes the same number of tokens. Every
choice is keyed by seed, epoch, source, document and image, so it does not depend on who makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lcl_mcore.config.schema import SourceConfig
from lcl_mcore.data.dataset import Members
from lcl_mcore.data.document import Document
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.rng import KeyedRandom, key63


@dataclass(frozen=True)
class Piece:
    """What is never divided: the ids of one text, or one image (its number in the document)."""

    ids: tuple[int, ...] = ()
    image: int = -1

    def size(self, image_size: int) -> int:
        """Tokens it takes in a row; an image's markers included."""
        return len(self.ids) if self.image < 0 else image_size


@dataclass(frozen=True)
class TokenizedDocument:
    """A document ready to be packed: `pieces` between an optional begin and an optional end token."""

    draw: SampleIndex
    source: str
    document: Document
    members: Members
    pieces: tuple[Piece, ...]
    begin: bool = True
    end: bool = True
    may_split: bool = False

    @property
    def name(self) -> str:
        """`source/shard/key`, for the order hash and for messages."""
        return f"{self.source}/{self.members.shard}/{self.document.key}"

    @property
    def group(self) -> int:
        """The same for all images of this document."""
        return key63("document", self.source, self.draw.index)


class Layout:
    """Lays out the documents of one source."""

    def __init__(
        self, source: SourceConfig, tokenizer: Tokenizer, *, image_tokens: int, row_tokens: int, seed: int
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.image_size = image_tokens + 2  # with <BoI> and <EoI>
        self.row_tokens = row_tokens
        self.seed = seed

    def lay(
        self, draw: SampleIndex, document: Document, members: Members, *, first_caption: bool = False
    ) -> TokenizedDocument | None:
        """The document's pieces, or None if nothing of it is used.

        A pair takes one of its captions at random, or its first one.
        """
        if document.kind == "pair" and first_caption:
            document = replace(document, texts=document.texts[:1])
        random = KeyedRandom(self.seed, "layout", draw.epoch, self.source.label, draw.index)
        images = self._choose_images(document, random)
        if len(images) < self.source.min_images:
            return None
        laid = TokenizedDocument(draw, self.source.label, document, members, ())
        if document.kind == "pair":
            return self._pair(laid, images, random)
        long = self.source.long_documents
        splits = long == "split" or (long == "auto" and document.kind == "sequence")
        laid = replace(laid, pieces=self._interleave(document, images, random), may_split=splits)
        if not splits:
            laid = self._cut_tokens(laid) if self.source.cut_rule == "tokens" else self._cut_pieces(laid)
        return laid if laid.pieces else None

    def _choose_images(self, document: Document, random: KeyedRandom) -> list[int]:
        """Numbers of the images that are used, in document order."""
        images = [
            (image.text_index, number)
            for number, image in enumerate(document.images)
            if document.kind != "matched" or image.similarity >= self.source.min_similarity
        ]
        images.sort()
        if self.source.one_image_per_text and document.kind == "matched":
            images = _one_of_each(images, random)
        limit = self.source.max_images
        if len(images) > limit and self.source.image_choice == "random":
            images = [images[i] for i in random.sample(len(images), limit)]
        return [number for _, number in images[:limit]]

    def _interleave(
        self, document: Document, images: Sequence[int], random: KeyedRandom
    ) -> tuple[Piece, ...]:
        """Texts and images of a matched document or a sequence, in reading order."""
        before: dict[int, list[int]] = {}  # text index -> images that stand before this text
        for number in images:
            place = document.images[number].text_index
            if document.kind == "matched" and random.uniform() >= self.source.image_first_probability:
                place += 1
            before.setdefault(place, []).append(number)
        texts = [text.strip() for text in document.texts]
        encoded = self.tokenizer.encode_batch(_with_leading_space(texts))
        pieces: list[Piece] = []
        for place in range(len(texts) + 1):
            pieces += [Piece(image=number) for number in before.get(place, ())]
            if place < len(texts) and encoded[place]:
                pieces += self._text_pieces(encoded[place])
        return tuple(pieces)

    def _text_pieces(self, ids: list[int]) -> list[Piece]:
        """One piece, or several where a single text is longer than a row."""
        longest = self.row_tokens - 2
        if self.source.cut_rule == "tokens":
            longest = len(ids)
        return [Piece(ids=tuple(ids[i : i + longest])) for i in range(0, len(ids), longest)]

    def _pair(
        self, laid: TokenizedDocument, images: Sequence[int], random: KeyedRandom
    ) -> TokenizedDocument | None:
        """One image before or after one of its captions."""
        texts = laid.document.texts
        text = texts[random.below(len(texts))] if texts else ""
        room = self.row_tokens - 2 - (self.image_size if images else 0)
        limit = min(room, self.source.max_text_tokens or room)
        ids = self.tokenizer.encode(text.strip())[:limit]
        words = [Piece(ids=tuple(ids))] if ids else []
        image = [Piece(image=images[0])] if images else []
        image_first = random.uniform() < self.source.image_first_probability
        pieces = tuple(image + words if image_first else words + image)
        if not pieces:
            return None
        if self.source.ends == "released":
            return replace(laid, pieces=pieces, begin=not image_first, end=image_first)
        return replace(laid, pieces=pieces)

    def _cut_pieces(self, laid: TokenizedDocument) -> TokenizedDocument:
        """Keep the leading whole pieces that fit in a row with begin and end."""
        room = self.row_tokens - 2
        kept: list[Piece] = []
        for piece in laid.pieces:
            room -= piece.size(self.image_size)
            if room < 0:
                break
            kept.append(piece)
        return replace(laid, pieces=tuple(kept))

    def _cut_tokens(self, laid: TokenizedDocument) -> TokenizedDocument:
        """The released cut: text anywhere; an image only whole; an end token in the last place.

        An image whose `<EoI>` falls on the last place stays, and the document then has no end token.
        """
        room = self.row_tokens - 2  # behind the begin token, before the last place
        kept: list[Piece] = []
        for piece in laid.pieces:
            size = piece.size(self.image_size)
            if size <= room:
                kept.append(piece)
                room -= size
                continue
            if piece.image >= 0:
                if size == room + 1:
                    kept.append(piece)
                    return replace(laid, pieces=tuple(kept), end=False)
            elif room:
                kept.append(Piece(ids=piece.ids[:room]))
            break
        return replace(laid, pieces=tuple(kept))


def _one_of_each(images: list[tuple[int, int]], random: KeyedRandom) -> list[tuple[int, int]]:
    """One image of those that share a text, at random."""
    shared: dict[int, list[tuple[int, int]]] = {}
    for image in images:
        shared.setdefault(image[0], []).append(image)
    return [group[random.below(len(group))] for group in shared.values()]


def _with_leading_space(texts: Sequence[str]) -> list[str]:
    """Every text but the first is separated from what stands before it by one space."""
    return [text if i == 0 or not text else f" {text}" for i, text in enumerate(texts)]
