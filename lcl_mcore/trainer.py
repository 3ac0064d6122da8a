"""The training loop: set-up, then batch, step, log, checkpoint, evaluate, until the last step or a stop request."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from lcl_mcore.batch import StepBatch
from lcl_mcore.build import build_training
from lcl_mcore.checkpoint.manager import TrainingTensors, open_checkpoints
from lcl_mcore.checkpoint.store import TrainState, checkpoint_name
from lcl_mcore.config.run_folder import FILE as CONFIG
from lcl_mcore.config.run_folder import config_digest, listed, set_records_aside, write_config
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.loader import DataContext, build_loader
from lcl_mcore.data.tokenizer import tokenizer_for
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import DataError, LclError
from lcl_mcore.evaluation.heldout import periodic_evaluation
from lcl_mcore.fault_tolerance.events import EventLog
from lcl_mcore.fault_tolerance.goodput import Goodput
from lcl_mcore.fault_tolerance.lease import RunLease
from lcl_mcore.fault_tolerance.recovery import Action, Recovery, batches_seen, skipped_ranges
from lcl_mcore.fault_tolerance.signals import StopRequest
from lcl_mcore.fault_tolerance.watchdog import Watchdog, explained
from lcl_mcore.lr_schedule import cosine_with_warmup
from lcl_mcore.metrics import DeferredStats, FinishedStep, RunLog, Speed, StepRecord, Stopwatch, step_metrics
from lcl_mcore.models.flops import MfuMeter
from lcl_mcore.models.transformer_config import DTYPES
from lcl_mcore.startup_summary import layout_name, startup_summary

STEPS_BETWEEN_GARBAGE_COLLECTIONS = 50


class Trainer:
    """One run on this rank, from its folder's newest checkpoint or from the start.

    Args:
        lease: says whether this job is still the one that may write.
        resume: continue from the newest complete checkpoint.
        start_over: start at step 0, and give what the folder holds of an earlier run other names.
        init_from: weights to start from instead of random ones.
    """

    @explained
    def __init__(
        self,
        config: RunConfig,
        context: Context,
        lease: RunLease,
        *,
        resume: bool,
        start_over: bool = False,
        init_from: Path | None = None,
    ) -> None:
        self.config, self.context, self.lease = config, context, lease
        self.stop = StopRequest(context.log)
        self.watchdog = Watchdog(config, context)
        training = build_training(config, context, init_from=init_from, observer=self.watchdog.stragglers)
        self.model, self.ddp, self.optimizer = training.model, training.ddp, training.optimizer
        self.step, self.choices = training.step, training.choices

        tensors = TrainingTensors(self.model, self.optimizer, context.groups.tp)
        self.checkpoints = open_checkpoints(config, context, tensors, resume or start_over, lease.require)
        restored = self.checkpoints.resume() if resume else None
        self.state = restored or TrainState(0, None, "", config_digest(config))
        self.recovery = Recovery(
            config.faults, self.state.position, skipped_ranges(context) if resume else [], context.groups.host_control
        )
        self.data_context, self.tokenizer = DataContext.of(config, context), tokenizer_for(config)
        self.loader = build_loader(config, self.data_context, self.tokenizer, self.state.position)
        self.evaluation = periodic_evaluation(config, context, self.tokenizer)
        self.finished = self.state.step >= config.train.steps

        # Whatever may refuse has not refused: from here on the folder is written to.
        lease.clear()
        if start_over:
            self.checkpoints.set_all_aside()
            if context.rank == 0:
                set_records_aside(context.run_folder)
        self.checkpoints.begin()
        if context.rank == 0 and not self.finished:
            self.write_config()
        self.flops = MfuMeter(config, context.device, DTYPES[config.train.precision], context.world_size)
        self.log = RunLog(config, context, self.state.step)
        self.events = EventLog(context.run_folder, enabled=context.rank == 0)
        layout = layout_name(config, context)
        self.goodput = Goodput(self.events, step=self.state.step, world_size=context.world_size, layout=layout)
        self.goodput.add_recomputed(self.log.lost_seconds)
        self.stats, self.speed = DeferredStats(context.device, config.loss), Speed()
        self.watch = Stopwatch()
        self.stopping = self.saving = False
        """Some rank asked to end the run, or for a checkpoint, with the last step that was accounted for."""

    def write_config(self) -> None:
        """Save the configuration in the run's folder; each checkpoint has its own copy, so a full disk ends nothing."""
        try:
            write_config(self.config, self.context.run_folder)
        except OSError as error:
            self.context.log(f"WARNING {self.context.run_folder / CONFIG}: cannot be written ({error.strerror})")

    @explained
    def train(self) -> int:
        """Train to the last step or a stop request; returns the process's exit code."""
        for line in startup_summary(self.config, self.context, self.model, self.choices):
            self.log.info(line)
        self.log.info(f"  {self.flops.describe()}")
        gc.disable()  # collected at steps of our choosing, so that no rank delays the others at random
        try:
            self.watch.lap()
            while self.state.step < self.config.train.steps and not self.stopping:
                self.train_step()
                if not self.account(self.stats.due()):
                    continue  # training goes on from an earlier state, or without the bad batch
                if self.save_is_due():
                    if not self.account(self.stats.drain()):
                        continue
                    self.save()
                if self.evaluation is not None and self.evaluation.due(self.state.step) and not self.stopping:
                    self.evaluate()
                if self.state.step % STEPS_BETWEEN_GARBAGE_COLLECTIONS == 1:
                    gc.collect()
            if self.finished:
                self.log_finished()
            if self.stopping:
                self.log.info(f"stopped by request after step {self.state.step}; continue with --resume")
            self.goodput.end()
            self.log.info(self.goodput.total().describe())
        except LclError:  # every rank is alive and leaves: a save under way is worth completing
            self.checkpoints.wait()
            raise
        finally:
            gc.enable()
            self.loader.close()
            self.log.close()
        self.watchdog.close()
        return 0

    def train_step(self) -> None:
        """Train on the next global batch; its numbers arrive with `self.stats`."""
        before, step = self.state, self.state.step
        waited = Stopwatch()
        batch = self.next_batch()
        data_seconds = waited.lap()
        self.goodput.start_step()
        self.watchdog.set_phase("step", step)
        optim = self.config.optim
        lr = cosine_with_warmup(step, self.config.train.steps, optim.warmup_steps, optim.lr, optim.min_lr)
        self.watchdog.stragglers.start_step()
        output = self.step.run(step, batch, lr, stop=self.stop_requested(), save=self.checkpoints.time_to_save())
        self.watchdog.stragglers.end_step(self.loader.read_seconds)
        self.state = replace(
            before,
            step=step + 1,
            images_seen=before.images_seen + sum(batch.counts.images),
            tokens_seen=before.tokens_seen + sum(batch.counts.tokens),
            position=batch.position,
            order_hash=batch.order_hash,
        )
        seconds = self.watch.lap()
        record = StepRecord(step, lr, batch, before, self.state.images_seen, seconds, data_seconds)
        self.stats.push(record, output)

    def next_batch(self) -> StepBatch:
        """The next batch that is to be trained on."""
        while True:
            self.watchdog.set_phase("data", self.state.step)
            try:
                batch = next(self.loader)
            except DataError:  # comes to every rank alike
                self.save_before_leaving()
                raise
            if not self.recovery.skips(batch):
                return batch
            self.log.info(f"batch {batch.number} skipped (order hash {batch.order_hash})")

    def account(self, finished: list[FinishedStep]) -> bool:
        """Log steps whose numbers have arrived, and act on those that must not count.

        Returns:
            Whether training goes on from the present state.

        Raises:
            NonFiniteError: a step was not finite, and the run must end.
        """
        for done in finished:
            if not done.stats.skipped:
                self.log_step(done)
            action = self.recovery.on_step(done, self.step.finite)
            if action != "continue":
                self.recover(done, action)
                return False
            self.stopping |= done.stats.stop_requests > 0
            self.saving |= done.stats.save_requests > 0
        return True

    def log_step(self, done: FinishedStep) -> None:
        """Write a step's metrics."""
        record = done.record
        self.speed.add(record.seconds, record.data_seconds)
        self.goodput.add_step(record.seconds, record.data_seconds)
        mfu = self.flops.mfu(record.batch, self.speed.step_seconds)
        metrics = step_metrics(self.config, done, self.speed, mfu)
        slowest = self.watchdog.stragglers.metrics(self.log.info, self.events)
        self.lease.require_lately()
        self.log.step({**metrics, "ettr": self.goodput.total().ettr, **slowest})

    def log_finished(self) -> None:
        """Say that a run was resumed which has nothing to do, and what that means for its new settings."""
        done, asked = self.state.step, self.config.train.steps
        self.log.info(f"nothing to train: {done} steps are done, --steps is {asked}; with more --steps the run goes on")
        if self.checkpoints.changes:
            self.log.info(f"these settings are new and were not used: {listed(self.checkpoints.changes)}")

    def evaluate(self) -> None:
        """Measure on held-out documents; a stop request that arrives meanwhile ends training after one more step."""
        assert self.evaluation is not None
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        step = self.state.step

        def stop() -> bool:
            self.watchdog.set_phase("evaluate", step - 1)
            return bool(self.stop)

        self.evaluation.run(self.model, step, stop, self.log)
        self.watch.lap()

    # --- steps that must not count ---

    def recover(self, bad: FinishedStep, action: Action) -> None:
        """Skip the batches of a bad step for good, here or from an earlier checkpoint on; all ranks together."""
        late = self.stats.drain()  # steps that were queued behind it
        newest = (late[-1] if late else bad).record
        skipped = self.recovery.skip(bad, newest)
        self.log.info(skipped.text)
        self.events.record("skip", batches=[skipped.first, skipped.last], step=bad.stats.step + 1, why=skipped.reason)
        if bad.stats.skipped:
            self.optimizer.skipped.zero_()  # parameters and moments are as before the step
        if action == "rollback":
            if self.roll_back(skipped.first):
                return
            self.log.info("WARNING no checkpoint is older than these batches: going on without going back")
        if bad.stats.skipped:  # as were those behind it
            position, order_hash = newest.batch.position, newest.batch.order_hash
            self.state = replace(bad.record.before, position=position, order_hash=order_hash)
        else:
            self.account(late)

    def roll_back(self, batch: int) -> bool:
        """Continue from the newest checkpoint that has not seen `batch`; False if there is none."""
        self.recovery.count_rollback(batch)
        self.watchdog.set_phase("restore", self.state.step)
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        earlier = self.checkpoints.go_back(lambda state: batches_seen(state) <= batch)
        if earlier is None:
            return False
        self.state = earlier
        self.loader.close()
        self.recovery.restore(self.state.position)
        self.loader = build_loader(self.config, self.data_context, self.tokenizer, self.state.position)
        self.goodput.add_recomputed(self.log.rewind(self.state.step))
        self.events.record("rollback", step=self.state.step, checkpoint=checkpoint_name(self.state.step))
        return True

    # --- checkpoints ---

    def save_before_leaving(self) -> None:
        """Keep what was trained when the run must end between two steps."""
        if self.account(self.stats.drain()):
            self.stopping = True
            self.save()

    def save_is_due(self) -> bool:
        """Whether this step ends with a checkpoint."""
        last = self.state.step == self.config.train.steps
        return last or self.stopping or self.saving or self.checkpoints.due(self.state.step)

    def stop_requested(self) -> bool:
        """Whether this rank asks all to end the run after the next step."""
        if self.checkpoints.out_of_time():
            self.stop.received = self.stop.received or "the time limit"
        saves_keep_failing = self.checkpoints.poll()
        return bool(self.stop) or saves_keep_failing

    def save(self) -> None:
        """Begin a checkpoint of the present state; the last one of a run is also completed."""
        final, self.saving = self.stopping or self.state.step == self.config.train.steps, False
        self.watchdog.set_phase("save", self.state.step - 1)
        self.lease.require_lately()
        if self.state.position is not None:  # something was trained on
            position = self.recovery.position(self.state.position)
            digest = config_digest(self.config)
            self.checkpoints.save(replace(self.state, position=position, config_digest=digest), final=final)
        self.goodput.add_checkpoint_stall(self.watch.lap())
