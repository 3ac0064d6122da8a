"""One pass over held-out documents in stored order, and copies of a batch with wrong or no images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import DataConfig, RunConfig, SourceConfig
from lcl_mcore.data.collate import Collator, SequencePlan, micro_batch
from lcl_mcore.data.image_reader import ImageReader
from lcl_mcore.data.loader import DataContext
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import PackedSequence, Span, divide, span_from
from lcl_mcore.data.tokenized import MARKERS_PER_IMAGE
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.rng import key63

Order = Literal["text_first", "image_first", "as_configured"]
IMAGE_FIRST_PROBABILITY = {"text_first": 0.0, "image_first": 1.0}


def eval_documents(
    config: RunConfig,
    context: DataContext,
    tokenizer: Tokenizer,
    source: SourceConfig,
    *,
    micro_batch_size: int,
    order: Order = "as_configured",
    caption: Literal["first", "any"] = "first",
    limit: int | None = None,
    seed: int = 0,
) -> Iterator[MicroBatch]:
    """Documents dp_rank, dp_rank + dp_size, ... of one source, once, with centred square windows.

    Sequences are filled with whole documents in order (with packing off, one each); the last
    micro-batch may have fewer sequences. Nothing depends on the training position.

    Args:
        config: the run whose model is evaluated; its own sources are not read.
        context: rank, number of ranks and device; its groups are not used.
        tokenizer: the model's.
        source: the held-out data set.
        micro_batch_size: sequences per micro-batch.
        order: of image and text in pairs and matched documents.
        caption: a pair's first caption, or any.
        limit: of the source, only so many documents; None: all.
        seed: keys the remaining choices.
    """
    if order != "as_configured":
        source = replace(source, image_first_probability=IMAGE_FIRST_PROBABILITY[order])
    data = replace(config.data, sources=(source,), shuffle=False)
    latents = config.model.vision.patches
    data.require_room_for_images(latents)
    mixture = Mixture(data, tokenizer, latents, seed=seed)
    images = ImageReader(data, mixture, config.model.vision.image_size, context.device)
    collator = Collator(data, tokenizer, latents, seed=seed, crops="centre")

    def read(plans: list[SequencePlan]) -> MicroBatch:
        return micro_batch(plans, *images.read([image for plan in plans for image in plan.images]))

    try:
        count = min(len(mixture.datasets[source.label]), limit or 1 << 62)
        documents = range(context.dp_rank, count, context.dp_size)
        plans: list[SequencePlan] = []
        for number, sequence in enumerate(_sequences(data, mixture, documents, latents, caption)):
            plans.append(collator.sequence(sequence, key63(seed, "evaluation", context.dp_rank, number)))
            if len(plans) == micro_batch_size:
                yield read(plans)
                plans = []
        if plans:
            yield read(plans)
    finally:
        images.close()
        mixture.close()


def _sequences(
    config: DataConfig, mixture: Mixture, indices: range, tokens_per_image: int, caption: str
) -> Iterator[PackedSequence]:
    """Documents in order; a sequence ends where the next document does not fit."""
    image_length = tokens_per_image + MARKERS_PER_IMAGE
    sequence: list[Span] = []
    room = config.sequence_length
    for index in indices:
        document = mixture.document(SampleIndex(0, 0, index), first_caption=caption == "first")
        if document is None:
            continue
        span = span_from(index, document, image_length)
        if span.length > config.sequence_length:
            divided = divide(span, config.sequence_length, image_length)
            if divided is None:
                continue
            span = divided[0]
        if sequence and (span.length > room or "off" in mixture.documents_of(0).packings):
            yield tuple(sequence)
            sequence, room = [], config.sequence_length
        sequence.append(span)
        room -= span.length
    if sequence:
        yield tuple(sequence)


def with_shuffled_images(batch: MicroBatch) -> MicroBatch:
    """The same sequences, every image taken from another document of the micro-batch where that is possible.

    Images move cyclically by the largest number that one document has, so none stays in its document
    as long as no document has more than half of the images.
    """
    n = len(batch.image_starts)
    if n < 2:
        return batch
    ends = torch.tensor(batch.lengths).cumsum(0)
    document = torch.searchsorted(ends, batch.image_starts.cpu(), right=True)
    _, counts = document.unique_consecutive(return_counts=True)
    return replace(batch, images=batch.images.roll(int(counts.max()) % n, dims=0))


def with_blank_images(batch: MicroBatch, value: int = 128) -> MicroBatch:
    """The same sequences with every image a uniform grey."""
    return replace(batch, images=torch.full_like(batch.images, value))
