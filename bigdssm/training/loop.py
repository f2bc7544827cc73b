"""The training loop.

trainer.py builds the trainer, resume.py selects the checkpoint of a resume, batches.py builds batches,
loader/step_plan.py plans a step, step.py and encoding.py run it, health.py logs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial

from bigdssm.errors import DivergedError, Preempted
from bigdssm.loader.batch import Batch
from bigdssm.loader.step_plan import StepDraft, draft_step, max_requirements
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.training.resume import StageProgress
from bigdssm.training.step import StepReport, StepResult, train_step
from bigdssm.training.trainer import Trainer
from bigdssm.training.validation import BestSelection
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)


def train(trainer: Trainer) -> StageProgress:
    """Run a stage to its end and return the final progress. All ranks must call it.

    Raises DivergedError after too many non-finite steps in a row, Preempted after a requested stop, with a checkpoint.
    """
    try:
        return _train(trainer)
    except Preempted:
        save(trainer, in_background=False)
        step = trainer.progress.step
        raise Preempted(f"stopped on request after step {step}, saved; continue with --resume auto") from None
    finally:
        trainer.engine.destroy()


def _train(trainer: Trainer) -> StageProgress:
    progress = trainer.progress
    _validate_at_start(trainer)
    while True:
        with closing(trainer.batches(trainer.steps_to_refresh())) as batches:
            _take_steps(trainer, batches)
        if trainer.is_over():
            break
        trainer.refresh_hard_negatives()
    if progress.validated_at != progress.step:
        validate(trainer)
    save(trainer, in_background=False)
    trainer.health.after_run()
    return progress


def _validate_at_start(trainer: Trainer) -> None:
    """Validate the initial model, or repeat a validation that the interrupted run did not finish."""
    stage, progress = trainer.stage, trainer.progress
    documents, trainer.initial_documents = trainer.initial_documents, None
    if progress.step == progress.part_step:
        if trainer.starts_trained:
            validate(trainer, documents)  # so that best/ is never worse than the initial model
    elif progress.validated_at >= 0 and trainer.validator.is_best_missing():
        replace_best(trainer)
    elif _due(progress.step, stage.validate_every_steps) and progress.validated_at != progress.step:
        validate(trainer)  # the run was stopped during this validation


def _take_steps(trainer: Trainer, batches: Iterator[Batch]) -> None:
    """Take one step per batch, until the stage is over."""
    stage, progress, stop = trainer.stage, trainer.progress, trainer.stop
    loss_function = trainer.faults.wrap_objective(trainer.objective)
    coming = _fetch(trainer, batches) if not trainer.is_over() else None
    # A pipeline of one step: during step s, the batch of step s + 1 is fetched, and the ranks agree on its numbers of
    # chunks in the collective of step s.
    requirements = None if coming is None else max_requirements(coming[1].requirements)
    while coming is not None and not trainer.is_over():
        assert requirements is not None
        batch, draft = coming
        plan = draft.resolve(requirements)
        coming = _fetch(trainer, batches)
        trainer.watchdog.beat(f"step {progress.step}")
        trainer.faults.trigger_step_faults(progress.step)
        if trainer.store.has_failed():
            stop.request()  # the ranks stop together; saving then raises the error
        extra_inputs = trainer.objective.model_inputs(batch)
        make_report = partial(_report, trainer, batch, None if coming is None else coming[1])
        result = train_step(trainer.engine, batch, plan, loss_function, trainer.lr_factor(), extra_inputs, make_report)
        requirements = result.agreement.requirements
        _count(trainer, batch, result)
        if result.applied:
            if trainer.average is not None:
                trainer.average.update()
            trainer.alert.after_step(progress.step, result.loss, batch.row_ids)
        trainer.health.after_step(progress.step, progress.applied, batch, result)
        if trainer.stream.needs_check([report.rows for report in result.agreement.reports], trainer.stream_step):
            trainer.stream.check(trainer.stream_step)
        if _due(progress.step, stage.validate_every_steps):
            validate(trainer)
        if result.agreement.stop:
            raise Preempted("stop requested")
        if not trainer.is_over() and (_due(progress.step, stage.save_every_steps) or result.agreement.save):
            save(trainer, trainer.async_checkpoints)


def _fetch(trainer: Trainer, batches: Iterator[Batch]) -> tuple[Batch, StepDraft] | None:
    """Return the next batch and this rank's draft of its plan, None after the last."""
    trainer.watchdog.beat(f"step {trainer.progress.step}, waiting for rows")
    batch = trainer.health.next_batch(batches)
    return None if batch is None else (batch, draft_step(batch, trainer.engine.budget))


def _report(trainer: Trainer, batch: Batch, coming: StepDraft | None) -> StepReport:
    """Return this rank's report for the step synchronization; `coming` is the draft of the next step's plan."""
    report = StepReport(trainer.stop.requested, trainer.is_save_due(), len(batch.query_ids), trainer.stream.report())
    return report if coming is None else report._replace(requirements=coming.requirements)


def validate(trainer: Trainer, documents: DocumentVectors | None = None) -> None:
    """Evaluate on the validation split; write the weights, or their average, to best/ if they are selected.

    All ranks must call it. documents: this rank's index vectors of the catalogue by the current weights, if already
    computed. Raises Preempted on a requested stop.
    """
    progress = trainer.progress
    with nullcontext() if trainer.average is None else trainer.average.swapped_in():
        evaluation = trainer.validator.evaluate(trainer.engine, trainer.report_progress, documents)
        metric = trainer.stage.validation_metric
        score = evaluation.metrics[metric] if evaluation else None
        progress.validated_at = progress.step
        if evaluation:
            progress.history.append({"step": progress.step, **evaluation.metrics})
            trainer.health.after_validation(progress.step, evaluation, metric)
        is_taken, is_highest = True, True  # without newer rows to select by, the newest weights are the best
        if evaluation and trainer.validator.decides:
            of_start = trainer.starts_trained and progress.step == 0
            is_taken, is_highest = trainer.selection.add(evaluation, metric, of_start=of_start)
        progress.validations_since_best = 0 if is_highest else progress.validations_since_best + 1
        if is_taken:
            progress.best_step = progress.step
            progress.best = progress.best if score is None else score
            origin = {"stage": trainer.name, "step": progress.step, "validation": score}
            trainer.validator.save_best(trainer.engine, origin)


def replace_best(trainer: Trainer) -> None:
    """Write the current weights to best/, which was lost. All ranks must call it."""
    progress, since = trainer.progress, trainer.progress.validations_since_best
    logger.warning(
        "%s: best/ of step %d is missing; the weights of step %d replace it, and the selection starts again",
        trainer.name, progress.best_step, progress.step,
    )  # fmt: skip
    progress.best, trainer.selection = float("-inf"), BestSelection()
    validate(trainer)
    progress.validations_since_best = since  # patience does not start again


def save(trainer: Trainer, in_background: bool) -> None:
    """Write a checkpoint, optionally in the background.

    All ranks must call it. Waits for the previous one.
    """
    step = trainer.progress.step
    trainer.stream.check(trainer.stream_step)
    trainer.watchdog.beat(f"the checkpoint of step {step}")
    between = trainer.faults.checkpoint_hook(step)
    with trainer.health.timed("checkpoint"):
        trainer.store.save(step, **trainer.state_dict(), in_background=in_background, between=between)
    trainer.saved_at = time.monotonic()


def _count(trainer: Trainer, batch: Batch, result: StepResult) -> None:
    """Count a step as consumed, and as applied or skipped. Raises DivergedError."""
    progress, limit = trainer.progress, trainer.stage.max_skipped_steps
    progress.step += 1
    trainer.stream_step = batch.step + 1
    if trainer.consumed_log is not None:
        trainer.consumed_log.write(progress.step - 1, batch.row_ids)
    if result.applied:
        progress.applied += 1
        progress.skipped_in_row = 0
        return
    progress.skipped_in_row += 1
    trainer.skipped_log.write(progress.step - 1, batch.row_ids)
    logger.warning(
        "step %d skipped: loss or gradient not finite; this rank's rows, %s …, are listed in %s",
        progress.step, batch.row_ids[:8].tolist(), trainer.skipped_log.path,
    )  # fmt: skip
    if progress.skipped_in_row >= limit:
        raise DivergedError(
            f"{trainer.name} stopped at step {progress.step}: {limit} steps in a row had no finite loss and gradient; "
            f"lower optimizer.lr, or start again from a checkpoint in {trainer.folder}"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
