"""From packed chunks to the arrays of a row, and from rows and pixels to a micro-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.crop import Window, centre_window, random_window
from lcl_mcore.data.packing import Chunk
from lcl_mcore.data.tokenized import TokenizedDocument
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.rng import KeyedRandom, key63

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ImagePlan:
    """An image of a row before it is read: what to read, which part to show, where it stands."""

    laid: TokenizedDocument
    number: int
    window: Window
    key: int
    start: int  # of its first latent, within the row
    has_context: bool

    @property
    def where(self) -> str:
        """Names the image in messages."""
        return f"{self.laid.name}.{self.laid.document.images[self.number].name}"


@dataclass(frozen=True)
class RowPlan:
    """A row with everything but pixels. `used` counts its tokens that are not padding."""

    tokens: Integers
    positions: Integers
    lengths: tuple[int, ...]
    target_positions: Integers
    target_labels: Integers
    images: tuple[ImagePlan, ...]
    documents: tuple[str, ...]
    used: int
    key: int
    digest: bytes

    @property
    def attention_pairs(self) -> int:
        """Causal (query, key) pairs within the row's documents; padding left out."""
        padding = len(self.tokens) - self.used
        return sum(n * (n + 1) // 2 for n in self.lengths) - padding * (padding + 1) // 2


class Assembler:
    """Turns chunks into rows for one tokenizer, image size and set of rules."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        image_tokens: int,
        seed: int,
        crops: Literal["random", "centre"] = "random",
    ) -> None:
        self._config = config
        self._ids = tokenizer
        self._latents = image_tokens
        self._seed = seed
        self._crops = crops

    def row(self, chunks: Sequence[Chunk], key: int) -> RowPlan:
        """One row: the chunks one after the other, then padding."""
        size = self._config.sequence_length
        tokens = np.full(size, self._ids.pad, dtype=np.int64)
        positions = np.zeros(size, dtype=np.int64)
        is_target = np.zeros(size, dtype=bool)
        images: list[ImagePlan] = []
        lengths: list[int] = []
        digest = hashlib.blake2b(digest_size=16)
        at = 0
        for chunk in chunks:
            start = at
            at = self._place(chunk, at, tokens, is_target, images)
            positions[start:at] = np.arange(at - start)
            is_target[start] = False  # nothing in its own segment predicts a first token
            lengths.append(at - start)
            draw = chunk.laid.draw
            digest.update(f"{chunk.laid.name} {draw.epoch} {chunk.piece} {chunk.offset}\n".encode())
        if at < size:
            positions[at:] = np.arange(size - at)
            lengths.append(size - at)
        digest.update(tokens.astype("<i8").tobytes())
        for image in images:
            digest.update(f"{image.number} {image.window}\n".encode())
        labels_at = np.flatnonzero(is_target)
        return RowPlan(
            tokens=tokens,
            positions=positions,
            lengths=tuple(lengths),
            target_positions=labels_at - 1,
            target_labels=tokens[labels_at],
            images=tuple(images),
            documents=tuple(chunk.laid.name for chunk in chunks),
            used=at,
            key=key,
            digest=digest.digest(),
        )

    def _place(
        self, chunk: Chunk, at: int, tokens: Integers, is_target: NDArray[np.bool_], images: list[ImagePlan]
    ) -> int:
        """Write one chunk from place `at` on; returns the place behind it."""
        start = at
        if chunk.begin:
            tokens[at] = self._ids.bos
            at += 1
        seen = False  # a text token or an image of this document came before, in this row
        for piece in chunk.pieces:
            if piece.image < 0:
                end = at + len(piece.ids)
                tokens[at:end] = piece.ids
                is_target[at:end] = True
                at, seen = end, True
                continue
            eligible = seen if self._config.context_rule == "text" else at > start
            images.append(self._image(chunk.laid, piece.image, at + 1, eligible))
            tokens[at] = self._ids.boi
            is_target[at] = True
            tokens[at + 1 : at + 1 + self._latents] = self._ids.image
            tokens[at + 1 + self._latents] = self._ids.eoi
            at, seen = at + self._latents + 2, True
        if chunk.end:
            tokens[at] = self._ids.eos
            is_target[at] = True
            at += 1
        return at

    def _image(self, laid: TokenizedDocument, number: int, start: int, has_context: bool) -> ImagePlan:
        entry = laid.document.images[number]
        draw = laid.draw
        identity = (self._seed, "image", draw.epoch, laid.source, draw.index, number)
        if self._crops == "centre":
            window = centre_window(entry.width, entry.height)
        else:
            window = random_window(
                entry.width,
                entry.height,
                self._config.crop_scale,
                self._config.crop_ratio,
                KeyedRandom(*identity, "crop"),
            )
        return ImagePlan(laid, number, window, key63(*identity), start, has_context)


def micro_batch(rows: Sequence[RowPlan], pixels: Tensor, failed: Sequence[bool]) -> MicroBatch:
    """Rows laid end to end. A failed image keeps its place but leaves the contrastive loss."""
    size = len(rows[0].tokens)
    images = [(r * size + image.start, image) for r, row in enumerate(rows) for image in row.images]
    contexts = [i for i, (_, image) in enumerate(images) if image.has_context and not failed[i]]
    starts = [start for start, _ in images]
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate([row.tokens for row in rows])),
        positions=torch.from_numpy(np.concatenate([row.positions for row in rows])),
        lengths=tuple(length for row in rows for length in row.lengths),
        images=pixels,
        image_starts=_integers(starts),
        context_positions=_integers([starts[i] - 1 for i in contexts]),
        context_images=_integers(contexts),
        target_positions=torch.from_numpy(
            np.concatenate([row.target_positions + r * size for r, row in enumerate(rows)])
        ),
        target_labels=torch.from_numpy(np.concatenate([row.target_labels for row in rows])),
        image_keys=_integers([image.key for _, image in images]),
        sequence_keys=_integers([row.key for row in rows]),
        group_ids=_integers([images[i][1].laid.group for i in contexts]),
        documents=tuple(name for row in rows for name in row.documents),
    )


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
