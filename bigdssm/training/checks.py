"""Validate a stage before anything is written: its config and its data, on each rank, then across ranks."""

import os
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bigdssm import distributed
from bigdssm.cluster.metrics import check_trackers
from bigdssm.cluster.run_folder import versions
from bigdssm.config import Config, FrequencyCorrection, ModelConfig, StageName, check_many_queries, first_difference
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import BigDSSMError, ConfigError, DataError
from bigdssm.evaluation.metrics import find_metric
from bigdssm.features.history import histories_of
from bigdssm.loader.plain_stream import find_shards
from bigdssm.losses.declarations import BatchDistillation, ListDistillation
from bigdssm.models import DualEncoder
from bigdssm.models.encoders import text_architectures
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.teacher_vectors import TeacherVectors
from bigdssm.training.start import open_segment
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)
MAX_REPEATS = 64  # occurrences of a row in one step


def check_stage(config: Config, name: StageName, world_size: int, resume: bool = False) -> Dataset:
    """Check a stage without communication between ranks, and return the opened dataset.

    Raises ConfigError or DataError before anything is written.
    """
    stage = config.stage(name)
    if world_size > config.data.lanes:
        raise ConfigError(f"{world_size} ranks, but data.lanes={config.data.lanes}: use at least one lane per rank")
    check_settings(config, name)
    dataset = open_segment(config, name) if resume else open_dataset(config.data)
    dataset.check_against(config.data)
    if dataset.has_segments("train"):
        check_many_queries(f"rows of several queries, as those of {dataset.dir} are,", config.data, config.model)
    elif config.data.targets_per_row > 1 and config.data.webdataset is None:
        logger.warning(  # no error: a small partition may have no user with several targets
            "data.targets_per_row=%d has no effect: every train row of %s gives one query; build the dataset again, or "
            "set it to 1", config.data.targets_per_row, dataset.dir,
        )  # fmt: skip
    if stage.negatives.mask in ("user", "past") and (dataset.sequences is None or config.data.webdataset is not None):
        raise ConfigError(
            f"{name}.negatives.mask: got {stage.negatives.mask}, needs batch or none: the rows of "
            f"{config.data.webdataset or dataset.dir} are not sequences and have no histories"
        )
    rows, shards = dataset.num_rows("train"), config.data.webdataset
    if shards is not None:  # no catalogue
        find_shards(shards)
        reason = f"{shards} stores documents with their queries, without a catalogue"
        for kind in ("hard", "uniform"):
            if count := getattr(stage.negatives, kind):
                raise ConfigError(f"{name}.negatives.{kind}: got {count}, needs 0: {reason}")
        if isinstance(stage.sampling, FrequencyCorrection) and stage.sampling.frequency == "counts":
            raise ConfigError(
                f"{name}.sampling.frequency: got counts, needs streaming (or sampling.name=none): {reason}"
            )
        if not stage.steps:
            raise ConfigError(f"{name}.steps: got 0, needs a number of steps: plain shards have no epochs")
    elif dataset.index("train") and stage.rows_global > MAX_REPEATS * rows:
        raise ConfigError(
            f"{name}.rows_global: got {stage.rows_global}, needs at most {MAX_REPEATS * rows} with a train split of "
            f"{rows} rows in partitions {', '.join(partition.name for partition in dataset.partitions)}: a step would "
            f"contain each of them more than {MAX_REPEATS} times"
        )
    elif not dataset.doc_counts().any():
        raise DataError(
            f"{dataset.dir}: no train row has a relevance above 0: there is nothing to learn; correct the "
            "relevances, and build the dataset again"
        )
    if stage.negatives.hard and stage.negatives.mining.file is not None:
        hard = HardNegatives.open(Path(stage.negatives.mining.file))
        hard.check_against(dataset)
        distillation = stage.distillation if isinstance(stage.distillation, ListDistillation) else None
        for key, value in (
            ("distillation.name", None if distillation is None else distillation.name),
            ("negatives.mining.teacher_margin", stage.negatives.mining.teacher_margin),
        ):
            if value is not None and not hard.scored:
                raise ConfigError(
                    f"{name}.{key}: got {value}, needs a teacher's scores, and {stage.negatives.mining.file} has none; "
                    "bigdssm score_pairs writes them"
                )
        if stage.loss.position_bias and not hard.positioned:
            raise ConfigError(
                f"{name}.loss.position_bias: got {stage.loss.position_bias}, needs the positions of documents, and "
                f"{stage.negatives.mining.file} has none; bigdssm list_candidates --position-column writes them"
            )
    if isinstance(stage.distillation, BatchDistillation):
        TeacherVectors(Path(stage.distillation.teacher)).check_against(dataset)
    folder = config.stage_dir(name)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"run.dir: {folder} cannot be created, since {existing} {reason}; choose another run.dir")
    source = config.initial_model(name)
    if stage.warm_start.window:
        key = f"{name}.warm_start.window"
        if source is not None:
            logger.info("%s has no effect: %s starts from %s, whose tables have been trained", key, name, source)
        elif dataset.sequences is None or not histories_of(dataset.schema.query):
            raise ConfigError(f"{key}: got {stage.warm_start.window}, needs 0: rows of {dataset.dir} have no histories")
    if source is None:
        check_model(config.model, dataset.schema, dataset.vocab_size)
        for key, text in config.text_encoders().items():
            text.check_tokenizer(key, dataset.tokenizer_dir)
    else:
        _check_source(name, source)
    return dataset


def check_settings(config: Config, name: StageName) -> None:
    """Raise ConfigError for the first invalid setting or missing folder of a stage, independently of its dataset."""
    stage = config.stage(name)
    if stage.optimizer.whole_tensors and config.engine.zero_stage > 0:
        raise ConfigError(
            f"engine.zero_stage: got {config.engine.zero_stage}, needs 0 with {name}.optimizer.name="
            f"{stage.optimizer.name}, which needs whole matrices: ZeRO 1 to 3 split them into flat pieces"
        )
    if stage.weight_average and config.engine.zero_stage == 3:
        raise ConfigError(
            f"{name}.weight_average: got {stage.weight_average}, needs 0 with engine.zero_stage=3: every rank averages "
            "whole weights; take 0, 1 or 2"
        )
    find_metric(stage.validation_metric, f"{name}.validation_metric")
    check_trackers(config.run.trackers)
    for key in ("model", "vectors"):
        path = getattr(stage.documents, key)
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"{name}.documents.{key}: {path} is not a folder; bigdssm embed writes one of vectors")
    if stage.init is not None:
        _check_source(name, Path(stage.init))


def _check_source(name: StageName, source: Path) -> None:
    """Raise ConfigError unless the model that a stage starts from exists."""
    if not source.is_dir():
        fix = "run bigdssm pretrain with this config first" if name == "sft" else "correct the path"
        reason = "is a file" if source.exists() else "does not exist"
        raise ConfigError(f"{name} starts from {source}, which {reason}; {fix}, or set {name}.init")


def check_model(config: ModelConfig, schema: Schema, vocab_size: int) -> None:
    """Raise ConfigError for a model that cannot be built, such as one with a missing `init`."""
    with torch.device("meta"):  # without allocating its memory
        DualEncoder(config, schema, text_architectures(config, schema, vocab_size))


def check_tables(config: Config, name: StageName, model: DualEncoder) -> None:
    """Raise ConfigError if a stage cannot train a model with sharded tables; warn about their keys without any."""
    sharded, stage = sorted(model.tables.sharded), config.stage(name)
    if not sharded:
        tables, effective = config.model.tables, ["sharding", "rows_from", "rows", "replicated"]
        effective += ["id_dropout"] * bool(histories_of(model.schema.query))  # of the items of histories
        keys = [f.name for f in fields(tables) if f.name not in effective and getattr(tables, f.name) != f.default]
        if keys:
            logger.warning(
                "%s: no effect without sharded tables; all have fewer than model.tables.rows_from=%d rows or are "
                "replicated, see model.tables.rows", ", ".join(f"model.tables.{key}" for key in keys), tables.rows_from,
            )  # fmt: skip
        return
    shares = any(spec.hash_rows for spec in model.tables.sharded.values()) and config.initial_model(name) is None
    for key, got, needed, reason in (
        ("weight_average", stage.weight_average, 0.0, "the average would hold every row"),
        ("negatives.columns", stage.negatives.columns, "batch", "all rows would be fetched in every step"),
        ("warm_start.window", stage.warm_start.window if shares else 0, 0, "ids share the rows of hash_rows"),
        ("documents.model", stage.documents.model, None, "the rows of the document tower would be trained"),
    ):
        if got != needed:
            value = "null" if needed is None else needed
            raise ConfigError(
                f"{name}.{key}: got {got}, needs {value} with sharded tables ({', '.join(sharded)}): {reason}; or set "
                "model.tables.replicated"
            )


def model_difference(trained: Config, config: Config, omitted: tuple[str, ...] = ()) -> str | None:
    """Return the first key in which two model sections differ, except `omitted` ones and those of training alone."""
    omitted += ("alpha_init", "alpha_learned")

    def shape(declared: Config) -> dict[str, Any]:
        model = declared.to_dict()["model"]
        for side in ("query", "doc"):
            for section in (model[side], model[side]["history"], model[side]["text"]):
                for key in ("dropout", "item_dropout", "transition_dropout"):
                    section.pop(key, None)
        return {key: value for key, value in model.items() if key not in omitted}

    return first_difference(shape(trained), shape(config), "model")


def check_agreement(config: Config, dataset: Dataset) -> None:
    """Raise, on every rank, unless all ranks have equal configs, datasets and versions."""
    opened = {"fingerprint": dataset.fingerprint, "rows": dataset.num_rows("train")}
    local = {"config": config.to_dict(), "dataset": opened, "version": versions()}
    first = distributed.broadcast_object(local)
    error: BigDSSMError | None = None
    for part in local:
        difference = first_difference(first[part], local[part])
        if difference and error is None:
            error = ConfigError(
                f"rank {distributed.rank()} on {socket.gethostname()} has another {part} than rank 0: {difference} "
                "there; start all ranks with the same"
            )
    distributed.raise_together(error)
