"""One pass over held-out documents in stored order, and copies of a batch with wrong or no images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import DataConfig, SourceConfig
from lcl_mcore.data.collate import Assembler, micro_batch
from lcl_mcore.data.decode import build_decoder
from lcl_mcore.data.image_reader import ImageReader
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import Chunk, chunk_from, divide
from lcl_mcore.data.sample_stream import Row
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.rng import key63

IMAGE_SIDES = {"text_first": 0.0, "image_first": 1.0}


def eval_documents(
    config: DataConfig,
    source: SourceConfig,
    *,
    tokenizer: Tokenizer,
    image_size: int,
    tokens_per_image: int,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    image_embeds: Literal["text_first", "image_first", "as_configured"] = "as_configured",
    caption: Literal["first", "any"] = "first",
    limit: int | None = None,
    seed: int = 0,
) -> Iterator[MicroBatch]:
    """Documents dp_rank, dp_rank + dp_size, ... of one source, once, with centred square windows.

    Rows are filled with whole documents in order (`config.packing = off`: one each); the last
    micro-batch may have fewer rows. `image_embeds` places the image of pairs and matched documents;
    `caption` takes a pair's first caption or any. Nothing depends on the training position.
    """
    if image_embeds != "as_configured":
        source = replace(source, image_first_probability=IMAGE_SIDES[image_embeds])
    config = replace(config, sources=(source,), shuffle=False)
    config.require_room_for_images(tokens_per_image)
    mix = Mixture(config, tokenizer, tokens_per_image=tokens_per_image, lanes=1, seed=seed)
    images = ImageReader(config, mix, build_decoder(config), image_size)
    assembler = Assembler(config, tokenizer, image_tokens=tokens_per_image, seed=seed, crops="centre")
    try:
        count = min(len(mix.datasets[source.label]), limit or 1 << 62)
        rows = _rows(config, mix, range(dp_rank, count, dp_size), tokens_per_image + 2, caption)
        waiting = []
        for number, row in enumerate(rows):
            waiting.append(assembler.row(row, key63(seed, "evaluation", dp_rank, number)))
            if len(waiting) == micro_batch_size:
                yield micro_batch(waiting, *images.read([i for plan in waiting for i in plan.images]))
                waiting = []
        if waiting:
            yield micro_batch(waiting, *images.read([i for plan in waiting for i in plan.images]))
    finally:
        images.close()
        mix.close()


def _rows(config: DataConfig, mix: Mixture, indices: range, image_size: int, caption: str) -> Iterator[Row]:
    """Documents in order; a row ends where the next one does not fit."""
    row: list[Chunk] = []
    room = config.sequence_length
    for index in indices:
        laid = mix.document(SampleIndex(0, 0, index), first_caption=caption == "first")
        if laid is None:
            continue
        chunk = chunk_from(index, laid, image_size)
        if chunk.size > config.sequence_length:
            divided = divide(chunk, config.sequence_length, image_size)
            if divided is None:
                continue
            chunk = divided[0]
        if row and (chunk.size > room or config.packing == "off"):
            yield tuple(row)
            row, room = [], config.sequence_length
        row.append(chunk)
        room -= chunk.size
    if row:
        yield tuple(row)


def with_shuffled_images(batch: MicroBatch) -> MicroBatch:
    """The same rows, every image taken from another document of the micro-batch where that is possible.

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
    """The same rows with every image a uniform grey."""
    return replace(batch, images=torch.full_like(batch.images, value))
