"""Batches with the shape of a recipe's: real sequences by the real assembler, from documents of random tokens.

Sequences are full, or as full as the recipe's longest document makes them where it does not pack. No file is read and
no tokenizer is needed: the last six ids of the vocabulary serve as the special ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lcl_mcore.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.config.recipes import source_options
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.collate import Assembler, RowPlan, micro_batch
from lcl_mcore.data.dataset import Members
from lcl_mcore.data.document import Document, ImageEntry, Kind
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import Chunk, chunk_from
from lcl_mcore.data.tokenized import Piece, TokenizedDocument
from lcl_mcore.data.tokenizer import SpecialIds

# Images of successive full sequences: 64k images in 12288 sequences, as in the paper, are 16/3 a sequence.
IMAGES_OF_SEQUENCES = (5, 5, 6)
CAPTION = 20
"""Tokens of a caption beside which a sequence holds other documents; LAION's average is about that."""


class SyntheticSequences:
    """Makes the packed sequences of one run configuration, the same ones for the same seed."""

    def __init__(self, config: RunConfig, seed: int = 0) -> None:
        self.config = config
        self.options = source_options(config.recipe)
        vocab = config.model.language.vocab_size
        self.ids = SpecialIds(
            bos=vocab - 6,
            eos=vocab - 5,
            pad=vocab - 4,
            boi=vocab - 3,
            eoi=vocab - 2,
            image=vocab - 1,
            vocab_size=vocab,
        )
        self.random = np.random.default_rng(seed)
        latents = config.model.vision.patches
        self.image_size = latents + 2
        tokenizer: Any = self.ids  # all that sequences need of one
        self.assembler = Assembler(config.data, tokenizer, image_tokens=latents, seed=seed)
        self.documents = 0

    def plans(self, first: int, count: int) -> list[RowPlan]:
        """`count` sequences from number `first` on, before they have pixels."""
        return [self.assembler.row(self._documents(n), key=n) for n in range(first, first + count)]

    def with_noise(self, plans: list[RowPlan]) -> MicroBatch:
        """The sequences end to end, with noise for images."""
        count, side = sum(len(plan.images) for plan in plans), self.config.model.vision.image_size
        pixels = torch.from_numpy(self.random.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
        return micro_batch(plans, pixels, [False] * count)

    def _documents(self, number: int) -> list[Chunk]:
        """What stands in sequence `number`: an interleaved document and two pairs, or one document."""
        if self.config.data.packing == "off":
            pairs_only = "max_text_tokens" in self.options
            return [self._pair(number) if pairs_only else self._interleaved(self._fit(6))]
        images = self._fit(IMAGES_OF_SEQUENCES[number % len(IMAGES_OF_SEQUENCES)])
        pairs = min(images, 2)
        chunks = [self._pair(turn, CAPTION) for turn in range(pairs)]
        used = sum(chunk.size for chunk in chunks)
        return [*chunks, self._interleaved(images - pairs, self.config.data.sequence_length - used)]

    def _fit(self, images: int) -> int:
        """As many images as leave room for a caption each."""
        return max(1, min(images, self.config.data.sequence_length // (self.image_size + CAPTION + 4)))

    def _pair(self, turn: int, text: int = 0) -> Chunk:
        """One image and its caption; on even turns the image comes first."""
        longest = self.config.data.sequence_length - self.image_size - 2
        words = text or min(self.options["max_text_tokens"], longest)
        order = [Piece(image=0), self._text(words)]
        image_first = turn % 2 == 0
        released = self.options.get("ends") == "released"
        return self._chunk(
            "pair",
            order if image_first else order[::-1],
            begin=not (released and image_first),
            end=not released or image_first,
        )

    def _interleaved(self, images: int, size: int = 0) -> Chunk:
        """A document of exactly `size` tokens (a whole sequence by default): text, image, text, ..., text."""
        text = (size or self.config.data.sequence_length) - 2 - images * self.image_size
        lengths = [text // (images + 1)] * images
        pieces = [self._text(text - sum(lengths))]
        for number, length in enumerate(lengths):
            pieces += [Piece(image=number), self._text(length)]
        return self._chunk("matched", pieces, begin=True, end=True)

    def _text(self, length: int) -> Piece:
        return Piece(ids=tuple(self.random.integers(0, self.ids.bos, length).tolist()))

    def _chunk(self, kind: Kind, pieces: list[Piece], *, begin: bool, end: bool) -> Chunk:
        self.documents += 1
        side = self.config.model.vision.image_size
        entries = tuple(
            ImageEntry(f"{piece.image}.jpg", side, side, "jpeg", "", 0)
            for piece in pieces
            if piece.image >= 0
        )
        document = Document(str(self.documents), kind, (), entries)
        members = Members("synthetic", ())
        draw = SampleIndex(0, 0, self.documents)
        laid = TokenizedDocument(draw, "synthetic", document, members, tuple(pieces), begin, end)
        return chunk_from(self.documents, laid, self.image_size)


def synthetic_step(config: RunConfig, dp_size: int = 1, seed: int = 0) -> StepBatch:
    """One data-parallel rank's share of a global batch, in the micro-batches that the configuration asks for.

    Args:
        config: of the whole job.
        dp_size: data-parallel ranks of the job; all are counted as having as many images, contexts and targets.
        seed: of tokens and noise.
    """
    sequences, train = SyntheticSequences(config, seed), config.train
    plans = [
        sequences.plans(first, train.micro_batch_size)
        for first in range(0, train.global_batch_size // dp_size, train.micro_batch_size)
    ]
    micros = tuple(sequences.with_noise(part) for part in plans)
    counts = GlobalCounts(
        images=(sum(len(m.images) for m in micros),) * dp_size,
        contexts=(sum(len(m.context_positions) for m in micros),) * dp_size,
        targets=(sum(len(m.target_positions) for m in micros),) * dp_size,
        tokens=(sum(plan.used for part in plans for plan in part),) * dp_size,
        pairs=(sum(plan.attention_pairs for part in plans for plan in part),) * dp_size,
        micro_contexts=tuple((len(m.context_positions),) * dp_size for m in micros),
    )
    return StepBatch(micros, counts, {}, "")
