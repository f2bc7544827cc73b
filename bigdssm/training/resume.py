"""Resume: which keys may change, the stage length, and models whose vocabularies grew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bigdssm.checkpoints.checkpoint import MANIFEST, ReadCheckpoint, TensorReader
from bigdssm.config import Config, StageConfig, StageName, config_from, load_written_config
from bigdssm.dataset.schema import Schema
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.models import DualEncoder
from bigdssm.training.optimizers import schedule_factor
from bigdssm.utils.log import get_logger

# may     may change: it changes what is computed where, kept or said, not what is learned
# longer  may become longer; anything, where a new part begins
# part    a change begins a new part, over partitions that are new: the stream's state decides whether it may
# never   another run
Rule = Literal["may", "longer", "part", "never"]

# By key, or by section for all keys in it; STAGE is the stage that is resumed, OTHER the other one.
RULES: dict[str, Rule] = {
    "run.dir": "may",
    "run.seed": "never",
    "run.trackers": "may",
    "data.dir": "may",  # the partitions' fingerprints say whether it is the same dataset
    "data.query": "never",
    "data.doc": "never",
    "data.title": "never",
    "data.tokenizer": "may",  # only make_shards reads it; the dataset's own is in its fingerprint
    "data.targets_per_row": "may",  # as data.tokenizer
    "data.exclude_seen": "never",
    "data.siamese": "never",
    "data.lanes": "never",
    "data.num_workers": "may",
    "data.max_bad_fraction": "may",
    "data.cache_dir": "may",
    "data.cache_bytes": "may",
    "data.from_partition": "part",
    "data.webdataset": "never",
    "data.mixture": "part",
    "data.mixture_batches": "part",
    "data.tail": "never",
    "model": "never",
    "engine": "may",
    "STAGE.loss": "never",
    "STAGE.optimizer": "never",
    "STAGE.rows_global": "never",
    "STAGE.epochs": "longer",
    "STAGE.steps": "longer",
    "STAGE.init": "never",
    "STAGE.warm_start": "never",
    "STAGE.mining": "never",
    "STAGE.teacher": "never",
    "STAGE.weight_average": "never",
    "STAGE.rerank": "never",  # what `best` is would be another thing from there on
    "STAGE.validate_every_steps": "may",
    "STAGE.patience": "may",
    "STAGE.save_every_steps": "may",
    "STAGE.save_every_minutes": "may",
    "STAGE.keep_checkpoints": "may",
    "STAGE.log_every_steps": "may",
    "STAGE.max_skipped_steps": "may",
    "OTHER": "may",
    "debug": "may",
}

logger = get_logger(__name__)


def rule_of(key: str, name: StageName) -> Rule:
    """Return the rule of a dotted key of a config whose stage `name` is resumed. Raises KeyError: it has none."""
    section, _, rest = key.partition(".")
    if section in ("pretrain", "sft"):
        key = f"STAGE.{rest}" if section == name else "OTHER"
    while key not in RULES:
        key, dot, _ = key.rpartition(".")
        if not dot:
            raise KeyError(f"no rule says whether {section}.{rest} may change at a resume")
    return RULES[key]


def check_resume(path: Path, config: Config, name: StageName) -> None:
    """Raise unless the stage that wrote its config to `path` may be resumed with `config`.

    Raises CheckpointError where the file cannot be read, ConfigError naming what may not change.
    """
    try:
        before = load_written_config(path).to_dict()
    except (ConfigError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ").split())
        raise CheckpointError(
            f"{path} does not load, so that this config cannot be compared with the run's: {reason}; bring it back, or "
            "choose another run.dir"
        ) from None
    if difference := _forbidden(before, config, name):
        raise ConfigError(
            f"{path.parent} was run with another config: {difference}; resume needs the same (docs/faults.md has what "
            "may change)"
        )


def check_origin(checkpoint: ReadCheckpoint, run_id: str, config: Config, name: StageName) -> None:
    """Raise CheckpointError unless this run has written `checkpoint`, and with a config that `config` may follow."""
    fix = "move it out of the folder, or choose another run.dir"
    theirs = checkpoint.state.get("run_id", run_id)  # absent: from before runs had an identity
    if theirs != run_id:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was written by another run ({theirs}, in "
            f"{checkpoint.state['config']['run']['dir']}), needs one of this run ({run_id}); {fix}"
        )
    try:
        before = config_from(checkpoint.path / MANIFEST, checkpoint.state["config"]).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"the config in a checkpoint cannot be compared with this one: {error}; {fix}") from None
    if difference := _forbidden(before, config, name):
        raise CheckpointError(f"checkpoint {checkpoint.path} was written with another config: {difference}; {fix}")


def check_length(checkpoint: ReadCheckpoint, stage: StageConfig, name: StageName, steps_per_epoch: int) -> None:
    """Say what a longer stage does to the learning rate. Raises ConfigError: a shorter one, or one without negatives.

    For a stage that goes on where `checkpoint` was taken.
    """
    saved, progress = checkpoint.state["config"][name], checkpoint.state["progress"]
    steps = part_steps(stage, steps_per_epoch)
    before = part_steps(replace(stage, steps=saved["steps"], epochs=saved["epochs"]), steps_per_epoch)
    if steps < before:
        raise ConfigError(
            f"{name}.steps, {name}.epochs: got {steps} steps, needs at least the {before} of before: a resumed stage "
            "may become longer, not shorter; bigdssm stop_run --save ends one early"
        )
    if steps == before:
        return
    mined_once = stage.loss.negatives and stage.mining.file is None and stage.mining.every_steps == 0
    if mined_once and before < steps_per_epoch:
        raise ConfigError(
            f"{name}.steps, {name}.epochs: got {steps} steps, needs {before} as before: negatives were mined for the "
            f"rows of these alone; begin anew in another run.dir, or mine with bigdssm mine_negatives for "
            f"{name}.mining.file"
        )
    applied = progress["applied"] - progress["part_applied"]
    was, now = (stage.optimizer.lr * schedule_factor(applied, total, stage.optimizer) for total in (before, steps))
    logger.info(
        "%s takes %d steps, before it was to take %d: the learning rate follows the longer schedule from here on, %.2e "
        "at step %d in place of %.2e", name, steps, before, now, checkpoint.step, was,
    )  # fmt: skip


def part_steps(stage: StageConfig, steps_per_epoch: int) -> int:
    """Return the steps of a stage, or of its part over new partitions."""
    return stage.steps or math.ceil(stage.epochs * steps_per_epoch)


def _forbidden(before: dict[str, Any], config: Config, name: StageName) -> str | None:
    """Return the first difference that another run would need, as `KEY was A, is B`."""
    for key, was, now in _differences(before, config.to_dict()):
        if rule_of(key, name) == "never":
            return f"{key} was {was}, is {now}"
    return None


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, before, now) of every place in which two plain config containers differ."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield key, before, now
        return
    for name in {**before, **now}:
        yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)


def grow_model(model: DualEncoder, schema: Schema) -> None:
    """Give `model` the tables that `schema` needs, whose vocabularies begin with those of the model's own."""
    for name, (known, needed) in model.tables.grow(schema).items():
        _say(f"table {name}", known, needed)
    model.schema = schema


class GrownReader(TensorReader):
    """Reads a checkpoint for a new `model` whose tables may have more rows: as initialised, their moments zero."""

    def __init__(self, checkpoint: ReadCheckpoint, model: DualEncoder) -> None:
        super().__init__(checkpoint)
        self._new_rows: dict[str, Tensor] = {}
        for name, parameter in model.tables.named_parameters("tables"):
            known, needed = self.shape(name)[0], len(parameter)
            if known < needed:
                _say(name, known, needed)
                self._new_rows[name] = parameter.detach()[known:].float().clone()

    def __call__(self, name: str) -> Tensor:
        """Return the tensor `name`, on the CPU, with its new rows. Raises CheckpointError where there is none."""
        tensor = super().__call__(name)
        moment, _, weight = name.rpartition("/")
        new_rows = self._new_rows.get(weight)
        if new_rows is None:
            return tensor
        return torch.cat([tensor, torch.zeros_like(new_rows) if moment else new_rows])


def _say(what: str, known: int, needed: int) -> None:
    logger.info(
        "%s: %d rows as they were, %d new ones for values that came with new partitions", what, known, needed - known
    )
