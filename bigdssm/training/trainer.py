"""Training of a stage: steps, validations and checkpoints, from top to bottom.

stages.py builds the trainer of a stage. A step is in step.py, its batches are in batches.py and loader/, its log line
and its record in metrics_logger.py, the state of a resume in start.py.
"""

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigdssm.checkpoints.checkpoint import TRAINED_CODES, TensorReader
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.cluster.monitor import SpikeAlert
from bigdssm.cluster.run_folder import RowLog
from bigdssm.cluster.signals import StopRequest
from bigdssm.cluster.watchdog import Watchdog
from bigdssm.config import StageConfig, StageName
from bigdssm.errors import DivergedError, Preempted
from bigdssm.loader.batch import Batch
from bigdssm.loader.step_plan import ChunkCounts, LocalStepPlan, StepPlan, max_over_ranks, plan_locally
from bigdssm.loader.stream import RowStream
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.training.batches import BatchBuilder, read_batches
from bigdssm.training.engine import Engine
from bigdssm.training.metrics_logger import MetricsLogger
from bigdssm.training.objective import Objective
from bigdssm.training.optimizers import schedule_factor
from bigdssm.training.process_group import device
from bigdssm.training.refresh import HardNegativeRefresh, ItemContents
from bigdssm.training.start import StageProgress, StartPoint
from bigdssm.training.step import RankReport, StepResult, train_step
from bigdssm.training.validation import BestSelection, Validator, WeightAverage
from bigdssm.utils import timing
from bigdssm.utils.device import RandomState
from bigdssm.utils.log import Progress, get_logger

logger = get_logger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """A stage on this rank: its model, data, loss and progress. All ranks must call each of the methods.

    `state_dict` returns the complete training state. A resumed stage restores it in this order: precision, before the
    engine is built; weights, before the engine copies them; hard negatives, before the first batch; and in
    `load_state_dict` optimizer, loss, weight average, random states, position in the stream.
    """

    name: StageName
    stage: StageConfig
    folder: Path
    origin: dict[str, Any]  # of the checkpoints: config, versions, run, precision
    stream: RowStream
    # The next step of the stream to consume, counted from 0 in each segment; `stream.step` is the next one to read, and
    # ahead of it. `progress.step` counts the steps of all segments, `progress.applied` those that were not skipped.
    stream_step: int
    batch_builder: BatchBuilder
    engine: Engine
    objective: Objective
    mining: HardNegativeRefresh
    contents: ItemContents | None  # of items, with model.query.history.items
    validator: Validator
    average: WeightAverage | None
    starts_trained: bool  # from the weights of another stage or segment
    start_folder: Path | None  # a model folder with exactly the initial weights, which best/ keeps if they are the best
    lr_ratio: float  # of all learning rates; below 1 where the stage continues a model on newer data
    initial_documents: DocumentVectors | None  # this rank's, of the initial weights, if mining encoded them
    store: CheckpointStore
    async_checkpoints: bool
    metrics_logger: MetricsLogger
    alert: SpikeAlert
    consumed_log: RowLog | None
    skipped_log: RowLog
    watchdog: Watchdog
    stop: StopRequest
    report_progress: Progress  # of work between steps; raises Preempted on a requested stop
    progress: StageProgress
    total_steps: int
    selection: BestSelection = field(default_factory=BestSelection)
    saved_at: float = field(default_factory=time.monotonic)

    def train(self) -> StageProgress:
        """Run the stage to its end and return the final progress.

        Raises DivergedError after too many non-finite steps in a row, Preempted after a requested stop, with a
        checkpoint.
        """
        try:
            self._validate_at_start()
            while True:
                # the steps until the stage ends or hard negatives are mined again
                segment_start = self.progress.segment_start_step
                segment_step = self.progress.step - segment_start
                steps = min(self.total_steps - self.progress.step, self.mining.steps_to_refresh(segment_step))
                with closing(read_batches(self.stream, self.batch_builder, device(), steps)) as batches:
                    self._take_steps(batches)
                if self.is_over():
                    break
                self.store.wait()  # a checkpoint in progress needs the current file of hard negatives
                with self.metrics_logger.timed("mining"):
                    segment_step = self.progress.step - segment_start
                    self.batch_builder.hard_negatives = self.mining.refresh(segment_step, segment_start)
            if self.progress.validated_at != self.progress.step:
                self.validate()
            self.save(in_background=False)
            self.metrics_logger.after_run()
        except Preempted:
            self.save(in_background=False)
            step = self.progress.step
            raise Preempted(f"stopped on request after step {step}, saved; continue with --resume auto") from None
        finally:
            self.engine.destroy()
        return self.progress

    def probe(self) -> None:
        """Take the steps of a short stage, without validations and checkpoints."""
        try:
            with closing(read_batches(self.stream, self.batch_builder, device(), self.total_steps)) as batches:
                self._take_steps(batches)
        finally:
            self.engine.destroy()

    def _take_steps(self, batches: Iterator[Batch]) -> None:
        """Take one step per batch, until the stage is over; validate and save when they are due."""
        stage, progress = self.stage, self.progress
        upcoming = self._fetch(batches) if not self.is_over() else None
        # A pipeline of one step: during step s, the batch of step s + 1 is fetched, and the ranks agree on its numbers
        # of chunks in the collective of step s.
        counts = ChunkCounts() if upcoming is None else max_over_ranks(upcoming[1].counts)
        while upcoming is not None and not self.is_over():
            batch, plan = upcoming
            upcoming = self._fetch(batches)
            result = self.train_step(batch, plan.synchronized(counts), None if upcoming is None else upcoming[1])
            reported = [report.chunks for report in result.reports]
            counts = ChunkCounts(*map(max, zip(*reported, strict=True)))  # the maximum over ranks, per field
            if self.stream.needs_check([report.rows for report in result.reports], self.stream_step):
                self.stream.check(self.stream_step)
            if _is_due(progress.step, stage.validate_every_steps):
                self.validate()
            if result.stop:
                raise Preempted("stop requested")
            is_save_due = _is_due(progress.step, stage.save_every_steps) or any(r.save for r in result.reports)
            if is_save_due and not self.is_over():
                self.save(self.async_checkpoints)

    def _fetch(self, batches: Iterator[Batch]) -> tuple[Batch, LocalStepPlan] | None:
        """Return the next batch and this rank's plan of it, None after the last."""
        self.watchdog.record_progress(f"step {self.progress.step}, waiting for rows")
        with timing.span("data wait"):
            batch = next(batches, None)
        return None if batch is None else (batch, plan_locally(batch, self.engine.budget))

    def train_step(self, batch: Batch, plan: StepPlan, next_plan: LocalStepPlan | None) -> StepResult:
        """Take a step on a batch; count and log it. next_plan: this rank's plan of the next step, if any.

        Raises DivergedError: too many non-finite steps in a row.
        """
        stage, progress = self.stage, self.progress
        self.watchdog.record_progress(f"step {progress.step}")
        if self.store.has_failed():
            self.stop.request()  # the ranks stop together; saving then raises the error

        def make_report() -> RankReport:
            # a checkpoint is due if the last one is older than the config allows
            every_s = 60.0 * stage.save_every_minutes
            is_save_due = every_s > 0 and time.monotonic() - self.saved_at >= every_s
            return RankReport(
                stop=self.stop.requested,
                save=is_save_due,
                queries=len(batch.query_ids),
                rows=self.stream.counts(),
                chunks=ChunkCounts() if next_plan is None else next_plan.counts,
            )

        # the schedule counts the applied steps of the segment
        segment_steps = self.total_steps - progress.segment_start_step
        applied = progress.applied - progress.segment_start_applied
        lr_factor = self.lr_ratio * schedule_factor(applied, segment_steps, stage.optimizer)
        if self.contents is not None:
            self.contents.use(batch.step)
        result = train_step(self.engine, batch, plan, self.objective, lr_factor, make_report)
        self.objective.step(result.applied, lr_factor)

        progress.step += 1
        self.stream_step = batch.step + 1
        if self.consumed_log is not None:
            self.consumed_log.write(progress.step, batch.row_ids)
        if result.applied:
            progress.applied += 1
            progress.skipped_in_row = 0
            if self.average is not None:
                self.average.update()
            self.alert.after_step(progress.step, result.loss, batch.row_ids)
        else:
            progress.skipped_in_row += 1
            self.skipped_log.write(progress.step, batch.row_ids)
            logger.warning(
                "step %d skipped: loss or gradient not finite; this rank's rows, %s …, are listed in %s",
                progress.step, batch.row_ids[:8].tolist(), self.skipped_log.path,
            )  # fmt: skip
            if progress.skipped_in_row >= stage.max_skipped_steps:
                raise DivergedError(
                    f"{self.name} stopped at step {progress.step}: {stage.max_skipped_steps} steps in a row had no "
                    f"finite loss and gradient; lower optimizer.lr, or start again from a checkpoint in {self.folder}"
                )
        self.metrics_logger.after_step(progress.step, progress.applied, batch, result)
        return result

    def is_over(self) -> bool:
        """Return True if all steps are taken, or patience is exhausted."""
        patience = self.stage.patience
        out_of_patience = patience > 0 and self.progress.validations_since_best >= patience
        return out_of_patience or self.progress.step >= self.total_steps

    def keeps_start(self) -> bool:
        """Return True if best/ has the trained weights that this segment started from."""
        return self.starts_trained and self.progress.best_step == self.progress.segment_start_step

    def _validate_at_start(self) -> None:
        """Validate the initial model, or repeat a validation that the interrupted run did not finish."""
        progress = self.progress
        documents, self.initial_documents = self.initial_documents, None
        if progress.step == progress.segment_start_step:
            if self.starts_trained:
                self.validate(documents)  # so that best/ is never worse than the initial model
        elif progress.validated_at >= 0 and self.validator.is_best_missing():
            since = progress.validations_since_best
            logger.warning(
                "%s: best/ of step %d is missing; the weights of step %d replace it, and the selection starts again",
                self.name, progress.best_step, progress.step,
            )  # fmt: skip
            progress.best, self.selection = float("-inf"), BestSelection()
            self.validate()
            progress.validations_since_best = since  # patience does not start again
        elif _is_due(progress.step, self.stage.validate_every_steps) and progress.validated_at != progress.step:
            self.validate()  # the run was stopped during this validation

    def validate(self, documents: DocumentVectors | None = None) -> None:
        """Evaluate on the validation split; write the weights, or their average, to best/ if they are selected.

        documents: this rank's index vectors of the catalogue by the current weights, if already computed. Raises
        Preempted on a requested stop.
        """
        progress, metric = self.progress, self.stage.validation_metric
        with nullcontext() if self.average is None else self.average.swapped_in():
            evaluation = self.validator.evaluate(self.engine, self.report_progress, documents)
            progress.validated_at = progress.step
            # best/ takes the weights if `is_taken`; patience starts again if `is_highest`. They differ: weights whose
            # score is within the error of the highest are taken, too. Where validations do not decide (no rows, or only
            # rows older than the training data), the newest weights are taken.
            score, is_taken, is_highest = None, True, True
            if evaluation:
                score = evaluation.metrics[metric]
                progress.history.append({"step": progress.step, **evaluation.metrics})
                self.metrics_logger.after_validation(progress.step, evaluation, metric)
                if self.validator.decides:
                    of_start = self.starts_trained and progress.step == 0
                    is_taken, is_highest = self.selection.add(evaluation, metric, of_start=of_start)
            progress.validations_since_best = 0 if is_highest else progress.validations_since_best + 1
            if is_taken:
                progress.best_step = progress.step
                progress.best = progress.best if score is None else score
                is_start = self.keeps_start()
                origin = {"stage": self.name, "step": progress.step, "validation": score, "initial": is_start}
                self.validator.save_best(self.engine, origin, retained=self.start_folder if is_start else None)

    def save(self, in_background: bool) -> None:
        """Write a checkpoint, optionally in the background, after the previous one."""
        step = self.progress.step
        self.stream.check(self.stream_step)
        self.watchdog.record_progress(f"the checkpoint of step {step}")
        with self.metrics_logger.timed("checkpoint"):
            self.store.save(step, **self.state_dict(), in_background=in_background)
        self.saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the complete training state, as arguments of `CheckpointStore.save`."""
        random = RandomState.now()
        return {
            "state": {
                "stream": self.stream.state(self.stream_step),
                "progress": self.progress.state_dict(),
                **self.origin,
            },
            "common": self.objective.state_dict()
            | ({} if self.average is None else self.average.state_dict())
            | ({} if self.contents is None else self.contents.state_dict())
            | self.selection.state_dict()
            | {TRAINED_CODES + n: torch.tensor(codes) for n, codes in self.stream.dataset.schema.trained.items()},
            "rank_state": {"cpu": random.cpu} | ({} if random.device is None else {"device": random.device}),
            "pieces": self.engine.local_pieces(),
            "tables": self.engine.tables,
        }

    def load_state_dict(self, start: StartPoint, read: TensorReader) -> None:
        """Restore the state of a checkpoint, read by `read`; the model's weights and tables are set already.

        Not restored: the stream's position in a new segment; random states (dropout) at another world size.
        """
        assert start.checkpoint is not None
        self.engine.restore(read, start.progress.applied)
        common = start.checkpoint.common_tensors()
        self.objective.load_state_dict(common)
        if self.average is not None and not start.new_codes:
            self.average.load_state_dict(common)
        if (random := start.checkpoint.rank_state) is not None:
            RandomState(random["cpu"], random.get("device")).restore()
        if start.same_segment:
            self.selection.load_state_dict(common)
            if self.contents is not None:
                self.contents.load_state_dict(common)
            self.stream.step = self.stream_step = start.checkpoint.state["stream"]["step"]
        names = ", ".join(partition.name for partition in self.stream.dataset.partitions)
        segment = "" if start.same_segment else f", at the beginning of {names}"
        logger.info("%s continues from %s%s", self.name, start.checkpoint.path, segment)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
