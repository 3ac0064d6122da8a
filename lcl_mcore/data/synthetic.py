"""Batches with the shape of a recipe's: real sequences by the real collator, from documents of random tokens.

Sequences are full, or as full as the recipe's longest document makes them where it does not pack. No file is
read and no tokenizer is needed: the last six ids of the vocabulary serve as the special ones.
"""

from __future__ import annotations

import numpy as np
import torch

from lcl_mcore.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.collate import Collator, SequencePlan, micro_batch
from lcl_mcore.data.format import Document, ImageEntry, Kind, Members
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import Span, span_from
from lcl_mcore.data.tokenized import MARKERS_PER_IMAGE, Segment, TokenizedDocument
from lcl_mcore.data.tokenizer import SpecialIds

# Images of successive full sequences: 64k images in 12288 sequences, as in the paper, are 16/3 a sequence.
IMAGES_OF_SEQUENCES = (5, 5, 6)
CAPTION = 20
"""Tokens of a caption beside which a sequence holds other documents; LAION's average is about that."""


class SyntheticSequences:
    """Makes the sequences of one run configuration, the same ones for the same seed."""

    def __init__(self, config: RunConfig, seed: int = 0) -> None:
        self.config = config
        vocab = config.model.language.vocab_size
        self.ids = SpecialIds(
            bos=vocab - 6, eos=vocab - 5, pad=vocab - 4, boi=vocab - 3, eoi=vocab - 2, image=vocab - 1, vocab_size=vocab
        )
        self.random = np.random.default_rng(seed)
        self.image_length = config.model.vision.patches + MARKERS_PER_IMAGE
        self.collator = Collator(config.data, self.ids, config.model.vision.patches, seed=seed)
        self.documents = 0

    def plans(self, first: int, count: int) -> list[SequencePlan]:
        """`count` sequences from number `first` on, before they have pixels."""
        return [self.collator.sequence(self._spans(n), key=n) for n in range(first, first + count)]

    def with_noise(self, plans: list[SequencePlan]) -> MicroBatch:
        """The sequences as a micro-batch, with noise for images."""
        count, side = sum(len(plan.images) for plan in plans), self.config.model.vision.image_size
        pixels = torch.from_numpy(self.random.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
        return micro_batch(plans, pixels, [False] * count)

    def _spans(self, n: int) -> list[Span]:
        """What stands in sequence `n`: an interleaved document and two pairs, or one document."""
        if self.config.data.packing == "off":
            return [self._pair(n) if self._fit(2) == 1 else self._interleaved(self._fit(6))]
        images = self._fit(IMAGES_OF_SEQUENCES[n % len(IMAGES_OF_SEQUENCES)])
        pairs = min(images, 2)
        spans = [self._pair(turn, CAPTION) for turn in range(pairs)]
        used = sum(span.length for span in spans)
        return [*spans, self._interleaved(images - pairs, self.config.data.sequence_length - used)]

    def _fit(self, images: int) -> int:
        """As many images as leave room for a caption each."""
        return max(1, min(images, self.config.data.sequence_length // (self.image_length + CAPTION + 4)))

    def _pair(self, turn: int, text: int = 0) -> Span:
        """One image and its caption; on even turns the image comes first."""
        longest = self.config.data.sequence_length - self.image_length - 2
        order = [Segment(image=0), self._text(text or longest)]
        image_first = turn % 2 == 0
        released = self.config.data.packing == "off"
        return self._span(
            "pair",
            order if image_first else order[::-1],
            begin=not (released and image_first),
            end=not released or image_first,
        )

    def _interleaved(self, images: int, length: int = 0) -> Span:
        """A document of exactly `length` tokens (a whole sequence by default): text, image, text, ..., text."""
        text = (length or self.config.data.sequence_length) - 2 - images * self.image_length
        lengths = [text // (images + 1)] * images
        segments = [self._text(text - sum(lengths))]
        for number, words in enumerate(lengths):
            segments += [Segment(image=number), self._text(words)]
        return self._span("matched", segments, begin=True, end=True)

    def _text(self, length: int) -> Segment:
        return Segment(ids=tuple(self.random.integers(0, self.ids.bos, length).tolist()))

    def _span(self, kind: Kind, segments: list[Segment], *, begin: bool, end: bool) -> Span:
        self.documents += 1
        side = self.config.model.vision.image_size
        entries = tuple(
            ImageEntry(f"{segment.image}.jpg", side, side, "jpeg", "", 0) for segment in segments if segment.image >= 0
        )
        stored = Document(str(self.documents), kind, (), entries)
        sample = SampleIndex(0, 0, self.documents)
        document = TokenizedDocument(sample, "synthetic", stored, Members("synthetic", ()), tuple(segments), begin, end)
        return span_from(self.documents, document, self.image_length)


def synthetic_step(config: RunConfig, dp_size: int = 1, seed: int = 0) -> StepBatch:
    """One data-parallel rank's share of a global batch, in the micro-batches that the configuration asks for.

    Args:
        config: of the whole job.
        dp_size: data-parallel ranks of the job; all are counted as having as many images, contexts and targets.
        seed: of tokens and noise.
    """
    sequences, train = SyntheticSequences(config, seed), config.train
    plans = [
        sequences.plans(first, train.resolved_micro_batch_size)
        for first in range(0, train.global_batch_size // dp_size, train.resolved_micro_batch_size)
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
