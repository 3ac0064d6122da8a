"""The training loader: global batches in an order that depends on seed, mixture and data only.

Sample stream v of V (one per sequence of the global batch) packs its own documents. Data-parallel rank d of D
reads streams d*V/D to (d+1)*V/D - 1, so the global batch is the same at any data-parallel size. Steps are prepared
ahead by one background thread per rank, which also exchanges what the ranks must know of each other's part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lcl_mcore.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.broadcast import RankReport, gather_reports, receive_step, send_step
from lcl_mcore.data.collate import Collator, SequencePlan, micro_batch
from lcl_mcore.data.image_reader import ImageReader
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.packing import SampleStream
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.distributed.device import SideStream, take_over
from lcl_mcore.errors import DataError, explain
from lcl_mcore.rng import key63

if TYPE_CHECKING:
    from lcl_mcore.distributed.context import Context

logger = logging.getLogger(__name__)
REMOTE_READERS = 16
POSITION_FORMAT = 1


@dataclass(frozen=True)
class DataContext:
    """What the loader knows of its process: which part of each global batch it reads, and for whom.

    Attributes:
        dp_rank, dp_size: this data-parallel rank, and their number.
        counts_group: gloo group of the data-parallel ranks (of equal model-parallel rank), used by the loader
            alone; None when dp_size is 1.
        model_group: gloo group of the ranks that share dp_rank (tensor x pipeline), used by the loader alone:
            its rank 0 reads, the others receive; None when that is one rank.
        pixel_ranks: ranks of `model_group` that need images (the first pipeline stage; rank 0 has them anyway),
            the same on all; the others get `images` [0, 3, H, W]. None: every rank.
        device: where the micro-batches are used; on CUDA they lie in pinned memory, and DALI decodes there.
    """

    dp_rank: int = 0
    dp_size: int = 1
    counts_group: dist.ProcessGroup | None = None
    model_group: dist.ProcessGroup | None = None
    pixel_ranks: tuple[int, ...] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def of(config: RunConfig, context: Context) -> DataContext:
        """This process of a job; the first pipeline stage has the ViT and needs the images."""
        groups = context.groups
        return DataContext(
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            counts_group=groups.host_counts if groups.dp.size() > 1 else None,
            model_group=groups.host_model if groups.host_model.size() > 1 else None,
            pixel_ranks=tuple(range(groups.tp.size())),
            device=context.device.device,
        )


def build_loader(
    config: RunConfig, context: DataContext, tokenizer: Tokenizer, position: dict[str, Any] | None = None
) -> StepLoader:
    """Steps of one data-parallel rank, from the beginning or from a saved position.

    Args:
        config: the run; `data`, `model.vision` and `train` matter here.
        context: this process among the others.
        tokenizer: as `build_tokenizer(config.data.tokenizer)` makes it.
        position: `StepBatch.position` of the last step trained on.

    Raises:
        ConfigError: the global batch cannot be split evenly.
        DataError: a source cannot be read, or data, seed or settings differ from those of `position`.
    """
    model_parallel = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    config.check_processes(context.dp_size * model_parallel)
    source: StepReader | StepReceiver
    if context.model_group is not None and dist.get_rank(context.model_group) != 0:
        source = StepReceiver(context)
    else:
        source = StepReader(config, context, tokenizer, position)
    return StepLoader(source, config.data.prefetch_steps, context.device)


class StepLoader(Iterator[StepBatch]):
    """Endless steps, at most `depth` of them prepared ahead by one background thread. `close` it when done.

    The thread works for credits: `depth` at the start and one more for every step taken. So ranks that take the
    same number of steps also prepare the same number, and the collectives of a step match even when the loaders
    are closed in the middle of a run.
    """

    def __init__(self, source: StepReader | StepReceiver, depth: int, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._credits = threading.Semaphore(depth)
        self._steps: queue.SimpleQueue[tuple[StepBatch, torch.cuda.Event | None] | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __next__(self) -> StepBatch:
        """The next step of this rank; waits only when it is not ready yet.

        Raises:
            StopIteration: the loader has been closed.
            Exception: what stopped the thread; again on every later call.
        """
        if self._failed is not None:
            raise self._failed
        if self._stopped.is_set():
            raise StopIteration
        item = self._steps.get()
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        self._credits.release()
        step, made = item
        take_over([batch.images for batch in step.micro_batches], made)
        return step

    @property
    def read_seconds(self) -> float:
        """Time that this rank spent reading and decoding so far; 0 where another rank reads for it."""
        return self._source.read_seconds

    def close(self) -> None:
        """Stop after the step in work and give back files. All ranks must have taken the same number of steps."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._credits.release()
            self._thread.join()
        self._source.close()

    def _work(self) -> None:
        on_cuda = self._device.type == "cuda"
        if on_cuda:  # the current device is a thread's own; a new thread would otherwise use the first one
            torch.cuda.set_device(self._device)
        with self._source.side_stream.current():
            while True:
                self._credits.acquire()
                if self._stopped.is_set():
                    return
                try:
                    step = self._source.next_step()
                    if on_cuda:
                        step = replace(step, micro_batches=tuple(batch.pin_memory() for batch in step.micro_batches))
                    self._steps.put((step, self._source.side_stream.mark()))
                except BaseException as error:  # handed to the consumer, whatever it is
                    self._steps.put(error)
                    return


@dataclass(frozen=True)
class StepPlan:
    """One rank's sequences of a step, without pixels, and the states of its sample streams behind them."""

    sequences: tuple[SequencePlan, ...]
    states: tuple[tuple[int, ...], ...]


class StepReader:
    """Reads, decodes and exchanges the sequences of one data-parallel rank."""

    def __init__(
        self, config: RunConfig, context: DataContext, tokenizer: Tokenizer, position: dict[str, Any] | None
    ) -> None:
        data, latents, seed = config.data, config.model.vision.patches, config.train.seed
        streams = config.train.global_batch_size
        self.read_seconds = 0.0
        self._config = config
        self._context = context
        self._mixture = Mixture(data, tokenizer, latents, streams=streams, seed=seed)
        self._images = ImageReader(data, self._mixture, config.model.vision.image_size, context.device)
        self.side_stream = self._images.side_stream
        self._collator = Collator(data, tokenizer, latents, seed=seed)
        self._identity = describe_run(config, self._mixture, tokenizer)
        start = read_position(position, self._identity)
        warn_of_other_decoder(position, self._images.decoder_name)
        self._step, self._hash = start.step, start.order_hash
        self._planned = start.step
        self._ahead: StepPlan | Exception | None = None
        own = streams // context.dp_size
        self._first_stream = context.dp_rank * own
        self._streams = [
            SampleStream(
                data, self._mixture.documents_of(stream), latents, state=start.states[stream] if start.states else ()
            )
            for stream in range(self._first_stream, self._first_stream + own)
        ]
        # Streams are independent. Waiting for an object store overlaps; local reads gain nothing from it.
        self._pool = ThreadPoolExecutor(REMOTE_READERS, thread_name_prefix="read") if self._mixture.remote else None

    def next_step(self) -> StepBatch:
        """Read, decode and exchange one step. An error on any rank is raised on every rank."""
        step = self._step_or_error()
        if self._context.model_group is not None:
            send_step(step, self._context.model_group, self._context.pixel_ranks)
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        """Give back threads and files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._images.close()
        self._mixture.close()

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
            return self._complete(micro_batches, gather_reports(report, self._context.counts_group))
        except Exception as error:
            return error

    def _read(self) -> tuple[tuple[MicroBatch, ...], RankReport]:
        """This rank's micro-batches of the next step, and what the other ranks need to know of them."""
        plan = self._next_plan()
        size = self._config.train.resolved_micro_batch_size
        parts = [plan.sequences[start : start + size] for start in range(0, len(plan.sequences), size)]
        pixels_of = [self._images.begin([image for sequence in part for image in sequence.images]) for part in parts]
        self._plan_ahead()  # while other threads decode
        batches = []
        failures = 0
        for part, read in zip(parts, pixels_of, strict=True):
            pixels, failed = read()
            failures += sum(failed)
            batches.append(micro_batch(part, pixels, failed))
        sums = (
            sum(len(batch.image_starts) for batch in batches),
            sum(len(batch.context_positions) for batch in batches),
            sum(len(batch.target_positions) for batch in batches),
            sum(sequence.used for sequence in plan.sequences),
            sum(sequence.attention_pairs for sequence in plan.sequences),
            failures,
            *(len(batch.context_positions) for batch in batches),
        )
        return tuple(batches), RankReport(sums, tuple(sequence.digest for sequence in plan.sequences), plan.states)

    def _next_plan(self) -> StepPlan:
        """The next step's, made ahead if there was time; an error of that time is raised now."""
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, Exception):
            raise ahead
        return self._plan() if ahead is None else ahead

    def _plan_ahead(self) -> None:
        try:
            self._ahead = self._plan()
        except Exception as error:  # belongs to the step after this one
            self._ahead = error

    def _plan(self) -> StepPlan:
        seed = self._config.train.seed
        packed = list((self._pool.map if self._pool else map)(SampleStream.next_sequence, self._streams))
        sequences = tuple(
            # "row" is the name that the key has had in every saved run
            self._collator.sequence(spans, key63(seed, "row", self._planned, self._first_stream + i))
            for i, spans in enumerate(packed)
        )
        self._planned += 1
        return StepPlan(sequences, tuple(tuple(stream.state) for stream in self._streams))

    def _complete(self, batches: tuple[MicroBatch, ...], reports: list[RankReport]) -> StepBatch:
        """The step with the counts of all ranks, the order hash and the position after it."""
        digest = hashlib.blake2b(self._hash.encode(), digest_size=16)
        for report in reports:
            for part in report.digests:
                digest.update(part)
        self._step, self._hash = self._step + 1, digest.hexdigest()
        images, contexts, targets, tokens, pairs, failures, *micro = zip(
            *(report.sums for report in reports), strict=True
        )
        states = [list(state) for report in reports for state in report.states]
        mean_images = sum(images) / len(images)
        return StepBatch(
            micro_batches=batches,
            counts=GlobalCounts(images, contexts, targets, tokens, pairs, tuple(micro)),
            position={
                **self._identity,
                "decoder": self._images.decoder_name,
                "step": self._step,
                "order_hash": self._hash,
                "states": states,
            },
            order_hash=self._hash,
            statistics={
                "fill": sum(tokens) / (len(states) * self._config.data.sequence_length),
                "image_imbalance": max(images) / mean_images if mean_images else 1.0,
                "failed_images": float(sum(failures)),
            },
        )


class StepReceiver:
    """The ranks of a model-parallel group that do not read: they get each step from the one that does."""

    read_seconds = 0.0

    def __init__(self, context: DataContext) -> None:
        assert context.model_group is not None
        self.side_stream = SideStream(torch.device("cpu"))  # what arrives lies on the host
        self._group = context.model_group
        self._pixel_ranks = context.pixel_ranks

    def next_step(self) -> StepBatch:
        """The step that the reading rank sent; its error, if it sent one."""
        return receive_step(self._group, self._pixel_ranks)

    def close(self) -> None:
        """Nothing is held."""


# --- the saved position: small plain JSON that says where the run was and what it was reading ---

# What changes which documents, tokens or crop windows come: a position fits only equal values.
SOURCE_RULES = (
    "weight",
    "min_similarity",
    "min_images",
    "max_images",
    "image_choice",
    "one_image_per_text",
    "image_first_probability",
    "max_text_tokens",
    "packing",
    "long_documents",
    "cut_rule",
    "ends",
)
DATA_RULES = (
    "sequence_length",
    "packing",
    "packing_buffer",
    "min_fill",
    "balance_images",
    "context_rule",
    "shuffle",
    "shuffle_block",
    "crop_scale",
    "crop_ratio",
)


# Positions keep the words with which they were first saved.
SAVED_NAMES = {"packing_buffer": "packing_rows"}
SAVED_VALUES = {"cut_rule": {"segments": "pieces"}}


@dataclass(frozen=True)
class StartPosition:
    """Where to begin: `states` has one entry per sample stream, none at the very beginning."""

    step: int
    order_hash: str
    states: list[list[int]]


def describe_run(config: RunConfig, mixture: Mixture, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a position must have been saved with to be continued."""
    sources = {
        source.label: {
            "fingerprint": mixture.datasets[source.label].fingerprint,
            "documents": len(mixture.datasets[source.label]),
            **{name: _saved_value(name, getattr(source, name)) for name in SOURCE_RULES},
            # Before commit b1fdb7f they were counted before the document was cut.
            "images_counted": "after cutting" if source.min_images else None,
        }
        for source in config.data.sources
    }
    description = {
        "format": POSITION_FORMAT,
        "seed": config.train.seed,
        "global_batch_size": config.train.global_batch_size,
        "tokens_per_image": config.model.vision.patches,
        "tokenizer": tokenizer.fingerprint,
        "ftfy": tokenizer.ftfy_version,
        "sources": sources,
        "source_order": list(sources),
        **{SAVED_NAMES.get(name, name): getattr(config.data, name) for name in DATA_RULES},
    }
    result: dict[str, Any] = json.loads(json.dumps(description))
    return result


def _saved_value(name: str, value: Any) -> Any:
    return SAVED_VALUES.get(name, {}).get(value, value)


def read_position(position: dict[str, Any] | None, run: dict[str, Any]) -> StartPosition:
    """Check a saved position against this run.

    Args:
        position: as saved, or None for the beginning.
        run: `describe_run` of this run.

    Raises:
        DataError: it differs from this run (every difference is named), or is damaged.
    """
    if position is None:
        return StartPosition(0, "", [])
    differences = _differences("", {name: position.get(name) for name in run}, run)
    if differences:
        raise DataError(
            explain(
                "saved data position",
                "was made with other data or settings: " + "; ".join(differences),
                "Resume with the former ones, or start a new run (weights can be kept, the order cannot).",
            )
        )
    try:
        states = [[int(value) for value in state] for state in position["states"]]
        start = StartPosition(int(position["step"]), str(position["order_hash"]), states)
    except (KeyError, TypeError, ValueError) as error:
        message = explain("saved data position", f"is damaged: {error}", "Use an older checkpoint.")
        raise DataError(message) from error
    if len(states) != run["global_batch_size"]:
        rule = f"has {len(states)} states for {run['global_batch_size']} sample streams"
        raise DataError(explain("saved data position", rule, "Use an older checkpoint."))
    return start


def warn_of_other_decoder(position: dict[str, Any] | None, decoder: str) -> None:
    """Log that images were decoded otherwise before: the order is the same, pixels differ slightly."""
    former = (position or {}).get("decoder", decoder)
    if former != decoder:
        logger.warning(
            "images were decoded by %r before and are by %r now: the same order and crops, pixels differ as those of "
            "two resize filters do; set data.decode_backend to keep the former",
            former,
            decoder,
        )


def _differences(path: str, saved: Any, now: Any) -> list[str]:
    """Readable list of the places where two nested values differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for name in sorted({*saved, *now})
            for line in _differences(f"{path}.{name}".lstrip("."), saved.get(name), now.get(name))
        ]
    return [] if saved == now else [f"{path} was {saved}, is {now}"]
