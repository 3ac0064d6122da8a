"""The training loop: read, step, log, checkpoint, stop."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lcl_mcore.batch import StepBatch
from lcl_mcore.build import DTYPES, build_data, build_model
from lcl_mcore.checkpoint.manager import Checkpointer, Outcome, TrainingTensors, TrainState
from lcl_mcore.checkpoint.policy import SavePolicy, make_checkpointer
from lcl_mcore.config.files import config_digest
from lcl_mcore.config.run import RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import CheckpointError, ConfigError, LclError, NonFiniteError, explain
from lcl_mcore.fault_tolerance.goodput import Goodput, read_events
from lcl_mcore.fault_tolerance.recovery import Recovery, batch_number, batches_seen, share_ranges
from lcl_mcore.fault_tolerance.signals import StopRequest
from lcl_mcore.fault_tolerance.stragglers import Comparison
from lcl_mcore.fault_tolerance.watchdog import Watchdog, explained
from lcl_mcore.interop.vit_formats import start_from
from lcl_mcore.lr_schedule import learning_rate
from lcl_mcore.metrics import DeferredStats, RunLog, Speed, StepStats, Stopwatch
from lcl_mcore.models.flops import FlopCounter
from lcl_mcore.optimizer import Optimizer, wrap_data_parallel
from lcl_mcore.progress import Evaluation, Pending, Progress, StepFaultError, step_record
from lcl_mcore.startup_summary import startup_summary
from lcl_mcore.train_step import TrainStep

MAX_FAILED_SAVES = 2


class Trainer:
    """Trains one run on this rank from its folder's newest checkpoint, or from the start."""

    @explained
    def __init__(
        self,
        config: RunConfig,
        context: Context,
        *,
        resume: bool,
        init_from: Path | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.config, self.context, self.evaluation = config, context, evaluation
        self.stop = StopRequest()
        self.watchdog = Watchdog(
            context.store,
            context.rank,
            context.world_size,
            config.parallel.timeout_seconds,
            config.faults.straggler_ratio,
        )
        self.model, self.choices = build_model(config, context.device, context.groups)
        if init_from is not None:
            self._start_from(init_from)
        self.ddp = wrap_data_parallel(self.model, config.parallel, context.groups)
        dtype = DTYPES[config.train.precision]
        self.optimizer = Optimizer(self.ddp, config.optim, dtype, context.groups)
        self.train_step = TrainStep(config, self.model, self.ddp, self.optimizer, context.groups)
        tensors = TrainingTensors(self.model, self.optimizer, context.groups.tp)
        self.checkpointer: Checkpointer = make_checkpointer(config, context, tensors, resume)
        self.saves = SavePolicy(config.checkpoint, context.rank)
        self.progress = self._restore() if resume else Progress()
        control = context.groups.host_control
        logged = share_ranges(read_events(context.run_folder) if resume else [], control)
        self.recovery = Recovery(config.faults, self.progress.position, logged)
        self.loader, tokenizer = build_data(config, context.device, context.groups, self.progress.position)
        if tokenizer.vocab_size > config.model.language.vocab_size:
            raise ConfigError(
                explain(
                    f"a tokenizer of {tokenizer.vocab_size} entries with model.language.vocab_size = "
                    f"{config.model.language.vocab_size}",
                    "every id needs a row of the embedding",
                    "Raise the model's vocab_size or train a smaller tokenizer.",
                )
            )
        self.flops = FlopCounter(config, context.device.name, dtype, context.world_size)
        self.log = RunLog(
            context.run_folder,
            context.rank == 0,
            config.log.tensorboard,
            config.log.every,
            config.train.steps,
            self.progress.step,
        )
        parallel = config.parallel
        layout = f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size} dp{context.groups.dp.size()}"
        self.uptime = Goodput(
            context.run_folder, context.rank == 0, self.progress.step, context.world_size, layout
        )
        self.uptime.lost(self.log.lost_seconds)
        self.stats, self.speed = DeferredStats(context.device.device), Speed()
        self.watch = Stopwatch()
        self.slow: Comparison | None = None
        self.waiting: dict[int, Pending] = {}
        self.failed_saves = 0
        self.reported: Outcome | None = None

    def _start_from(self, path: Path) -> None:
        """Replace the initial weights by those of a file: ours, or an encoder of timm, open_clip or transformers."""
        tp = self.context.groups.tp
        self.context.log(f"initial weights: {start_from(self.model, path, tp.rank(), tp.size())}")

    def _restore(self) -> Progress:
        path, notes = self.checkpointer.find()
        for note in notes:
            self.context.log(note)
        if path is None:
            self.context.log(
                f"resume: no complete checkpoint in {self.checkpointer.store.location}, starting at step 0"
            )
            return Progress()
        state = self.checkpointer.load(path)
        self.context.log(f"resume: {path}, {state.step} steps done")
        return Progress(state.step, state.images_seen, state.tokens_seen, state.position, state.order_hash)

    @explained
    def run(self) -> int:
        """Train to the last step or a stop request; returns the process's exit code."""
        for line in startup_summary(self.config, self.context, self.model, self.choices):
            self.log.note(line)
        self.log.note(f"  {self.flops.describe()}")
        gc.disable()  # collected at steps of our choosing, so that no rank stalls the others at random
        try:
            self._loop()
            self.uptime.end()
            self.log.note(self.uptime.total().describe())
        except LclError:  # every rank is alive and leaves: a save under way is worth completing
            self.checkpointer.wait()
            raise
        finally:
            gc.enable()
            self.loader.close()
            self.log.close()
        self.watchdog.close()
        return 0

    def _loop(self) -> None:
        self.watch.lap()
        while self.progress.step < self.config.train.steps:
            try:
                if self._advance():
                    self.log.note(
                        f"stopped by request after step {self.progress.step}; continue with --resume"
                    )
                    return
            except StepFaultError as fault:
                self._recover(fault)

    def _advance(self) -> bool:
        """One step, and a checkpoint when one is due; returns whether some rank asked to stop."""
        total, before = self.config.train.steps, self.progress
        step = before.step
        waited = Stopwatch()
        batch = self._next_batch()
        data_seconds = waited.lap()
        self.uptime.begin()
        self.watchdog.mark("step", step)
        lr = learning_rate(step, self.config.optim, total)
        self.watchdog.own.enter()
        values = self.train_step.run(step, batch, lr, self._requests())
        self.progress = Progress(
            step + 1,
            before.images + sum(batch.counts.images),
            before.tokens + sum(batch.counts.tokens),
            batch.position,
            batch.order_hash,
        )
        stats = self.stats.push(step, values)
        self.watchdog.own.leave(self.loader.read_seconds)
        self.waiting[step] = Pending(
            step, lr, batch, before, self.progress.images, self.watch.lap(), data_seconds
        )
        stopping = stats is not None and self._handle(stats)
        asked = stats is not None and stats.save_requested
        if stopping or asked or self.progress.step == total or self.saves.due(self.progress.step):
            for late in self.stats.drain():
                stopping = self._handle(late) or stopping
            self.progress = replace(self.progress, position=self.recovery.position(batch.position))
            self.watchdog.mark("save", step)
            self._save(final=stopping or self.progress.step == total)
            self.uptime.stall(self.watch.lap())
        if self.evaluation is not None and self.evaluation.due(step + 1) and not stopping:
            self._evaluate(step)
        if step % 50 == 0:
            gc.collect()
        return stopping

    def _evaluate(self, step: int) -> None:
        """Measure on held-out documents; a stop request met there ends training after one more step."""
        assert self.evaluation is not None
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)

        def stop() -> bool:
            self.watchdog.mark("evaluate", step)
            return bool(self.stop)

        self.evaluation.run(self.model, step + 1, stop, self.log)
        self.watch.lap()

    def _next_batch(self) -> StepBatch:
        """The next batch that is to be trained on."""
        while True:
            self.watchdog.mark("data", self.progress.step)
            batch = next(self.loader)
            if not self.recovery.leaves_out(batch_number(batch)):
                return batch
            self.log.note(f"batch {batch_number(batch)} left out (order hash {batch.order_hash})")

    def _handle(self, stats: StepStats) -> bool:
        """Log a finished step; returns whether some rank asked to stop.

        Raises:
            StepFaultError: the step does not count, and the run may go on without its batch.
            NonFiniteError: it does not count, and the run ends.
        """
        pending = self.waiting.pop(stats.step)
        number = batch_number(pending.batch)
        if stats.skipped:
            if self.config.faults.nonfinite == "stop":
                self._raise_nonfinite(stats)
            raise StepFaultError("nonfinite", pending, stats, number, number)
        self.recovery.bad_in_a_row = 0
        self.speed.add(pending.seconds, pending.data_seconds)
        self.uptime.step(pending.seconds, pending.data_seconds)
        record = step_record(
            self.config, pending, stats, self.speed, self.flops.mfu(pending.batch, self.speed.step_seconds)
        )
        self.log.step(record | {"ettr": self.uptime.total().ettr, **self._slowest()})
        loss = record["loss"]
        if self.config.faults.spike != "off" and self.recovery.spikes.add(number, loss):
            first = self.recovery.spikes.above[0] - self.config.faults.spike_margin
            raise StepFaultError("spike", pending, stats, max(first, 0), number)
        return stats.stop_requests > 0

    def _slowest(self) -> dict[str, float]:
        """The slowest rank of the newest comparison, for the metrics; a straggler is also told and noted once."""
        found = self.watchdog.comparison
        if found is None:
            return {}
        before, self.slow = self.slow, found
        named = None if before is None else (before.slowest, before.kind)
        if found.kind and (found.slowest, found.kind) != named:
            work = "works" if found.kind == "own" else "reads its data for"
            self.log.note(
                f"straggler  rank {found.slowest} {work} {found.seconds:.3f} s a step, the others {found.median:.3f} s "
                f"({found.ratio:.1f} times; over {found.steps} steps)"
            )
            self.uptime.event("straggler", **vars(found))
        return {"slowest_rank": found.slowest, "slowest_seconds": found.seconds, "slowest_ratio": found.ratio}

    def _recover(self, fault: StepFaultError) -> None:
        """Leave the fault's batches out for good, here or from an earlier checkpoint on; all ranks together."""
        policy, recovery = self.config.faults, self.recovery
        late, queued = self.stats.drain(), dict(self.waiting)
        newest = max([fault.pending, *self.waiting.values()], key=lambda pending: pending.step)
        self.waiting.clear()
        last = batch_number(newest.batch) if fault.kind == "nonfinite" else fault.last
        recovery.bad_in_a_row += fault.kind == "nonfinite"
        if recovery.bad_in_a_row >= policy.nonfinite_limit:
            self._raise_nonfinite(fault.stats)
        what = f"loss spike at batches {recovery.spikes.above}"
        if fault.kind == "nonfinite":
            what = f"gradient norm {fault.stats.grad_norm} (ranks {self._nonfinite_ranks() or 'unknown'})"
        self.log.note(
            f"step {fault.stats.step + 1}: {what}; batches {fault.first} to {last} are left out "
            f"(order hash {fault.pending.batch.order_hash})"
        )
        recovery.leave_out(fault.first, last)
        self.uptime.event("leave-out", batches=[fault.first, last], step=fault.stats.step + 1, why=what)
        if fault.kind == "nonfinite":
            self.optimizer.skipped.zero_()  # parameters and moments are as before the step
        if fault.kind == "spike" or policy.nonfinite == "rollback":
            if self._go_back(fault.first):
                return
            self.log.note("WARNING no checkpoint is older than these batches: going on without going back")
        if fault.kind == "nonfinite":
            position, order = newest.batch.position, newest.batch.order_hash
            self.progress = replace(fault.pending.before, position=position, order_hash=order)
            return
        recovery.spikes.above.clear()
        self.waiting = queued
        for stats in late:
            try:
                self._handle(stats)
            except StepFaultError as another:
                self._recover(another)

    def _go_back(self, batch: int) -> bool:
        """Continue from the newest checkpoint that has not seen `batch`; False if there is none."""
        if not self.recovery.may_go_back(batch):
            raise NonFiniteError(
                explain(
                    f"batch {batch}",
                    f"the run went back {self.config.faults.rollback_limit} times from here without "
                    "getting past it",
                    "Look at the data and the learning rate; --resume starts at the last checkpoint.",
                )
            )
        self.watchdog.mark("restore", self.progress.step)
        self._settle(self.checkpointer.wait(), final=False)
        path, _ = self.checkpointer.find(lambda state: batches_seen(state) <= batch)
        if path is None:
            return False
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        state = self.checkpointer.load(path)
        self.checkpointer.discard_after(state.step)  # they have seen the batches that are left out now
        self.saves.saved_step = None
        self.loader.close()
        self.recovery.restore(state.position)
        self.loader, _ = build_data(self.config, self.context.device, self.context.groups, state.position)
        self.progress = Progress(
            state.step, state.images_seen, state.tokens_seen, state.position, state.order_hash
        )
        self.uptime.lost(self.log.rewind(state.step))
        self.uptime.event("rollback", step=state.step, checkpoint=path.name)
        self.log.note(f"went back to {path}, {state.step} steps done")
        return True

    def _nonfinite_ranks(self) -> list[int]:
        """Ranks whose own outputs were not finite; all ranks ask together."""
        own = torch.tensor([float(self.train_step.finite)])
        everyone = [torch.zeros_like(own) for _ in range(self.context.world_size)]
        dist.all_gather(everyone, own, group=self.context.groups.host_control)
        return [rank for rank, finite in enumerate(everyone) if finite.item() == 0.0]

    def _raise_nonfinite(self, stats: StepStats) -> None:
        """Name step and ranks; the device already refused this and every later update.

        On CUDA the flag is read a step later, so a rank is named when its outputs still are not finite.
        """
        ranks = self._nonfinite_ranks()
        where = (
            f"what rank {', '.join(map(str, ranks))} computed"
            if ranks
            else "the gradient (every rank's outputs were finite)"
        )
        raise NonFiniteError(
            explain(
                f"step {stats.step + 1}: gradient norm {stats.grad_norm}",
                f"{where} is NaN or Inf; parameters were not "
                f"updated and no checkpoint was written after step {stats.step}",
                f"Continue from the last checkpoint with --resume, with a lower --lr or --precision fp32; data "
                f"position of the step: order hash {self.progress.order_hash}.",
            )
        )

    def _requests(self) -> float:
        """What this rank asks of all with the step's reduction: 1 to stop, 0.5 (first rank only) to save."""
        if self.saves.out_of_time():
            self.stop.received = self.stop.received or "the time limit"
        early = self.checkpointer.poll()
        self._report(early)
        hopeless = early is not None and early.problem != "" and self.failed_saves + 1 >= MAX_FAILED_SAVES
        return float(bool(self.stop) or hopeless) + self.saves.request()

    def _save(self, final: bool) -> None:
        """Begin a checkpoint of the present state; with `final`, see it through."""
        progress = self.progress
        self._settle(self.checkpointer.wait(), final=False)
        if progress.position is None or progress.step == self.saves.saved_step:
            return
        self.saves.started(progress.step)
        self.checkpointer.start(
            TrainState(
                progress.step,
                progress.position,
                progress.order_hash,
                config_digest(self.config),
                progress.images,
                progress.tokens,
            )
        )
        if final or not self.config.checkpoint.asynchronous:
            self._settle(self.checkpointer.wait(), final)

    def _settle(self, outcome: Outcome | None, final: bool) -> None:
        """Act on how a save ended; the same on every rank.

        Raises:
            CheckpointError: it failed, and was the last one or not the first to fail in a row.
        """
        if outcome is None:
            return
        if not outcome.problem:
            self.failed_saves = 0
            self.saves.finished(outcome)
        else:
            self.failed_saves += 1
            self.saves.failed(outcome)
            if final or self.failed_saves >= MAX_FAILED_SAVES:
                raise CheckpointError(_save_failed(outcome))
        self._report(outcome)

    def _report(self, outcome: Outcome | None) -> None:
        """Say once how a save ended, as soon as this rank knows."""
        if outcome is None or outcome is self.reported:
            return
        self.reported = outcome
        if outcome.problem:
            self.log.note(
                f"WARNING {_save_failed(outcome)} Training goes on and tries again at the next checkpoint."
            )
        else:
            self.log.note(f"checkpoint {outcome.path} complete after {outcome.seconds:.1f} s")


def _save_failed(outcome: Outcome) -> str:
    return explain(
        f"checkpoint {outcome.path}",
        f"could not be written: {outcome.problem}",
        "Free or enlarge the disk; earlier checkpoints are intact.",
    )
