"""What is checked of a stage before anything is written: by each rank alone, then that all ranks have the same."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from bigdssm import distributed
from bigdssm.cluster.metrics import check_trackers
from bigdssm.cluster.run_folder import versions
from bigdssm.config import Config, FrequencyCorrection, StageConfig, StageName, check_many_queries, first_difference
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.joined import open_dataset
from bigdssm.errors import BigDSSMError, ConfigError, DataError
from bigdssm.evaluation.metrics import find_metric
from bigdssm.loader.plain_stream import find_shards
from bigdssm.losses.declarations import BatchKL, ListDistillation
from bigdssm.models import DualEncoder
from bigdssm.models.encoders import text_architectures
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.teacher_vectors import TeacherVectors
from bigdssm.training.warm_start import check_warm_start
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)
MOST_COPIES = 64  # of a row in one step


def check_stage(config: Config, name: StageName, world_size: int) -> Dataset:
    """Return the opened dataset after everything was checked that can be before ranks depend on each other.

    Raises ConfigError or DataError; nothing has been written then.
    """
    stage = config.stage(name)
    if world_size > config.data.lanes:
        raise ConfigError(f"{world_size} ranks, but data.lanes={config.data.lanes}: use at least one lane per rank")
    if stage.optimizer.whole_tensors and config.engine.zero_stage > 0:
        raise ConfigError(
            f"engine.zero_stage: got {config.engine.zero_stage}, needs 0 with {name}.optimizer.name="
            f"{stage.optimizer.name}, which works on whole matrices: ZeRO 1 to 3 give each rank flat pieces of them"
        )
    if stage.weight_average and config.engine.zero_stage == 3:
        raise ConfigError(
            f"{name}.weight_average: got {stage.weight_average}, needs 0 with engine.zero_stage=3: every rank averages "
            "whole weights; take 0, 1 or 2"
        )
    find_metric(stage.validation_metric, f"{name}.validation_metric")
    check_trackers(config.run.trackers)
    dataset = open_dataset(config.data)
    dataset.check_against(config.data)
    if dataset.num_queries("train") > dataset.num_rows("train"):
        check_many_queries(f"rows of several queries, as those of {dataset.dir} are,", config.data, config.model)
    elif config.data.targets_per_row > 1 and config.data.webdataset is None:
        logger.warning(  # no error: a small partition may have no user with several targets
            "data.targets_per_row=%d has no effect: every train row of %s gives one query; make the dataset again, or "
            "set it to 1", config.data.targets_per_row, dataset.dir,
        )  # fmt: skip
    if stage.negatives.mask in ("user", "past") and (dataset.sequences is None or config.data.webdataset is not None):
        raise ConfigError(
            f"{name}.negatives.mask: got {stage.negatives.mask}, needs batch or none: the rows of "
            f"{config.data.webdataset or dataset.dir} are not of sequences, so that nothing lies before them"
        )
    if config.data.webdataset is not None:
        _check_plain(name, stage, config.data.webdataset)
    else:
        _check_rows(name, stage, dataset)
    if stage.negatives.hard and stage.negatives.mining.file is not None:
        mined = HardNegatives.open(Path(stage.negatives.mining.file))
        mined.check_against(dataset)
        distillation = stage.distillation if isinstance(stage.distillation, ListDistillation) else None
        needed = {
            "distillation.name": None if distillation is None else distillation.name,
            "negatives.mining.teacher_margin": stage.negatives.mining.teacher_margin,
        }
        for key, value in needed.items():
            if value is not None and not mined.scored:
                raise ConfigError(
                    f"{name}.{key}: got {value}, needs a teacher's scores, and {stage.negatives.mining.file} has none; "
                    "bigdssm score_pairs writes them"
                )
    if isinstance(stage.distillation, BatchKL):
        TeacherVectors(Path(stage.distillation.teacher)).check_against(dataset)
    _check_writable(config.stage_dir(name))
    source = initial_model(config, name)
    if stage.warm_start.window:
        key = f"{name}.warm_start.window: got {stage.warm_start.window}, needs 0"
        if source is not None:
            raise ConfigError(f"{key}: {name} starts from {source}, whose tables have been trained")
        check_warm_start(key, dataset)
    if source is None:
        with torch.device("meta"):  # what cannot be built is found here, without its memory
            texts = text_architectures(config.model, dataset.schema, dataset.pad_token_id, dataset.vocab_size)
            DualEncoder(config.model, dataset.schema, texts)
    elif not source.is_dir():
        fix = "run bigdssm pretrain with this config first" if name == "sft" else "correct the path"
        what = "is a file" if source.exists() else "does not exist"
        raise ConfigError(f"{name} starts from {source}, which {what}; {fix}, or set {name}.init")
    return dataset


def _check_writable(folder: Path) -> None:
    """Raise ConfigError unless the run's `folder` is one that can be written, or can be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        raise ConfigError(f"run.dir: {folder} cannot be made, since {there} {why}; choose another run.dir")


def _check_plain(name: StageName, stage: StageConfig, shards: str) -> None:
    """Raise where a stage needs what plain shards do not have."""
    find_shards(shards)
    why = f"{shards} has its documents beside their queries, without a catalogue"
    for key in ("hard", "uniform"):
        value = getattr(stage.negatives, key)
        if value:
            raise ConfigError(f"{name}.negatives.{key}: got {value}, needs 0: {why}")
    sampling = stage.sampling
    if isinstance(sampling, FrequencyCorrection) and sampling.frequency == "counts":
        raise ConfigError(f"{name}.sampling.frequency: got counts, needs streaming (or sampling.name=none): {why}")
    if not stage.steps:
        raise ConfigError(f"{name}.steps: got 0, needs a number of steps: plain shards have no epochs")


def _check_rows(name: StageName, stage: StageConfig, dataset: Dataset) -> None:
    """Raise where a step would hold rows too often, or none of them is a positive."""
    rows = dataset.num_rows("train")
    if stage.rows_global > MOST_COPIES * rows:
        raise ConfigError(
            f"{name}.rows_global: got {stage.rows_global}, needs at most {MOST_COPIES * rows} with a train split of "
            f"{rows} rows in partitions {', '.join(partition.name for partition in dataset.partitions)}: a step would "
            f"hold each of them more than {MOST_COPIES} times"
        )
    if not dataset.has_positives():
        raise DataError(
            f"{dataset.dir}: no train row has a relevance above 0, so that there is nothing to learn; mend the "
            "relevances, and make the dataset again"
        )


def initial_model(config: Config, name: StageName) -> Path | None:
    """Return the folder that the stage starts from: its `init`, for SFT else the pretraining's best."""
    init = config.stage(name).init
    if init is not None:
        return Path(init)
    return config.stage_dir("pretrain") / "best" if name == "sft" else None


def check_agreement(config: Config, dataset: Dataset) -> None:
    """Raise on every rank where a rank has another config, dataset, or version of code or libraries than rank 0."""
    mine = {"config": config.to_dict(), "dataset": {"fingerprint": dataset.fingerprint}, "version": versions()}
    first = distributed.broadcast_object(mine)
    error: BigDSSMError | None = None
    for what in mine:
        difference = first_difference(first[what], mine[what])
        if difference and error is None:
            error = ConfigError(
                f"rank {distributed.rank()} on {socket.gethostname()} has another {what} than rank 0: {difference} "
                "there; start all ranks alike"
            )
    distributed.raise_together(error)
