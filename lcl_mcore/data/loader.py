"""The training loader: global batches in an order that depends on seed, mix and data only."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from lcl_mcore.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.broadcast import RankReport, gather_reports, receive_step, send_step
from lcl_mcore.data.collate import Assembler, micro_batch
from lcl_mcore.data.decode import Decoder, build_decoder
from lcl_mcore.data.image_reader import ImageReader
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.packing import Packer
from lcl_mcore.data.position import describe_run, note_decoder, read_position
from lcl_mcore.data.prefetch import Prefetcher
from lcl_mcore.data.sample_stream import SampleStream, StreamState
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.rng import key63

REMOTE_READERS = 16


class StepLoader(Iterator[StepBatch]):
    """Endless steps, prepared ahead in the background. `close` it when done."""

    def __init__(self, source: StepReader | StepReceiver, depth: int, *, pin_memory: bool) -> None:
        self._source = source
        self._pin = pin_memory and torch.cuda.is_available()
        self._prefetcher = Prefetcher(self._produce, depth)

    def __next__(self) -> StepBatch:
        """The next step of this rank; waits only when it is not ready yet."""
        return next(self._prefetcher)

    @property
    def read_seconds(self) -> float:
        """Time that this rank spent reading and decoding so far; 0 where another rank reads for it."""
        return self._source.read_seconds

    def close(self) -> None:
        """Stop the thread and give back files. All ranks must have taken the same number of steps."""
        self._prefetcher.close()
        self._source.close()

    def _produce(self) -> StepBatch:
        step = self._source.next_step()
        if not self._pin:
            return step
        return replace(step, micro_batches=tuple(batch.pin_memory() for batch in step.micro_batches))


class StepReader:
    """Reads the rows of one data-parallel rank: lanes first..last-1 of the global batch."""

    def __init__(
        self,
        config: DataConfig,
        mix: Mixture,
        decoder: Decoder,
        *,
        tokenizer: Tokenizer,
        image_size: int,
        tokens_per_image: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        counts_group: dist.ProcessGroup | None,
        model_group: dist.ProcessGroup | None,
        pixel_ranks: Sequence[int] | None,
        position: dict[str, Any] | None,
    ) -> None:
        self.read_seconds = 0.0
        self._mix = mix
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._counts_group = counts_group
        self._model_group = model_group
        self._pixel_ranks = pixel_ranks
        self._images = ImageReader(config, mix, decoder, image_size)
        self._assembler = Assembler(config, tokenizer, image_tokens=tokens_per_image, seed=seed)
        self._row_tokens = config.sequence_length
        self._identity = describe_run(config, mix, tokenizer, tokens_per_image, global_batch_size, seed)
        start = read_position(position, self._identity)
        self._decoder = decoder.name
        note_decoder(position, decoder.name)
        self._step, self._hash = start.step, start.order_hash
        rows = global_batch_size // dp_size
        self._first_lane = dp_rank * rows
        packer = Packer(config.sequence_length, tokens_per_image + 2, config.min_fill, config.balance_images)
        self._lanes = [
            SampleStream(
                mix.lane(lane),
                packer,
                packing=config.packing,
                block_rows=config.packing_rows,
                state=start.lanes[lane] if start.lanes else StreamState(),
            )
            for lane in range(self._first_lane, self._first_lane + rows)
        ]
        # Lanes are independent. Waiting for an object store overlaps; local reads gain nothing from it.
        self._pool = ThreadPoolExecutor(REMOTE_READERS, thread_name_prefix="read") if mix.remote else None

    def next_step(self) -> StepBatch:
        """Read, decode and exchange one step. An error on any rank is raised on every rank."""
        step = self._step_or_error()
        if self._model_group is not None:
            send_step(step, self._model_group, self._pixel_ranks)
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        """Give back threads and files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._images.close()
        self._mix.close()

    def _step_or_error(self) -> StepBatch | Exception:
        micro_batches: tuple[MicroBatch, ...] = ()
        report: RankReport | Exception
        started = time.perf_counter()
        try:
            micro_batches, report = self._read()
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            report = error
        self.read_seconds += time.perf_counter() - started
        try:
            return self._complete(micro_batches, gather_reports(report, self._counts_group))
        except Exception as error:
            return error

    def _read(self) -> tuple[tuple[MicroBatch, ...], RankReport]:
        """This rank's micro-batches of the next step, and what the other ranks need to know of them."""
        chunks = list((self._pool.map if self._pool else map)(SampleStream.next_sequence, self._lanes))
        rows = [
            self._assembler.row(row, key63(self._seed, "row", self._step, self._first_lane + i))
            for i, row in enumerate(chunks)
        ]
        size = self._micro_batch_size
        batches = []
        failures = 0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            pixels, failed = self._images.read([image for row in part for image in row.images])
            failures += sum(failed)
            batches.append(micro_batch(part, pixels, failed))
        sums = (
            sum(len(batch.image_starts) for batch in batches),
            sum(len(batch.context_positions) for batch in batches),
            sum(len(batch.target_positions) for batch in batches),
            sum(row.used for row in rows),
            sum(row.attention_pairs for row in rows),
            failures,
            *(len(batch.context_positions) for batch in batches),
        )
        lanes = tuple(tuple(lane.state.to_list()) for lane in self._lanes)
        return tuple(batches), RankReport(sums, tuple(row.digest for row in rows), lanes)

    def _complete(self, batches: tuple[MicroBatch, ...], reports: list[RankReport]) -> StepBatch:
        """The step with the counts of all ranks, the order hash and the position after it."""
        digest = hashlib.blake2b(self._hash.encode(), digest_size=16)
        for report in reports:
            for row in report.digests:
                digest.update(row)
        self._step, self._hash = self._step + 1, digest.hexdigest()
        images, contexts, targets, tokens, pairs, failures, *micro = zip(
            *(r.sums for r in reports), strict=True
        )
        lanes = [list(lane) for report in reports for lane in report.lanes]
        mean_images = sum(images) / len(images)
        return StepBatch(
            micro_batches=batches,
            counts=GlobalCounts(images, contexts, targets, tokens, pairs, tuple(micro)),
            position={
                **self._identity,
                "decoder": self._decoder,
                "step": self._step,
                "order_hash": self._hash,
                "states": lanes,
            },
            order_hash=self._hash,
            statistics={
                "fill": sum(tokens) / (len(lanes) * self._row_tokens),
                "image_imbalance": max(images) / mean_images if mean_images else 1.0,
                "failed_images": float(sum(failures)),
            },
        )


class StepReceiver:
    """The ranks of a model-parallel group that do not read: they get each step from the one that does."""

    def __init__(self, group: dist.ProcessGroup, pixel_ranks: Sequence[int] | None) -> None:
        self._group = group
        self._pixel_ranks = pixel_ranks
        self.read_seconds = 0.0

    def next_step(self) -> StepBatch:
        """The step that the reading rank sent; its error, if it sent one."""
        return receive_step(self._group, self._pixel_ranks)

    def close(self) -> None:
        """Nothing is held."""


def build_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    image_size: int,
    tokens_per_image: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    counts_group: dist.ProcessGroup | None = None,
    model_group: dist.ProcessGroup | None = None,
    position: dict[str, Any] | None = None,
    pin_memory: bool = False,
    pixel_ranks: Sequence[int] | None = None,
) -> StepLoader:
    """Steps of data-parallel rank `dp_rank`, from the beginning or from a saved position.

    counts_group   gloo group of the data-parallel ranks (of equal model-parallel rank), used by this
                   loader alone; None when dp_size is 1
    model_group    gloo group of the ranks that share dp_rank (tensor x pipeline), used by this loader
                   alone: its rank 0 reads, the others receive; None when that is one rank
    pixel_ranks    ranks of `model_group` that need images (the first pipeline stage; rank 0 has them
                   anyway), the same on all; the others get `images` [0, 3, H, W]. None: every rank
    position       `StepBatch.position` of the last step trained on; refused with `DataError` when data,
                   seed or settings differ from those it was saved with
    """
    _require_batch(global_batch_size, micro_batch_size, dp_size)
    config.require_room_for_images(tokens_per_image)
    if model_group is not None and dist.get_rank(model_group) != 0:
        return StepLoader(
            StepReceiver(model_group, pixel_ranks), config.prefetch_steps, pin_memory=pin_memory
        )
    mix = Mixture(
        config,
        tokenizer,
        tokens_per_image=tokens_per_image,
        lanes=global_batch_size,
        seed=seed,
    )
    reader = StepReader(
        config,
        mix,
        build_decoder(config),
        tokenizer=tokenizer,
        image_size=image_size,
        tokens_per_image=tokens_per_image,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=seed,
        counts_group=counts_group,
        model_group=model_group,
        pixel_ranks=pixel_ranks,
        position=position,
    )
    return StepLoader(reader, config.prefetch_steps, pin_memory=pin_memory)


def _require_batch(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            explain(
                f"global batch {global_batch_size}, micro-batch {micro_batch_size}, data parallel {dp_size}",
                "the global batch must be a multiple of micro-batch times data-parallel size",
                f"Use a multiple of {micro_batch_size * dp_size}.",
            )
        )
