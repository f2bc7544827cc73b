"""The training loop: one page, read it from the top to the bottom.

What a step is stands in step.py and encoding.py, what the ranks tell each other in it in agreement.py, what it encodes
at once in loader/step_plan.py, where batches come from in batches.py, what is reported in health.py, how a stage is put
together in stages.py, and what is checked before that in checks.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bigdssm.checkpoints.checkpoint import ReadCheckpoint, TensorReader
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.cluster.faults import Faults
from bigdssm.cluster.monitor import SpikeAlert
from bigdssm.cluster.run_folder import RowLog
from bigdssm.cluster.signals import StopRequest
from bigdssm.cluster.watchdog import Watchdog
from bigdssm.config import StageConfig
from bigdssm.errors import DivergedError, Preempted
from bigdssm.evaluation.evaluate import Evaluation
from bigdssm.loader.batch import Batch
from bigdssm.loader.row_stream import RowStream
from bigdssm.loader.step_plan import StepDraft, TokenBudget, draft_step, most_needed
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.training.batches import Batches
from bigdssm.training.encoding import RandomState
from bigdssm.training.engine import Engine
from bigdssm.training.hard_negatives import HardNegativeRefresh
from bigdssm.training.health import Health
from bigdssm.training.objective import Objective
from bigdssm.training.optimizers import schedule_factor
from bigdssm.training.step import StepReport, StepResult, train_step
from bigdssm.training.validation import Validator, WeightAverage
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)


@dataclass
class StageProgress:
    """Where a stage stands; the same on every rank, and part of every checkpoint."""

    step: int = 0  # global batches consumed
    applied: int = 0  # of them, those whose gradients were applied; what the schedule counts
    skipped_in_row: int = 0
    best: float = float("-inf")  # validation NDCG@10
    best_step: int = 0
    validations_since_best: int = 0
    validated_at: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)  # every validation
    # Where the present part began, the run having gone on over new partitions: steps and schedule count from there.
    part_step: int = 0
    part_applied: int = 0

    def begin_part(self) -> None:
        """Begin a new part here; validations are then over other rows, so that none so far compares with them."""
        self.part_step, self.part_applied = self.step, self.applied
        self.best, self.best_step, self.validations_since_best, self.validated_at = float("-inf"), self.step, 0, -1


@dataclass
class RunMonitors:
    """What looks after a running stage."""

    watchdog: Watchdog
    stop: StopRequest
    faults: Faults
    alert: SpikeAlert

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Say that long work between steps gets on; where the run is asked to stop, leave it. A collective.

        Raises Preempted.
        """
        self.watchdog.beat(f"{what}: {done} of {total}")
        if self.stop.agreed():
            raise Preempted(f"asked to stop while {what}")


class SaveClock:
    """Tells when a checkpoint is due by time."""

    def __init__(self, every_minutes: float) -> None:
        self._every_s, self._since = 60.0 * every_minutes, time.monotonic()

    def restart(self) -> None:
        """Count from now on."""
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """Return whether the time is over on this rank; never where there is none."""
        return self._every_s > 0 and time.monotonic() - self._since >= self._every_s


@dataclass
class Stage:
    """Everything that a running stage consists of."""

    name: str
    folder: Path
    config: StageConfig
    origin: dict[str, Any]  # of every checkpoint: the resolved config, versions, the identity of the run
    budget: TokenBudget
    total_steps: int
    starts_trained: bool
    engine: Engine
    stream: RowStream
    batches: Batches
    mining: HardNegativeRefresh
    objective: Objective
    average: WeightAverage | None  # of the weights, for validation and best/
    validator: Validator
    initial_documents: DocumentVectors | None  # this rank's share by the initial weights, where mining has made them
    store: CheckpointStore
    async_checkpoints: bool
    save_clock: SaveClock
    health: Health
    watch: RunMonitors
    consumed_log: RowLog | None
    skipped_log: RowLog
    progress: StageProgress
    stream_step: int  # the first of the stream that is not consumed; the stream itself reads ahead


def train(stage: Stage) -> StageProgress:
    """Run `stage` from where its progress stands to its end and return the final progress. A collective.

    Raises DivergedError after too many non-finite steps in a row, Preempted where it was told to stop and has saved.
    """
    try:
        return _train(stage)
    except Preempted:
        save(stage, in_background=False)
        step = stage.progress.step
        raise Preempted(f"stopped on request after step {step}, saved; go on with --resume auto") from None


def _train(stage: Stage) -> StageProgress:
    config, progress = stage.config, stage.progress
    if progress.step == progress.part_step:
        if stage.starts_trained:
            # so that best/ is never worse than what the stage started from
            validate(stage, stage.initial_documents)
    elif _due(progress.step, config.validate_every_steps) and progress.validated_at != progress.step:
        validate(stage)  # a request to stop had broken it off
    elif progress.validated_at >= 0 and stage.validator.has_lost_best():
        begin_best_again(stage)
    stage.initial_documents = None
    while True:
        until_mined = stage.mining.steps_from(progress.step - progress.part_step)
        with closing(stage.batches.first(min(stage.total_steps - progress.step, until_mined))) as batches:
            _take_steps(stage, batches)
        if _is_over(stage):
            break
        stage.store.settle()  # what is being written needs what was mined before it
        with stage.health.timed("mining"):
            stage.batches.mined = stage.mining.again(progress.step - progress.part_step, progress.part_step)
    if progress.validated_at != progress.step:
        validate(stage)
    save(stage, in_background=False)
    stage.health.after_run()
    return progress


def _take_steps(stage: Stage, batches: Iterator[Batch]) -> None:
    """Take as many steps as there are batches, fewer where the stage is over before."""
    config, progress, health, watch = stage.config, stage.progress, stage.health, stage.watch
    objective = watch.faults.in_loss(stage.objective)
    part_steps = stage.total_steps - progress.part_step
    coming = _fetch(stage, batches) if not _is_over(stage) else None
    needs = None if coming is None else most_needed(coming.draft.needs)  # from here on agreed on one step ahead
    while coming is not None and not _is_over(stage):
        assert needs is not None
        batch, plan = coming.batch, coming.draft.agreed(needs)
        coming = _fetch(stage, batches)
        watch.watchdog.beat(f"step {progress.step}")
        watch.faults.in_step(progress.step)
        factor = schedule_factor(progress.applied - progress.part_applied, part_steps, config.optimizer)
        if stage.store.has_failed():
            watch.stop.ask()  # the ranks stop together; saving then tells what has failed
        further, note = stage.objective.model_inputs(batch), partial(_note, stage, batch, coming)
        result = train_step(stage.engine, batch, plan, objective, factor, further, note)
        needs = result.agreed.needs
        _count(stage, batch, result)
        if result.applied:
            if stage.average is not None:
                stage.average.update()
            watch.alert.after_step(progress.step, result.loss, batch.row_ids)
        health.after_step(progress.step, progress.applied, batch, result)
        if stage.stream.needs_check([note.report for note in result.agreed.notes], stage.stream_step):
            stage.stream.check(stage.stream_step)
        if _due(progress.step, config.validate_every_steps):
            validate(stage)
        if result.agreed.stop:
            raise Preempted("asked to stop")
        if not _is_over(stage) and (_due(progress.step, config.save_every_steps) or result.agreed.save):
            save(stage, stage.async_checkpoints)


class _Coming(NamedTuple):
    """The batch of the next step, and this rank's part of its plan."""

    batch: Batch
    draft: StepDraft


def _fetch(stage: Stage, batches: Iterator[Batch]) -> _Coming | None:
    """Return what the next step works on, None behind the last."""
    stage.watch.watchdog.beat(f"step {stage.progress.step}, waiting for rows")
    batch = stage.health.next_batch(batches)
    return None if batch is None else _Coming(batch, draft_step(batch, stage.budget))


def _note(stage: Stage, batch: Batch, coming: _Coming | None) -> StepReport:
    """Return what this rank tells the others in a step."""
    note = StepReport(stage.watch.stop.asked, stage.save_clock.is_over(), len(batch.query_ids), stage.stream.report())
    return note if coming is None else note._replace(needs=coming.draft.needs)


def validate(stage: Stage, documents: DocumentVectors | None = None) -> Evaluation | None:
    """Measure on the validation split; keep the weights in best/ where they are the best so far. A collective.

    Where there is a moving average of the weights, it is that. `documents` are the rank's share of the catalogue's
    index vectors by the present weights, where there are such already. Raises Preempted where the run is asked to stop
    meanwhile.
    """
    with nullcontext() if stage.average is None else stage.average.in_place():
        return _validate(stage, documents)


def _validate(stage: Stage, documents: DocumentVectors | None) -> Evaluation | None:
    progress = stage.progress
    evaluation = stage.validator.evaluate(stage.engine, stage.watch.progress, documents)
    score = evaluation.metrics["ndcg_at_10"] if evaluation else None
    progress.validated_at = progress.step
    if evaluation:
        progress.history.append({"step": progress.step, **evaluation.metrics})
        stage.health.after_validation(progress.step, evaluation)
    if score is None or score > progress.best:  # without a split the newest is best
        progress.best_step, progress.validations_since_best = progress.step, 0
        progress.best = progress.best if score is None else score
        stage.validator.keep(stage.engine, {"stage": stage.name, "step": progress.step, "validation": score})
    else:
        progress.validations_since_best += 1
    return evaluation


def begin_best_again(stage: Stage) -> None:
    """Let best/, which was lost, begin with the present weights. A collective."""
    progress, since = stage.progress, stage.progress.validations_since_best
    logger.warning(
        "%s: best/ of step %d is lost; the best from step %d on takes its place",
        stage.name, progress.best_step, progress.step,
    )  # fmt: skip
    progress.best = float("-inf")
    validate(stage)
    progress.validations_since_best = since  # a stage that was out of patience still is


def save(stage: Stage, in_background: bool) -> None:
    """Write a checkpoint of everything that the next step depends on, behind the next steps or now. A collective.

    What is still being written of the one before is waited for.
    """
    stage.stream.check(stage.stream_step)
    random = RandomState.now()
    rank_state = {"cpu": random.cpu} | ({"device": random.device} if random.device is not None else {})
    state = {
        "stream": stage.stream.state(stage.stream_step),
        "progress": asdict(stage.progress),
        **stage.origin,
    }
    stage.watch.watchdog.beat(f"the checkpoint of step {stage.progress.step}")
    between = stage.watch.faults.in_save(stage.progress.step)
    with stage.health.timed("checkpoint"):
        common = stage.objective.state() | ({} if stage.average is None else stage.average.state())
        stage.store.save(
            stage.progress.step, state, common, rank_state, stage.engine.own_pieces(),
            in_background=in_background, between=between,
        )  # fmt: skip
    stage.save_clock.restart()


def restore(
    checkpoint: ReadCheckpoint,
    read: TensorReader,
    engine: Engine,
    stream: RowStream,
    objective: Objective,
    new_part: bool,
) -> StageProgress:
    """Return the progress of a verified checkpoint, with everything else as it was. A collective.

    `new_part`: the stream's partitions were added since, it stays at its beginning. With another number of ranks than
    before the random states are new: dropout then draws other masks.
    """
    progress = StageProgress(**checkpoint.state["progress"])
    engine.restore(read, progress.applied)
    objective.restore(checkpoint.common_tensors())
    if checkpoint.rank_state is not None:
        RandomState(checkpoint.rank_state["cpu"], checkpoint.rank_state.get("device")).restore()
    if new_part:
        progress.begin_part()
    else:
        stream.step = checkpoint.state["stream"]["step"]
    return progress


def _count(stage: Stage, batch: Batch, result: StepResult) -> None:
    """Count a step as consumed, and as applied or skipped. Raises DivergedError."""
    progress, limit = stage.progress, stage.config.max_skipped_steps
    progress.step += 1
    stage.stream_step = batch.step + 1
    if stage.consumed_log is not None:
        stage.consumed_log.write(progress.step - 1, batch.row_ids)
    if result.applied:
        progress.applied += 1
        progress.skipped_in_row = 0
        return
    progress.skipped_in_row += 1
    stage.skipped_log.write(progress.step - 1, batch.row_ids)
    logger.warning(
        "step %d skipped: loss or gradient not finite; this rank's rows, %s …, are named in %s",
        progress.step, batch.row_ids[:8].tolist(), stage.skipped_log.path,
    )  # fmt: skip
    if progress.skipped_in_row >= limit:
        raise DivergedError(
            f"{stage.name} stopped at step {progress.step}: {limit} steps in a row had no finite loss and gradient; "
            f"lower optimizer.lr, or start again from a checkpoint in {stage.folder}"
        )


def _is_over(stage: Stage) -> bool:
    patience = stage.config.patience
    out_of_patience = patience > 0 and stage.progress.validations_since_best >= patience
    return out_of_patience or stage.progress.step >= stage.total_steps


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
