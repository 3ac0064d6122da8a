"""From packed spans to the arrays of a sequence, and from sequences and pixels to a micro-batch."""

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
from lcl_mcore.data.packing import Span
from lcl_mcore.data.tokenized import TokenizedDocument
from lcl_mcore.data.tokenizer import SpecialIds, Tokenizer
from lcl_mcore.rng import KeyedRandom, key63

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ImagePlan:
    """An image of a sequence before it is read: what to read, which part to show, where it stands.

    Attributes:
        number: its number in the document.
        key: its identity in the global batch (`MicroBatch.image_keys`).
        start: place of its first latent within the sequence.
        has_context: whether it enters the contrastive loss.
    """

    document: TokenizedDocument
    number: int
    window: Window
    key: int
    start: int
    has_context: bool

    @property
    def where(self) -> str:
        """Names the image in messages."""
        return f"{self.document.name}.{self.document.stored.images[self.number].name}"


@dataclass(frozen=True)
class SequencePlan:
    """A packed sequence of S tokens with everything but pixels.

    Attributes:
        tokens, positions: [S].
        lengths: of the attention segments, padding included; their sum is S.
        target_positions, target_labels: [k].
        documents: names, in order.
        used: how many of its tokens are not padding.
        key: its identity in the global batch (`MicroBatch.sequence_keys`).
        digest: 16 bytes over documents, tokens and crop windows.
    """

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
        """Causal (query, key) pairs within the sequence's documents, without padding."""
        padding = len(self.tokens) - self.used
        return sum(n * (n + 1) // 2 for n in self.lengths) - padding * (padding + 1) // 2


class Collator:
    """Turns spans into sequences for one tokenizer, image size and set of rules.

    Args:
        config: sequence length, context rule and crops.
        tokenizer: its special ids.
        tokens_per_image: LM positions of an image without its markers.
        seed: keys the crop windows.
        crops: `random` for training, `centre` for evaluation.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer | SpecialIds,
        tokens_per_image: int,
        *,
        seed: int,
        crops: Literal["random", "centre"] = "random",
    ) -> None:
        self._config = config
        self._ids = tokenizer
        self._latents = tokens_per_image
        self._seed = seed
        self._crops = crops

    def sequence(self, spans: Sequence[Span], key: int) -> SequencePlan:
        """One sequence: the spans one after the other, then padding."""
        size = self._config.sequence_length
        tokens = np.full(size, self._ids.pad, dtype=np.int64)
        positions = np.zeros(size, dtype=np.int64)
        is_target = np.zeros(size, dtype=bool)
        images: list[ImagePlan] = []
        lengths: list[int] = []
        digest = hashlib.blake2b(digest_size=16)
        at = 0
        for span in spans:
            start = at
            at = self._place(span, at, tokens, is_target, images)
            positions[start:at] = np.arange(at - start)
            is_target[start] = False  # nothing in its own segment predicts a first token
            lengths.append(at - start)
            document = span.document
            where = f"{document.name} {document.sample.epoch} {span.first_segment} {span.offset}\n"
            digest.update(where.encode())
        if at < size:
            positions[at:] = np.arange(size - at)
            lengths.append(size - at)
        digest.update(tokens.astype("<i8").tobytes())
        for image in images:
            w = image.window  # in the words with which runs have always been hashed
            shown = f"Window(left={w.left}, top={w.top}, width={w.width}, height={w.height})"
            digest.update(f"{image.number} {shown}\n".encode())
        labels_at = np.flatnonzero(is_target)
        return SequencePlan(
            tokens=tokens,
            positions=positions,
            lengths=tuple(lengths),
            target_positions=labels_at - 1,
            target_labels=tokens[labels_at],
            images=tuple(images),
            documents=tuple(span.document.name for span in spans),
            used=at,
            key=key,
            digest=digest.digest(),
        )

    def _place(
        self, span: Span, at: int, tokens: Integers, is_target: NDArray[np.bool_], images: list[ImagePlan]
    ) -> int:
        """Write one span from place `at` on; returns the place behind it."""
        start = at
        if span.begin:
            tokens[at] = self._ids.bos
            at += 1
        seen = False  # a text token or an image of this document came before, in this sequence
        for segment in span.segments:
            if segment.image < 0:
                end = at + len(segment.ids)
                tokens[at:end] = segment.ids
                is_target[at:end] = True
                at, seen = end, True
                continue
            eligible = seen if self._config.context_rule == "text" else at > start
            images.append(self._image(span.document, segment.image, at + 1, eligible))
            tokens[at] = self._ids.boi
            is_target[at] = True
            tokens[at + 1 : at + 1 + self._latents] = self._ids.image
            tokens[at + 1 + self._latents] = self._ids.eoi
            at, seen = at + self._latents + 2, True
        if span.end:
            tokens[at] = self._ids.eos
            is_target[at] = True
            at += 1
        return at

    def _image(self, document: TokenizedDocument, number: int, start: int, has_context: bool) -> ImagePlan:
        entry = document.stored.images[number]
        sample = document.sample
        identity = (self._seed, "image", sample.epoch, document.source, sample.index, number)
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
        return ImagePlan(document, number, window, key63(*identity), start, has_context)


def micro_batch(sequences: Sequence[SequencePlan], pixels: Tensor, failed: Sequence[bool]) -> MicroBatch:
    """Sequences one after the other. A failed image keeps its place but is not in the contrastive loss.

    Args:
        sequences: of equal length.
        pixels: uint8 [n, 3, H, W] of all their images, in order.
        failed: which of the n images could not be read.
    """
    size = len(sequences[0].tokens)
    images = [(b * size + image.start, image) for b, plan in enumerate(sequences) for image in plan.images]
    contexts = [i for i, (_, image) in enumerate(images) if image.has_context and not failed[i]]
    starts = [start for start, _ in images]
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate([plan.tokens for plan in sequences])),
        positions=torch.from_numpy(np.concatenate([plan.positions for plan in sequences])),
        lengths=tuple(length for plan in sequences for length in plan.lengths),
        images=pixels,
        image_starts=_integers(starts),
        context_positions=_integers([starts[i] - 1 for i in contexts]),
        context_images=_integers(contexts),
        target_positions=torch.from_numpy(
            np.concatenate([plan.target_positions + b * size for b, plan in enumerate(sequences)])
        ),
        target_labels=torch.from_numpy(np.concatenate([plan.target_labels for plan in sequences])),
        image_keys=_integers([image.key for _, image in images]),
        sequence_keys=_integers([plan.key for plan in sequences]),
        group_ids=_integers([images[i][1].document.group for i in contexts]),
        documents=tuple(name for plan in sequences for name in plan.documents),
    )


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
