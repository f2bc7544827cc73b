"""Set up and run a stage: pretraining, or fine-tuning (SFT) from its result; the Python API.

A stage trains in this process, alone or as a rank of a launcher.
"""

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import CHECKPOINTS, checkpoints_in, tensor_names
from bigdssm.checkpoints.model_folder import (
    dense_tables,
    is_model_folder,
    load_initial_model,
    load_model_folder,
    model_identity,
    read_model_meta,
    weight_names,
)
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.checkpoints.training_record import TRAINED, TrainingRecord
from bigdssm.cluster.launcher import LauncherMonitor, check_launch
from bigdssm.cluster.metrics import CONFIG_FILE, Trackers
from bigdssm.cluster.monitor import SpikeAlert
from bigdssm.cluster.run_folder import CONSUMED, SKIPPED, STOP_FILE, FolderLock, RowLog, record_start, versions
from bigdssm.cluster.signals import StopRequest
from bigdssm.cluster.watchdog import Watchdog
from bigdssm.config import Config, FrequencyCorrection, StageName, config_of, differences
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import CheckpointError, ConfigError, Preempted
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.loader.stream import RowStream
from bigdssm.loader.workers import fork_server
from bigdssm.models import DualEncoder, new_model
from bigdssm.models.encoders.text import text_configs
from bigdssm.models.precision import resolve_engine_precision
from bigdssm.retrieval.vectors import open_vectors
from bigdssm.tables.files import MappedTables, load_tables
from bigdssm.tables.sharded import ShardedTables
from bigdssm.training.batches import BatchBuilder, FixedDocuments, read_batches, row_stream
from bigdssm.training.chain_start import initialize_from_chain
from bigdssm.training.checks import check_agreement, check_stage, check_tables, model_difference
from bigdssm.training.engine import Engine, frozen_checksum, partitioned_loading, set_weights
from bigdssm.training.metrics_logger import MetricsLogger
from bigdssm.training.objective import Objective
from bigdssm.training.optimizers import warmup_steps
from bigdssm.training.patches import undo_patches
from bigdssm.training.process_group import device, init_process_group, leave_process_group
from bigdssm.training.refresh import HardNegativeRefresh, ItemContents, contents_period
from bigdssm.training.start import (
    NEW_ROWS,
    GrownReader,
    StageProgress,
    StartPoint,
    check_folder,
    continues_model,
    find_start,
    initial_provenance,
    limit_ids,
    segment_steps,
    starts_trained,
)
from bigdssm.training.trainer import Trainer
from bigdssm.training.validation import Validator, WeightAverage
from bigdssm.training.warm_start import initialize_item_embeddings
from bigdssm.utils import atomic
from bigdssm.utils.arguments import checked
from bigdssm.utils.device import RandomState
from bigdssm.utils.log import ProgressBar, default_logging, get_logger, metric_label

logger = get_logger(__name__)
START_MODEL = "start_model"  # in the state of a checkpoint


def build_model(config: Config, name: StageName, dataset: Dataset, resume: bool) -> tuple[DualEncoder, Schema | None]:
    """Build a new model, or load the initial model and check it against dataset and config; return it with its schema.

    A resumed stage takes vocabularies and architecture from here, and weights
    from the checkpoint; tables that were weights in it are not sharded if they have grown.
    """
    source = config.initial_model(name)
    if source is None:
        # .train(), since transformers returns pretrained encoders in evaluation mode
        saved = checkpoints_in(config.stage_dir(name) / CHECKPOINTS)[-1:] if resume else []
        dense = dense_tables(name for path in saved for name in tensor_names(path))
        is_copied = config.stage(name).documents.model is not None  # a document tower that is copied is whole
        loading = None if is_copied else partitioned_loading(config.engine, config.stage(name).optimizer)
        model = new_model(config.model, dataset.schema, dataset.vocab_size, loading=loading, dense=dense)
        return model.train(), None
    loaded = load_initial_model(source, config.model)
    loaded.view(dataset)
    # values of new partitions extend the vocabularies
    for table, (old_rows, new_rows) in loaded.model.tables.grow(dataset.schema).items():
        logger.info(NEW_ROWS, f"table {table}", old_rows, new_rows - old_rows)
    loaded.model.schema = dataset.schema
    difference = model_difference(loaded.config, config)
    if difference:
        raise ConfigError(f"{source} was trained with another model section: {difference}; use the same in this config")
    # a loaded model retains its own settings of training
    changes = differences(loaded.config.to_dict()["model"], config.to_dict()["model"], "model")
    settings = ("dropout", "item_dropout", "transition_dropout", "alpha_learned")
    retained = [f"{key}={was} (not {now})" for key, was, now in changes if key.rpartition(".")[2] in settings]
    if retained:
        logger.warning("%s keeps the settings of %s: %s", name, source, ", ".join(retained))
    loaded.model.train()
    logger.info("%s starts from %s", name, source)
    return loaded.model, loaded.schema


def fix_documents(model: DualEncoder, config: Config, name: StageName, dataset: Dataset) -> FixedDocuments | None:
    """Copy and freeze the document tower of a stage that does not train it, and open its vectors; else return None.

    Raises CheckpointError: `documents.model` is no model of this dataset, or the vectors are of another model or
    dataset; ConfigError: its document tower differs from the one in `config`.
    """
    documents = config.stage(name).documents
    if documents.model is None or documents.vectors is None:
        return None
    source = load_model_folder(Path(documents.model))
    source.view(dataset)
    trained = source.config
    if shared := text_configs(trained.model, source.schema).get("shared"):  # by default that of the queries
        trained = replace(trained, model=replace(trained.model, doc=replace(trained.model.doc, text=shared)))
    if difference := model_difference(trained, config, omitted=("query", "share_text")):
        raise ConfigError(f"{documents.model} was trained with another model section: {difference}; use the same here")
    model.freeze_documents(source.model.state_dict())
    vectors = open_vectors(Path(documents.vectors), source.doc_checksum, dataset.whole, source.index_width)
    return FixedDocuments(vectors, source.doc_checksum)


def build_trainer(
    config: Config, name: StageName, model: DualEncoder, stream: RowStream, start: StartPoint,
    documents: FixedDocuments | None = None, *,
    store: CheckpointStore, trackers: Trackers, bar: ProgressBar, watchdog: Watchdog, stop: StopRequest,
) -> Trainer:  # fmt: skip
    """Build the trainer of a stage and restore it to `start`. All ranks must call it.

    Raises CheckpointError: hard negatives of a resumed run are missing; Preempted: a stop is requested while they are
    mined.
    """
    stage, progress, dataset = config.stage(name), start.progress, stream.dataset
    rank, world_size, folder = distributed.rank(), distributed.world_size(), config.stage_dir(name)

    # Precision and weights, then the engine, which copies the weights.
    precision = None if start.checkpoint is None else start.checkpoint.state["precision"]  # at the start of the run
    engine_config = resolve_engine_precision(config.engine, model, device().type, precision)
    read = None
    if start.checkpoint is not None:  # in a new segment, with rows added for a larger model
        is_grown = not start.same_segment
        read = GrownReader(start.checkpoint, model, start.new_codes) if is_grown else start.checkpoint.reader()
    if read is None:
        model.tables.start_unknown(start.new_codes)
    else:
        set_weights(model, read)
    if engine_config.checkpoint_activations:
        model.checkpoint_activations()
    tables = None
    if specs := model.tables.sharded:
        memory = engine_config.table_memory
        table_folder = Path(config.engine.table_dir or config.stage_dir(name) / "table_rows")
        tables = ShardedTables(
            list(specs.values()), stage.table_optimizer, config.run.seed, device=device(),
            storage=device() if memory == "device" else torch.device("cpu"),
            folder=table_folder if memory == "file" else None,
            dtype=torch.bfloat16 if config.engine.precision == "bf16_pure" else torch.float32,
        )  # fmt: skip
        # the rows of a resumed stage, from which rows may have been evicted, are in its checkpoint
        if isinstance(model.tables.source, MappedTables) and read is None:
            load_tables(tables, model.tables.source, states=False)
        for spec in specs.values():
            share = tables.partition.capacity(spec.stored_rows)
            here = "stored as they are trained" if spec.is_keyed else f"up to {share} here"
            logger.info("table %s: %d rows of width %d sharded over the ranks, %s, in %s memory",
                        spec.name, spec.stored_rows, spec.dim, here, memory)  # fmt: skip
    if read is None and config.initial_model(name) is None:
        if stage.warm_start.chain:
            initialize_from_chain(model, dataset.whole, stage.warm_start, config.run.seed)
        elif stage.warm_start.window:
            initialize_item_embeddings(model, dataset.whole, stage.warm_start, tables)
    engine = Engine(model, engine_config, stage.optimizer, max(1, stage.rows_global // world_size), tables)
    frozen = frozen_checksum(model)
    if start.checkpoint is not None and start.same_segment and frozen != start.checkpoint.state["frozen"]:
        raise CheckpointError(
            f"checkpoint {start.checkpoint.path} was written with other frozen weights; restore the model that the "
            "stage starts from (STAGE.init, text.init), and engine.precision if it was changed to or from bf16_pure, "
            "which rounds them, or choose another run.dir"
        )
    start_folder = find_start_folder(config, name, model, start)
    earlier = earlier_training(config, name, start)
    start_model = find_start_model(config, name, start, start_folder)
    own = training_of(dataset, stream) if distributed.is_main() else TrainingRecord({})  # reads blocks
    trained = distributed.broadcast_object(own).after(earlier)
    origin: dict[str, Any] = {
        "config": config.to_dict(), "versions": versions(), "run_id": start.run_id, "stage": name,
        "precision": {"requested": config.engine.precision, "computed": engine_config.precision},
        "frozen": frozen, TRAINED: trained.as_json(), START_MODEL: start_model,
    }  # fmt: skip
    if read is not None and tables is not None:  # before negatives are mined
        assert start.checkpoint is not None
        load_tables(tables, MappedTables(start.checkpoint.table_files(), tables.specs), states=True)
        tables.steps = progress.applied
    for table, codes in start.new_codes.items():
        if tables is not None and table in tables.stores and not tables.specs[table].hash_rows:
            unknown = tables.look_up(table, torch.tensor([OUT_OF_VOCABULARY]))
            tables.stores[table].initialize(codes, unknown.expand(len(codes), -1), tables.steps)

    # The batches with their hard negatives, and the loss.
    average = WeightAverage(engine.module, stage.weight_average) if stage.weight_average else None

    def report_progress(task: str, done: int, total: int | None) -> None:
        watchdog.record_progress(f"{task}: {done} of {total}")
        if stop.any_rank_requested():
            raise Preempted(f"stopped on request while {task}; continue with --resume auto")

    mining = HardNegativeRefresh(config, name, engine, dataset, report_progress, documents)
    hard_negatives, initial_documents = mining.load(progress.step - progress.segment_start_step, start.same_segment)
    if average is not None and read is not None:
        initial_documents = None  # they are of the weights, and not of the restored average
    batch_builder = BatchBuilder(
        stream, stage, config.run.seed, hard_negatives, documents, model.tables.sharded, config.model.tables.id_dropout
    )
    is_counted = isinstance(stage.sampling, FrequencyCorrection) and stage.sampling.frequency == "counts"
    objective = Objective(
        stage, config.model, stream.doc_weights() if is_counted else None,
        stream.queries_per_step, engine.product_dtype, batch_builder.undrawn, device(),
    )  # fmt: skip

    num_segment_steps = segment_steps(stage, stream.steps_per_epoch)
    total_steps = progress.segment_start_step + num_segment_steps
    warmup = warmup_steps(num_segment_steps, stage.optimizer)
    if warmup < stage.optimizer.warmup_steps and distributed.is_main():
        logger.warning(
            "%s.optimizer.warmup_steps=%d is more than half of the %d steps: warm-up takes %d of them",
            name, stage.optimizer.warmup_steps, num_segment_steps, warmup,
        )  # fmt: skip
    lr_ratio = 1.0
    if continues_model(config, name, dataset, progress.segment_start_step):
        lr_ratio = stage.optimizer.continue_lr_ratio
        logger.info(
            "%s continues a model on newer data: learning rate %.2e, which is lr %.2e times continue_lr_ratio %g "
            "(%s.optimizer; an lr on the command line is taken as it is)",
            name, stage.optimizer.learning_rate * lr_ratio, stage.optimizer.learning_rate, lr_ratio, name,
        )  # fmt: skip
    metrics_logger = MetricsLogger(
        name, engine, trackers, bar, total_steps, stage.rows_global, stage.log_every_steps,
        lambda: f"best {metric_label(stage.validation_metric)} {progress.best:.4f}" if isfinite(progress.best) else "",
    )  # fmt: skip
    row_log = partial(RowLog, folder, rank=rank, world_size=world_size, step=progress.step)
    contents = None
    if model.content_ids:
        contents = ItemContents(engine, dataset, contents_period(stage, stream.steps_per_epoch))
    trainer = Trainer(
        name=name, stage=stage, folder=folder, origin=origin, stream=stream, stream_step=stream.step,
        batch_builder=batch_builder, engine=engine, objective=objective, mining=mining,
        contents=contents,
        validator=Validator(
            dataset, config, name, 1024, documents, keeps_frozen=start.same_segment,
            continues=progress.segment_start_step > 0, earlier=earlier, trained=trained,
        ),
        average=average,
        starts_trained=starts_trained(config, name, progress),
        start_folder=start_folder, lr_ratio=lr_ratio,
        initial_documents=initial_documents, store=store, async_checkpoints=engine_config.async_checkpoints,
        metrics_logger=metrics_logger, alert=SpikeAlert(folder, rank, world_size, progress.step),
        consumed_log=row_log(CONSUMED) if config.debug.log_row_ids else None, skipped_log=row_log(SKIPPED),
        watchdog=watchdog, stop=stop, report_progress=report_progress, progress=progress, total_steps=total_steps,
    )  # fmt: skip
    torch.manual_seed(config.run.seed * 1_000_003 + rank + 1)  # dropout differs between ranks
    if read is not None:
        trainer.load_state_dict(start, read)
    return trainer


def earlier_training(config: Config, name: StageName, start: StartPoint) -> TrainingRecord | None:
    """Return the record of the training of a segment's initial weights; None: new weights, or without a record."""
    if start.checkpoint is not None:
        return TrainingRecord.of(start.checkpoint.state)
    source = config.initial_model(name)
    return None if source is None else TrainingRecord.of(initial_provenance(source))


def training_of(dataset: Dataset, stream: RowStream) -> TrainingRecord:
    """Return the record of a segment; of plain shards, which are no partitions, it is empty."""
    return TrainingRecord({}) if stream.inline else TrainingRecord.of_dataset(dataset)


def find_start_folder(config: Config, name: StageName, model: DualEncoder, start: StartPoint) -> Path | None:
    """Return the model folder whose weights a segment starts from, None if there is none with exactly these.

    Only new rows of tables are not in it: those of values that its training did not have. Weights that the stage adds,
    such as adapters, make it another model, and so does a document tower that it copies.
    """
    best, source = config.stage_dir(name) / "best", config.initial_model(name)
    if start.progress.segment_start_step > 0:
        has_new_average = config.stage(name).weight_average > 0 and bool(start.new_codes)
        return best if start.best_is_start and is_model_folder(best) and not has_new_average else None
    if source is None or not is_model_folder(source) or config.stage(name).documents.model is not None:
        return None
    return source if weight_names(source) == set(model.state_dict()) else None


def find_start_model(config: Config, name: StageName, start: StartPoint, start_folder: Path | None) -> str | None:
    """Return the checksum of the model that a segment starts from; None: new weights, or those of a checkpoint."""
    if start.same_segment and start.checkpoint is not None:
        saved: str | None = start.checkpoint.state.get(START_MODEL)
        return saved
    source = start_folder
    if source is None and start.checkpoint is None:
        source = config.initial_model(name)
    if source is None or not is_model_folder(source):
        return None
    return model_identity(read_model_meta(source))


_training = threading.Lock()


@contextmanager
def stage_lock() -> Iterator[None]:
    """A lock for one stage per process, since random states, process group and thread counts are global.

    Raises ConfigError: another thread is training.
    """
    if not _training.acquire(blocking=False):
        raise ConfigError(
            "a stage is training in this process, needs none: random states and the process group are shared by all "
            "threads; train one stage after the other, or each in a separate process (bigdssm pretrain)"
        )
    try:
        yield
    finally:
        _training.release()


@contextmanager
def _training_state() -> Iterator[None]:
    """Set autocast, gradients and default dtype to the state of a new process; restore all that a stage changes.

    A notebook may call a stage within `torch.autocast`, `torch.no_grad` or `torch.inference_mode`.
    """
    linear, dtype = torch.nn.functional.linear, torch.get_default_dtype()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in {"cpu", device().type}}
    depth = torch.autocast_increment_nesting() - 1
    try:
        torch.set_default_dtype(torch.float32)
        for kind in autocast:
            torch.set_autocast_enabled(kind, False)
        # Weights that are cast within DeepSpeed's own autocast are discarded at the end of an outermost context only.
        for _ in range(depth + 1):
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        with torch.inference_mode(False):  # which enables gradients, too
            yield
    finally:
        undo_patches()  # also after a failure, when the engine is not destroyed
        torch.nn.functional.linear = linear  # DeepSpeed replaces it at ZeRO stage 3
        for _ in range(depth):
            torch.autocast_increment_nesting()
        for kind, enabled in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        torch.set_default_dtype(dtype)


def run_stage(
    config: Config, name: StageName, *, resume: bool, validate_only: bool, world_size: int,
    launcher: LauncherMonitor | None = None, stop: StopRequest | None = None, probe: bool = False,
) -> StageProgress | None:  # fmt: skip
    """Check, build and train one stage on this rank, within `stage_lock`; return its final progress.

    validate_only: stop after the first batch was built, and return None. probe: stop after the steps of the stage,
    without validations and checkpoints, and return None.
    """
    dataset = check_stage(config, name, world_size, resume)
    reads_contents = config.model.query.history.items != "id"
    dataset = dataset.with_rules(replace(dataset.rules, item_rows=reads_contents))
    if not validate_only:
        check_folder(config, name, resume)
    stage_config, folder = config.stage(name), config.stage_dir(name)
    stop = stop or StopRequest()
    if config.data.num_workers:
        fork_server.start([BatchBuilder.__module__])  # its imports take seconds, while the stage is prepared
    init_process_group()
    lock = FolderLock(folder)
    with ExitStack() as after:  # closed after the watchdog: trackers may take long to upload
        after.enter_context(_training_state())
        watchdog = Watchdog(
            config.engine.peer_timeout_s, launcher or LauncherMonitor(), folder / STOP_FILE, lock.end, stop.request
        )
        with watchdog:
            stop.on_early_exit = watchdog.leave
            check_agreement(config, dataset)
            torch.manual_seed(config.run.seed)
            model, initial = build_model(config, name, dataset, resume)
            check_tables(config, name, model)
            documents = fix_documents(model, config, name, dataset)
            stream = row_stream(
                config, stage_config, dataset, distributed.rank(), world_size, config.data.num_workers,
                quarantine=Path(config.run.dir) / f"quarantine-{distributed.rank():05d}.jsonl",
            )  # fmt: skip
            if validate_only:
                builder = BatchBuilder(
                    stream, stage_config, config.run.seed, documents=documents, tables=model.tables.sharded
                )
                batch = next(read_batches(stream, builder, device()))
                parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
                logger.info(
                    "%s is valid: %s parameters, %d steps, a first batch of %d rows and %d documents on rank 0",
                    name, f"{parameters:,}", segment_steps(stage_config, stream.steps_per_epoch),
                    len(batch.query_ids), len(batch.doc_ids),
                )  # fmt: skip
                check_folder(config, name, resume)  # last, so that errors of the config are reported first
                return None
            after.enter_context(lock)
            store = after.enter_context(CheckpointStore(folder / CHECKPOINTS, stage_config.keep_checkpoints))
            start = limit_ids(
                stream, find_start(config, name, store, stream, resume), initial, model.tables.transitions
            )
            if distributed.is_main():
                folder.mkdir(parents=True, exist_ok=True)
                atomic.write_text(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
            distributed.barrier()
            done = start.progress
            trackers = Trackers(folder, config, done.step, len(done.history), cpu=device().type == "cpu")
            after.enter_context(closing(trackers))
            with ProgressBar(delay_s=0.0) as bar, closing(stream):
                trainer = build_trainer(
                    config, name, model, stream, start, documents,
                    store=store, trackers=trackers, bar=bar, watchdog=watchdog, stop=stop,
                )  # fmt: skip
                del start  # frees the checkpoint in memory
                record_start(folder, done.step, trainer.total_steps)
                logger.info(
                    "%s: %s, %d steps of %d rows on %d rank%s, from step %d, in %s",
                    name, config.data.webdataset or f"{dataset.num_rows('train'):,} rows", trainer.total_steps,
                    stage_config.rows_global, world_size, "s" if world_size != 1 else "", done.step, folder,
                )  # fmt: skip
                stop.defer_signals()
                if probe:
                    trainer.probe()
                    return None
                progress = trainer.train()
                keeps_start = trainer.keeps_start()
                lock.result = {"best": describe_best(config, name, trainer)}
    described = trainer.validator.describe(progress, stage_config.validation_metric, keeps_start=keeps_start)
    logger.info("%s finished: %s", name, described)
    if keeps_start and distributed.is_main():
        best = lock.result["best"]
        logger.warning(
            "%s changed nothing: %s/best has the weights that it started from, model %s, because no later validation "
            "was selected over theirs on %d queries of %s; hold out or append more rows, or train on more data",
            name, folder, best["model"][:12], best["queries"], trainer.validator.partition_names(),
        )  # fmt: skip
    return progress


def describe_best(config: Config, name: StageName, trainer: Trainer) -> dict[str, Any]:
    """Return the part of the end record on best/: its step, model, number of queries, and the model of the start."""
    progress, best = trainer.progress, config.stage_dir(name) / "best"
    if not is_model_folder(best):
        return {}
    return {
        "step": progress.best_step,
        "initial": trainer.keeps_start(),
        "validation": progress.best if isfinite(progress.best) else None,
        "queries": trainer.validator.num_queries,
        "model": model_identity(read_model_meta(best)),
        "start": trainer.origin[START_MODEL],
    }


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    best: Path  # the model folder of the best validation
    metrics: dict[str, Any]  # of that validation: step, ndcg_at_10, …; empty without a validation split
    changed: bool = True  # False: best/ has the trained weights that the stage, or its segment, started from


@checked
def pretrain(config: Config | str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> StageResult:
    """Run pretraining. `overrides` are key=value pairs; `resume` continues from the newest checkpoint.

    Signals are left to the caller: Ctrl-C stops without saving, `bigdssm stop_run RUN` saves first. A process
    trains one stage at a time. Raises BigDSSMError.
    """
    return _train(config_of(config, overrides), "pretrain", resume)


@checked
def sft(config: Config | str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> StageResult:
    """Fine-tune the result of `pretrain`; arguments as there."""
    return _train(config_of(config, overrides), "sft", resume)


def _train(config: Config, stage: StageName, resume: bool) -> StageResult:
    with stage_lock(), _restored_process(), default_logging():
        progress = run_stage(
            config, stage, resume=resume, validate_only=False, world_size=check_launch(),
            stop=StopRequest(handle_signals=False),
        )  # fmt: skip
    assert progress is not None
    # the newest record of the best step: an earlier one may be of another segment
    records = (record for record in reversed(progress.history) if record["step"] == progress.best_step)
    metrics: dict[str, Any] = next(records, {}) if isfinite(progress.best) else {}
    changed = not starts_trained(config, stage, progress) or progress.best_step > progress.segment_start_step
    return StageResult(config.stage_dir(stage) / "best", metrics, changed)


@contextmanager
def _restored_process() -> Iterator[None]:
    """Restore the process group, the environment, random states and threads at exit."""
    was_distributed, environment = distributed.is_distributed(), dict(os.environ)
    random, threads = RandomState.now(), torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if not was_distributed:
            leave_process_group()
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        random.restore()
        torch.set_num_threads(threads)
