"""The training loop: read, step, log, checkpoint, stop."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lcl_mcore.config.files import config_digest
from lcl_mcore.config.run import RunConfig
from lcl_mcore.data.batch import StepBatch
from lcl_mcore.errors import CheckpointError, ConfigError, NonFiniteError, explain
from lcl_mcore.models.count import FlopCounter
from lcl_mcore.models.released import load_full_state, read_full_state
from lcl_mcore.training.build import DTYPES, Job, build_data, build_model
from lcl_mcore.training.checkpoint import Checkpointer, TrainState, checkpoint_path
from lcl_mcore.training.metrics import DeferredStats, RunLog, Speed, StepStats, Stopwatch
from lcl_mcore.training.optimizer import Optimizer, wrap_data_parallel
from lcl_mcore.training.schedule import learning_rate
from lcl_mcore.training.signals import StopRequest
from lcl_mcore.training.step import TrainStep

MAX_FAILED_SAVES = 2


@dataclass
class Progress:
    """Where the run stands; what a checkpoint taken now would say."""

    step: int = 0
    images: int = 0
    tokens: int = 0
    position: dict[str, Any] | None = None
    order_hash: str = ""


@dataclass(frozen=True)
class Pending:
    """Host-side facts of a step whose device numbers are still to come."""

    step: int
    lr: float
    batch: StepBatch
    images: int
    seconds: float
    data_seconds: float


class Trainer:
    """Trains one run on this rank from its folder's newest checkpoint, or from the start."""

    def __init__(self, config: RunConfig, job: Job, *, resume: bool, init_from: Path | None = None) -> None:
        self.config, self.job = config, job
        self.stop = StopRequest()
        self.model, self.choices = build_model(config, job.device, job.groups)
        if init_from is not None:
            self._start_from(init_from)
        self.ddp = wrap_data_parallel(self.model, config.parallel, job.groups)
        dtype = DTYPES[config.train.precision]
        self.optimizer = Optimizer(self.ddp, config.optim, dtype, job.groups)
        self.train_step = TrainStep(config, self.model, self.ddp, self.optimizer, job.groups)
        self.checkpointer = Checkpointer(
            job.folder / "checkpoints",
            self.model,
            self.optimizer,
            job.groups.host_control,
            config.checkpoint.keep,
        )
        self.progress = self._restore() if resume else Progress()
        self.loader, tokenizer = build_data(config, job.device, job.groups, self.progress.position)
        if tokenizer.vocab_size > config.model.language.vocab_size:
            raise ConfigError(explain(
                f"a tokenizer of {tokenizer.vocab_size} entries with model.language.vocab_size = "
                f"{config.model.language.vocab_size}", "every id needs a row of the embedding",
                "Raise the model's vocab_size or train a smaller tokenizer."))  # fmt: skip
        self.flops = FlopCounter(config, job.device.name, dtype, job.world)
        self.log = RunLog(
            job.folder,
            job.rank == 0,
            config.log.tensorboard,
            config.log.every,
            config.train.steps,
            self.progress.step,
        )
        self.stats, self.speed = DeferredStats(job.device.device), Speed()
        self.waiting: dict[int, Pending] = {}
        self.failed_saves = 0

    def _start_from(self, path: Path) -> None:
        """Replace the initial weights by those of a full-state file (`tools/import_released.py`)."""
        groups = self.job.groups
        load_full_state(self.model, read_full_state(path), groups.tp.rank(), groups.tp.size())
        self.job.note(f"initial weights: {path}")

    def _restore(self) -> Progress:
        path, notes = self.checkpointer.find()
        for note in notes:
            self.job.note(note)
        if path is None:
            self.job.note(f"resume: no complete checkpoint in {self.checkpointer.folder}, starting at step 0")
            return Progress()
        state = self.checkpointer.load(path)
        self.job.note(f"resume: {path}, {state.step} steps done")
        return Progress(state.step, state.images_seen, state.tokens_seen, state.position, state.order_hash)

    def run(self) -> int:
        """Train to the last step or a stop request; returns the process's exit code."""
        self._announce()
        gc.disable()  # collected at steps of our choosing, so that no rank stalls the others at random
        try:
            self._loop()
        finally:
            gc.enable()
            self.loader.close()
            self.log.close()
        return 0

    def _loop(self) -> None:
        total, watch = self.config.train.steps, Stopwatch()
        while self.progress.step < total:
            step = self.progress.step
            waited = Stopwatch()
            batch = next(self.loader)
            data_seconds = waited.lap()
            lr = learning_rate(step, self.config.optim, total)
            values = self.train_step.run(step, batch, lr, bool(self.stop))
            self.progress = Progress(
                step + 1,
                self.progress.images + sum(batch.counts.images),
                self.progress.tokens + sum(batch.counts.tokens),
                batch.position,
                batch.order_hash,
            )
            stats = self.stats.push(step, values)
            self.waiting[step] = Pending(step, lr, batch, self.progress.images, watch.lap(), data_seconds)
            stopping = stats is not None and self._handle(stats)
            every = self.config.checkpoint.every
            if stopping or self.progress.step == total or (every and self.progress.step % every == 0):
                for late in self.stats.drain():
                    stopping = self._handle(late) or stopping
                self._save(final=stopping or self.progress.step == total)
                watch.lap()
            if stopping:
                self.log.note(f"stopped by request after step {self.progress.step}; continue with --resume")
                return
            if step % 50 == 0:
                gc.collect()

    def _handle(self, stats: StepStats) -> bool:
        """Log a finished step; returns whether some rank asked to stop."""
        pending = self.waiting.pop(stats.step)
        if stats.skipped:
            self._raise_nonfinite(stats)
        self.speed.add(pending.seconds, pending.data_seconds)
        counts, seconds = pending.batch.counts, self.speed.step_seconds
        images, tokens = sum(counts.images), sum(counts.tokens)
        rows = self.config.train.global_batch_size * self.config.data.sequence_length
        loss = self.config.loss
        self.log.step({
            "step": stats.step + 1,
            "loss": loss.contrastive_weight * stats.contrastive + loss.generation_weight * stats.generation,
            "contrastive": stats.contrastive,
            "generation": stats.generation,
            "grad_norm": stats.grad_norm,
            "scale": stats.scale,
            "lr": pending.lr,
            "images": images,
            "images_seen": pending.images,
            "contexts": sum(counts.contexts),
            "targets": sum(counts.targets),
            "step_seconds": pending.seconds,
            "images_per_second": images / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": 1.0 - tokens / rows,
            "data_wait": self.speed.data_seconds / seconds,
            "mfu": self.flops.mfu(pending.batch, seconds),
            "eta_seconds": (self.config.train.steps - stats.step - 1) * seconds,
            "order_hash": pending.batch.order_hash,
            **{f"data_{name}": value for name, value in pending.batch.statistics.items()},
        })  # fmt: skip
        return stats.stop_requests > 0

    def _raise_nonfinite(self, stats: StepStats) -> None:
        """Name step and ranks; the device already refused this and every later update.

        On CUDA the flag is read a step later, so a rank is named when its outputs still are not finite.
        """
        losses = torch.tensor([float(self.train_step.finite)])
        everyone = [torch.zeros_like(losses) for _ in range(self.job.world)]
        dist.all_gather(everyone, losses, group=self.job.groups.host_control)
        ranks = [rank for rank, finite in enumerate(everyone) if finite.item() == 0.0]
        where = (
            f"what rank {', '.join(map(str, ranks))} computed"
            if ranks
            else "the gradient (every rank's outputs were finite)"
        )
        raise NonFiniteError(explain(
            f"step {stats.step + 1}: gradient norm {stats.grad_norm}", f"{where} is NaN or Inf; parameters were not "
            f"updated and no checkpoint was written after step {stats.step}",
            f"Continue from the last checkpoint with --resume, with a lower --lr or --precision fp32; data position "
            f"of the step: order hash {self.progress.order_hash}."))  # fmt: skip

    def _save(self, final: bool) -> None:
        started = time.perf_counter()
        progress = self.progress
        if progress.position is None:
            return
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        problem = self.checkpointer.save(TrainState(
            progress.step, progress.position, progress.order_hash, config_digest(self.config),
            progress.images, progress.tokens))  # fmt: skip
        path = checkpoint_path(self.checkpointer.folder, progress.step)
        if problem is None:
            self.failed_saves = 0
            self.log.note(f"checkpoint {path} complete in {time.perf_counter() - started:.1f} s")
            return
        self.failed_saves += 1
        text = explain(f"checkpoint {path}", f"could not be written: {problem}",
                       "Free or enlarge the disk; earlier checkpoints are intact.")  # fmt: skip
        if final or self.failed_saves >= MAX_FAILED_SAVES:
            raise CheckpointError(text)
        self.log.note(f"WARNING {text} Training goes on and tries again at the next checkpoint.")

    def _announce(self) -> None:
        """Say once what runs where, and why not something faster."""
        config, job = self.config, self.job
        parallel = config.parallel
        self.log.note(
            f"lcl_mcore  recipe {config.recipe}  {job.world} processes on {job.device.name} ({job.device.backend})  "
            f"tp {parallel.tensor} pp {parallel.pipeline} dp {job.groups.dp.size()}  {config.train.precision}"
        )
        for choice in self.choices:
            self.log.note(f"  {choice.part:<10} {choice.backend:<16} {choice.reason}")
        self.log.note(
            f"  loss       {config.loss.contrastive_impl} contrastive, {config.loss.generation_impl} cross-entropy"
        )
        self.log.note(f"  {self.flops.describe()}")
        self.log.note(f"  folder     {job.folder}")
