"""Putting a stage together from the config, and running it: pretraining, and fine-tuning (SFT) from its result."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import CHECKPOINTS, ReadCheckpoint, is_checkpoint
from bigdssm.checkpoints.model_folder import load_checkpoint_model, load_model_folder
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.cli import ProgressBar
from bigdssm.cluster.faults import Faults
from bigdssm.cluster.launcher import Launcher
from bigdssm.cluster.metrics import CONFIG_FILE, Trackers
from bigdssm.cluster.monitor import SpikeAlert
from bigdssm.cluster.run_folder import (
    CONSUMED,
    SKIPPED,
    STOP_FILE,
    FolderLock,
    RowLog,
    record_start,
    run_identity,
    versions,
)
from bigdssm.cluster.signals import StopRequest
from bigdssm.cluster.watchdog import Watchdog
from bigdssm.config import Config, EngineConfig, StageName, first_difference
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.loader.row_stream import RowStream
from bigdssm.loader.step_plan import TokenBudget
from bigdssm.models import DualEncoder, new_model
from bigdssm.models.precision import saved_precision, settle_precision
from bigdssm.retrieval.teacher_vectors import TeacherVectors
from bigdssm.training.batches import Batches, row_stream
from bigdssm.training.checks import check_agreement, check_folder, check_stage, initial_model
from bigdssm.training.engine import Engine, device, init_process_group
from bigdssm.training.hard_negatives import HardNegativeRefresh
from bigdssm.training.health import Health, describe_ranks
from bigdssm.training.loop import RunMonitors, SaveClock, Stage, StageProgress, restore, train
from bigdssm.training.objective import Objective
from bigdssm.training.optimizers import warmup_steps
from bigdssm.training.resume import GrownReader, check_length, check_origin, grow_model, part_steps
from bigdssm.training.validation import Validator, WeightAverage
from bigdssm.training.warm_start import start_items
from bigdssm.utils import atomic
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)
_training = threading.Lock()


@contextmanager
def sole_stage() -> Iterator[None]:
    """Hold this process for one stage: random state, process group and thread counts are the process's.

    Raises ConfigError where another thread trains.
    """
    if not _training.acquire(blocking=False):
        raise ConfigError(
            "a stage is training in this process, needs none: random numbers and the process group are shared by all "
            "threads; train one stage after the other, or each in a process of its own (bigdssm pretrain)"
        )
    try:
        yield
    finally:
        _training.release()


def run_stage(
    config: Config, name: StageName, *, resume: bool, validate_only: bool, world_size: int,
    launcher: Launcher | None = None, stop: StopRequest | None = None,
) -> StageProgress | None:  # fmt: skip
    """Check, build and train one stage on this rank, within `sole_stage`, and return its progress at the end.

    `validate_only` stops after the first batch was made and returns None.
    """
    dataset = check_stage(config, name, world_size)
    if not validate_only:
        check_folder(config, name, resume)
    stage_config, folder = config.stage(name), config.stage_dir(name)
    stop = stop or StopRequest()
    init_process_group()
    lock = FolderLock(folder)
    with ExitStack() as after:  # what ends behind the watchdog's back, such as trackers that upload
        watchdog = Watchdog(
            config.engine.peer_timeout_s, launcher or Launcher(), folder / STOP_FILE, lock.end, stop.ask
        )
        with watchdog:
            stop.at_end = watchdog.leave
            check_agreement(config, dataset)
            torch.manual_seed(config.run.seed)
            model = _model(config, name, dataset)
            stream = row_stream(
                config, stage_config, dataset, distributed.rank(), world_size, config.data.num_workers,
                quarantine=Path(config.run.dir) / f"quarantine-{distributed.rank():05d}.jsonl",
            )  # fmt: skip
            if validate_only:
                _report_valid(config, name, model, stream)
                check_folder(config, name, resume)  # last: it hides nothing that is wrong with the config
                return None
            after.enter_context(lock)
            store = after.enter_context(CheckpointStore(folder / CHECKPOINTS, stage_config.keep_checkpoints))
            checkpoint = store.newest_good() if resume else None
            run_id = run_identity(folder, checkpoint.state.get("run_id") if checkpoint is not None else None)
            if checkpoint is not None:
                check_origin(checkpoint, run_id, config, name)
            new_part = checkpoint is not None and not stream.check_state(checkpoint.state["stream"])
            if checkpoint is not None and not new_part:
                check_length(checkpoint, stage_config, name, stream.steps_per_epoch)
            _write_config(folder, config)
            done = StageProgress(**checkpoint.state["progress"]) if checkpoint is not None else StageProgress()
            trackers = Trackers(folder, config, done.step, len(done.history), cpu=device().type == "cpu")
            after.enter_context(closing(trackers))
            with ProgressBar() as bar, closing(stream):
                alert = SpikeAlert(folder, distributed.rank(), distributed.world_size(), done.step)
                watch = RunMonitors(watchdog, stop, Faults.from_environment(), alert)
                saved = checkpoint.state.get("precision") if checkpoint is not None else None
                how = settle_precision(config.engine, device().type, saved)
                origin = {
                    "config": config.to_dict(), "versions": versions(), "run_id": run_id,
                    "precision": saved_precision(config.engine, how),
                }  # fmt: skip
                stage = _assemble(
                    config, name, model, stream, store, checkpoint, new_part, trackers, bar, watch, how, origin
                )
                checkpoint = None  # all that was read of it is in its place: let go of it
                record_start(folder, stage.progress.step, stage.total_steps)
                logger.info(
                    "%s: %s, %d steps of %d rows on %s, from step %d, in %s",
                    name, config.data.webdataset or f"{dataset.num_rows('train'):,} rows", stage.total_steps,
                    stage_config.rows_global, describe_ranks(), stage.progress.step, folder,
                )  # fmt: skip
                stop.wait_for_steps()
                progress = train(stage)
    logger.info("%s finished: %s at step %d", name, describe_best(progress), progress.best_step)
    return progress


def describe_best(progress: StageProgress) -> str:
    """Return for example `best validation NDCG@10 0.1234`, of the present part."""
    if math.isfinite(progress.best):
        return f"best validation NDCG@10 {progress.best:.4f}"
    return "no validation split, the newest is best,"


def _assemble(
    config: Config, name: StageName, model: DualEncoder, stream: RowStream, store: CheckpointStore,
    checkpoint: ReadCheckpoint | None, new_part: bool, trackers: Trackers, bar: ProgressBar, watch: RunMonitors,
    how: EngineConfig, origin: dict[str, Any],
) -> Stage:  # fmt: skip
    stage_config, folder, dataset = config.stage(name), config.stage_dir(name), stream.dataset
    rows_per_rank = stage_config.rows_global // distributed.world_size()
    if checkpoint is not None:
        read = GrownReader(checkpoint, model) if new_part else checkpoint.reader()
        model.load_state_dict(read.weights())
    elif stage_config.warm_start.window:
        start_items(model, dataset, stage_config.warm_start)
    if how.checkpoint_activations:
        model.checkpoint_activations()
    engine = Engine(model, how, stage_config.optimizer, max(1, rows_per_rank))
    loss = stage_config.loss
    counts = stream.doc_weights() if loss.sampling != "none" and loss.frequency == "counts" else None
    objective = Objective(loss, config.model, how.loss_tile, counts, stream.queries_per_step, engine.product_dtype)
    mining = HardNegativeRefresh(config, name, engine, dataset, folder, watch.progress)
    before = StageProgress(**checkpoint.state["progress"]) if checkpoint is not None and not new_part else None
    mined, documents = mining.begin(0 if before is None else before.step - before.part_step, before is not None)
    torch.manual_seed(config.run.seed * 1_000_003 + distributed.rank() + 1)  # dropout differs between ranks
    progress = StageProgress()
    if checkpoint is not None:
        progress = restore(checkpoint, read, engine, stream, objective, new_part)
        over = f", at the beginning of {', '.join(p.name for p in dataset.partitions)}" if new_part else ""
        logger.info("%s goes on from %s%s", name, checkpoint.path, over)
    average = WeightAverage(engine.module, stage_config.weight_average) if stage_config.weight_average else None
    if average is not None and checkpoint is not None:
        average.restore(checkpoint.common_tensors())
        documents = None  # of the weights, where validation takes their average
    steps = part_steps(stage_config, stream.steps_per_epoch)
    total_steps, warmup = progress.part_step + steps, warmup_steps(steps, stage_config.optimizer)
    if warmup < stage_config.optimizer.warmup_steps:
        logger.warning(
            "%s.optimizer.warmup_steps=%d is more than half of the %d steps: warm-up takes %d of them",
            name, stage_config.optimizer.warmup_steps, steps, warmup,
        )  # fmt: skip
    row_log = partial(
        RowLog, folder, rank=distributed.rank(), world_size=distributed.world_size(), next_step=progress.step
    )
    return Stage(
        name=name,
        folder=folder,
        config=stage_config,
        origin=origin,
        budget=TokenBudget.of(how, cast(DualEncoder, engine.module).packs(training=True)),
        total_steps=total_steps,
        starts_trained=initial_model(config, name) is not None or progress.part_step > 0,
        engine=engine,
        stream=stream,
        batches=Batches(
            stream,
            loss,
            mined,
            config.run.seed,
            device(),
            stage_config.mining.teacher_margin,
            None if stage_config.teacher is None else TeacherVectors(Path(stage_config.teacher)),
        ),
        mining=mining,
        objective=objective,
        average=average,
        validator=Validator(dataset, config, name, rows_per_chunk=1024),
        initial_documents=documents,
        store=store,
        async_checkpoints=how.async_checkpoints,
        save_clock=SaveClock(stage_config.save_every_minutes),
        health=Health(name, engine, trackers, bar, total_steps, stage_config.rows_global, stage_config.log_every_steps),
        watch=watch,
        consumed_log=row_log(CONSUMED) if config.debug.log_row_ids else None,
        skipped_log=row_log(SKIPPED),
        progress=progress,
        stream_step=stream.step,
    )


def _model(config: Config, name: StageName, dataset: Dataset) -> DualEncoder:
    """Return a new model, or the one that the stage starts from, checked against dataset and config.

    Where the stage's loss trains a scorer, the model has a new one.
    """
    source, scorer = initial_model(config, name), config.stage(name).loss.scorer
    if source is None:
        # .train(), since transformers gives a pretrained encoder out in evaluation mode
        return new_model(config.model, dataset.schema, dataset.pad_token_id, dataset.vocab_size, scorer).train()
    if is_checkpoint(source):
        loaded = load_checkpoint_model(source, scorer)
    else:
        loaded = load_model_folder(source, scorer=scorer)
    if loaded.model.scorer is not None and scorer is None:
        raise ConfigError(f"{source} has a scorer, which {name} would not train; start from a model without")
    loaded.view(dataset)
    grow_model(loaded.model, dataset.schema)
    difference = _model_difference(loaded.config, config)
    if difference:
        raise ConfigError(f"{source} was trained with another model section: {difference}; use the same in this config")
    loaded.model.train()
    logger.info("%s starts from %s", name, source)
    return loaded.model


def _model_difference(theirs: Config, mine: Config) -> str | None:
    """Return the first key in which two model sections differ; what only training looks at may."""

    def shape(config: Config) -> dict[str, Any]:
        model = config.to_dict()["model"]
        for side in ("query", "doc"):
            for section in (model[side], model[side]["history"]):
                section.pop("dropout"), section.pop("item_dropout", None)
        return {key: value for key, value in model.items() if key not in ("alpha_init", "alpha_learned", "beta_init")}

    return first_difference(shape(theirs), shape(mine), "model")


def _write_config(folder: Path, config: Config) -> None:
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
    distributed.barrier()


def _report_valid(config: Config, name: StageName, model: DualEncoder, stream: RowStream) -> None:
    stage = config.stage(name)
    batch = next(iter(Batches(stream, replace(stage.loss, negatives=0), None, config.run.seed, device())))
    parameters, steps = sum(p.numel() for p in model.parameters()), part_steps(stage, stream.steps_per_epoch)
    logger.info(
        "%s is valid: %s parameters, %d steps, a first batch of %d rows and %d documents on rank 0",
        name, f"{parameters:,}", steps, len(batch.query_ids), len(batch.doc_ids),
    )  # fmt: skip
