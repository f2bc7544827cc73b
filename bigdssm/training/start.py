"""The start of a stage: whether it may continue in its folder, from which checkpoint, and in which segment.

A segment is the part of a stage over one set of training partitions; new partitions start a new one, in which embedding
tables may grow. `check_folder` runs before anything is built, `find_start` once model and stream exist.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm.checkpoints.checkpoint import (
    CHECKPOINTS,
    COMMON,
    MANIFEST,
    TRAINED_CODES,
    LoadedCheckpoint,
    TensorReader,
    checkpoints_in,
    read_manifest,
)
from bigdssm.checkpoints.model_folder import read_model_meta
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.checkpoints.training_record import TRAINED, TrainingRecord
from bigdssm.cluster.metrics import CONFIG_FILE
from bigdssm.cluster.run_folder import RUNNING_FILE, run_identity
from bigdssm.config import Config, StageConfig, StageName, config_from, differences, load_written_config
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.partition import Extent
from bigdssm.dataset.schema import Schema
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.features.categorical import categorical_of
from bigdssm.loader.stream import RowStream
from bigdssm.models import DualEncoder
from bigdssm.models.embedding_tables import TransitionTable, table_name
from bigdssm.training.optimizers import schedule_factor
from bigdssm.utils.components import RESUME, ResumeRule
from bigdssm.utils.log import get_logger, metric_label

logger = get_logger(__name__)
NEW_ROWS = "%s: %d existing rows, %d new ones for values of new partitions"
# fields of StageProgress that have another name in checkpoints
_SAVED_NAMES = {"segment_start_step": "part_step", "segment_start_applied": "part_applied"}


def rule_of(config: Config, key: str, name: StageName) -> ResumeRule:
    """Return the rule of a dotted config key if the stage `name` is resumed: that of the innermost field with one."""
    if key.partition(".")[0] in {"pretrain", "sft"} - {name}:
        return "may"
    rule: ResumeRule = "never"
    part: Any = config
    for word in key.split("."):
        declared = {f.name: f for f in fields(part)} if is_dataclass(part) else {}
        if word not in declared:  # the name of a feature, or a key of another component
            break
        rule, part = declared[word].metadata.get(RESUME, rule), getattr(part, word)
    return rule


@dataclass
class StageProgress:
    """Progress of a stage; equal on every rank, saved in every checkpoint."""

    step: int = 0  # global batches consumed
    applied: int = 0  # steps with applied gradients; the schedule counts them
    skipped_in_row: int = 0
    best: float = float("-inf")  # validation_metric of the weights in best/
    best_step: int = 0
    validations_since_best: int = 0  # since the highest mean, which patience counts
    validated_at: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)  # every validation
    # Values of `step` and `applied` at the start of the current segment; its steps and schedule count from there.
    segment_start_step: int = 0
    segment_start_applied: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the fields under their names in checkpoints."""
        return {_SAVED_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "StageProgress":
        """Return the progress saved in a checkpoint."""
        names = {saved: name for name, saved in _SAVED_NAMES.items()}
        return cls(**{names.get(saved, saved): value for saved, value in state.items()})

    def describe_best(self, metric: str, *, decides: bool = True) -> str:
        """Format the best validation of the current segment, for example `best validation NDCG@10 0.1234`.

        decides: validations select the weights.
        """
        if not math.isfinite(self.best):
            return "no validation split, the newest weights are the best,"
        label = f"{metric_label(metric)} {self.best:.4f}"
        return f"best validation {label}" if decides else f"the newest weights are the best, validation {label}"


@dataclass(frozen=True)
class StartPoint:
    """The start of a stage: its beginning, or a checkpoint, in the same segment or at the start of a new one."""

    run_id: str
    progress: StageProgress
    checkpoint: LoadedCheckpoint | None = None
    same_segment: bool = False  # the stream continues where the checkpoint was written
    new_codes: Mapping[str, np.ndarray] = field(default_factory=dict)  # by table: ids that this segment makes known
    best_is_start: bool = False  # a new segment starts from the weights in best/


def check_folder(config: Config, name: StageName, resume: bool) -> None:
    """Raise unless the stage's folder is empty, or belongs to this run and `resume` is set.

    Raises CheckpointError; ConfigError: a key changed that must not change at a resume.
    """
    folder = config.stage_dir(name)
    path = folder / CONFIG_FILE
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, needs to be a folder or not exist; choose another run.dir")
    if not folder.exists() or all(file.name == RUNNING_FILE for file in folder.iterdir()):
        return  # contains at most the lock of a start that failed early
    if not resume:
        raise CheckpointError(f"{folder} is not empty; continue with --resume auto, or choose another run.dir")
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a stage folder: it has no {CONFIG_FILE}; choose another run.dir")
    try:
        before = load_written_config(path).to_dict()
    except (ConfigError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ").split())
        raise CheckpointError(
            f"{path} does not load; this config cannot be compared with the run's: {reason}; restore it, or "
            "choose another run.dir"
        ) from None
    if difference := forbidden_change(before, config, name):
        raise ConfigError(
            f"{folder} was run with another config: {difference}; resume needs the same (docs/faults.md lists "
            "keys that may change)"
        )


def open_segment(config: Config, name: StageName) -> Dataset:
    """Open the dataset of a stage that may continue a segment: without the items appended since it began."""
    dataset = open_dataset(config.data)
    names = [partition.name for partition in dataset.partitions]
    for path in reversed(checkpoints_in(config.stage_dir(name) / CHECKPOINTS)):
        try:
            stream = read_manifest(path).state["stream"]
        except CheckpointError:
            continue
        extents = [Extent(*extent) for extent in stream.get("extents", [])]
        if [name for name, _ in stream.get("partitions", [])] != names or len(extents) != len(dataset.extents):
            break
        return open_dataset(config.data, extents)
    return dataset


def find_start(config: Config, name: StageName, store: CheckpointStore, stream: RowStream, resume: bool) -> StartPoint:
    """Return the start point of the stage, with `resume` the newest valid checkpoint.

    All ranks must call it. Raises CheckpointError: it is of another run or config; DataError: of another dataset;
    ConfigError: the stage became shorter.
    """
    checkpoint = store.newest_valid() if resume else None
    run_id = run_identity(config.stage_dir(name), None if checkpoint is None else checkpoint.state["run_id"])
    if checkpoint is None:
        if resume and config.data.from_partition is not None and config.initial_model(name) is None:
            logger.warning(
                "%s has no checkpoint: %s starts from random weights, and data.from_partition=%s leaves out the "
                "earlier partitions; set %s.init to a model to continue from", config.stage_dir(name), name,
                config.data.from_partition, name,
            )  # fmt: skip
        return StartPoint(run_id, StageProgress())
    before = _check_origin(checkpoint, run_id, config, name)
    progress = StageProgress.from_state_dict(checkpoint.state["progress"])
    same_segment = stream.check_state(checkpoint.state["stream"])
    best_is_start = not same_segment and progress.best_step == progress.step == progress.validated_at
    if same_segment:
        if changed := [change for change in _changes(before, config, name, "segment") if change.startswith(name)]:
            raise ConfigError(f"{changed[0]}: it may change only where a run continues on new partitions; set it back")
        _check_length(checkpoint, progress, config.stage(name), name, stream.steps_per_epoch)
    else:
        # a new segment, whose validations are not comparable with earlier ones: they have other rows
        progress = replace(
            progress, segment_start_step=progress.step, segment_start_applied=progress.applied, best=float("-inf"),
            best_step=progress.step, validations_since_best=0, validated_at=-1,
        )  # fmt: skip
    return StartPoint(run_id, progress, checkpoint, same_segment, best_is_start=best_is_start)


def limit_ids(
    stream: RowStream, start: StartPoint, initial: Schema | None, transitions: Mapping[str, TransitionTable]
) -> StartPoint:
    """Make the ids without a positive event in this run's training unknown to `stream`; return `start` with new codes.

    initial: schema of the model that the stage starts from; transitions: tables of its model that have rows of items,
    too. All ranks must call it.
    """
    dataset = stream.dataset
    if stream.inline or dataset.schema.siamese:  # without counts; queries are documents, too
        return start
    earlier = initial
    if start.checkpoint is not None:  # the schema of the checkpoint, with the codes that were known to it
        trained = start.checkpoint.reader().with_prefix(COMMON + TRAINED_CODES)
        sizes = start.checkpoint.state["stream"]["vocabularies"]
        earlier = dataset.whole.schema.cut(sizes).with_trained({name: codes.numpy() for name, codes in trained.items()})
    stream.dataset = dataset.with_trained_ids(earlier)
    if earlier is None or start.same_segment:
        return start
    before = categorical_of(earlier.doc)
    codes = {
        table_name("doc", name): feature.newly_trained(before[name])
        for name, feature in categorical_of(stream.dataset.schema.doc).items()
    }
    codes |= {name: codes[table_name("doc", table.item)] for name, table in transitions.items()}
    return replace(start, new_codes={table: new for table, new in codes.items() if len(new)})


def _check_origin(checkpoint: LoadedCheckpoint, run_id: str, config: Config, name: StageName) -> dict[str, Any]:
    """Return the config of `checkpoint`; raise CheckpointError unless this stage of this run wrote it, compatibly."""
    fix = "move it out of the folder, or choose another run.dir"
    if (stage := checkpoint.state.get("stage")) != name:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was written by the stage {stage}, needs one of {name}; {fix}"
        )
    if checkpoint.state["run_id"] != run_id:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was written by another run ({checkpoint.state['run_id']}, in "
            f"{checkpoint.state['config']['run']['dir']}), needs one of this run ({run_id}); {fix}"
        )
    try:
        before = config_from(checkpoint.path / MANIFEST, checkpoint.state["config"]).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"the config in a checkpoint cannot be compared with this one: {error}; {fix}") from None
    if difference := forbidden_change(before, config, name):
        raise CheckpointError(f"checkpoint {checkpoint.path} was written with another config: {difference}; {fix}")
    return before


def _check_length(
    checkpoint: LoadedCheckpoint, progress: StageProgress, stage: StageConfig, name: StageName, steps_per_epoch: int
) -> None:
    """Log the new learning rate of a longer stage. Raises ConfigError: a shorter one, or negatives are missing."""
    saved = checkpoint.state["config"][name]
    steps = segment_steps(stage, steps_per_epoch)
    before = segment_steps(replace(stage, steps=saved["steps"], epochs=saved["epochs"]), steps_per_epoch)
    if steps < before:
        raise ConfigError(
            f"{name}.steps, {name}.epochs: got {steps} steps, needs at least the previous {before}: a resumed stage "
            "may become longer, not shorter; bigdssm stop_run ends one early"
        )
    if steps == before:
        return
    mining = stage.negatives.mining
    single_mining = stage.negatives.hard and mining.file is None and mining.every_steps == 0
    if single_mining and before < steps_per_epoch:
        raise ConfigError(
            f"{name}.steps, {name}.epochs: got {steps} steps, needs {before} as before: negatives were mined only for "
            f"the rows of these; start again in another run.dir, or mine with bigdssm mine_negatives for "
            f"{name}.negatives.mining.file"
        )
    applied = progress.applied - progress.segment_start_applied
    was, now = (
        stage.optimizer.learning_rate * schedule_factor(applied, total, stage.optimizer) for total in (before, steps)
    )
    logger.info(
        "%s takes %d steps, previously %d: the learning rate follows the longer schedule from here on, %.2e "
        "at step %d in place of %.2e", name, steps, before, now, checkpoint.step, was,
    )  # fmt: skip


def starts_trained(config: Config, name: StageName, progress: StageProgress) -> bool:
    """Return whether a segment starts from the weights of another stage or segment."""
    return config.initial_model(name) is not None or progress.segment_start_step > 0


def continues_model(config: Config, name: StageName, dataset: Dataset, segment_start_step: int) -> bool:
    """Return whether a stage continues a model of its kind on newer data: a new segment, or the next night.

    The night starts from a model of this stage that was trained on this dataset, or with data.from_partition.
    """
    if segment_start_step > 0:
        return True
    source = config.initial_model(name)
    if source is None:
        return False
    provenance = initial_provenance(source)
    if provenance.get("stage") != name:
        return False
    earlier = TrainingRecord.of(provenance)
    is_known = earlier is not None and earlier.num_known(dataset) > 0
    return is_known or config.data.from_partition is not None


def initial_provenance(source: Path) -> dict[str, Any]:
    """Return the provenance of the model folder or checkpoint that a stage starts from."""
    if source.parent.name != CHECKPOINTS:
        provenance: dict[str, Any] = read_model_meta(source)["provenance"]
        return provenance
    state = read_manifest(source).state
    return {"stage": state.get("stage"), TRAINED: state.get(TRAINED)}


def segment_steps(stage: StageConfig, steps_per_epoch: int) -> int:
    """Return the number of steps of a segment."""
    return stage.steps or math.ceil(stage.epochs * steps_per_epoch)


def forbidden_change(before: dict[str, Any], config: Config, name: StageName) -> str | None:
    """Return the first change that requires another run, as `KEY was A, is B`."""
    return next(_changes(before, config, name, "never"), None)


def _changes(before: dict[str, Any], config: Config, name: StageName, rule: ResumeRule) -> Iterator[str]:
    """Yield the changes of keys with this rule, as `KEY was A, is B`."""
    for key, was, now in differences(before, config.to_dict()):
        if rule_of(config, key, name) == rule:
            yield f"{key} was {was}, is {now}"


class GrownReader(TensorReader):
    """Reads a checkpoint for a model with larger tables: new rows are initial values, with zero moments.

    Rows of ids that become known (`new_codes`) are the row out of vocabulary: their vectors change by training alone.
    """

    def __init__(self, checkpoint: LoadedCheckpoint, model: DualEncoder, new_codes: Mapping[str, np.ndarray]) -> None:
        super().__init__(checkpoint)
        self._new_codes = {f"tables.tables.{name}.weight": codes for name, codes in new_codes.items()}
        self._new_rows: dict[str, Tensor] = {}
        for name, parameter in model.tables.named_parameters("tables"):
            if not parameter.requires_grad:
                continue
            old_rows, new_rows = self.shape(name)[0], len(parameter)
            if old_rows < new_rows:
                logger.info(NEW_ROWS, name, old_rows, new_rows - old_rows)
                self._new_rows[name] = parameter.detach()[old_rows:].float().clone()

    def __call__(self, name: str) -> Tensor:
        """Return the tensor `name`, on the CPU, with its new rows. Raises CheckpointError: no such tensor."""
        tensor = super().__call__(name)
        state, _, weight = name.rpartition("/")
        new_rows = self._new_rows.get(weight)
        if new_rows is not None:
            tensor = torch.cat([tensor, torch.zeros_like(new_rows) if state else new_rows])
        if weight in self._new_codes:
            tensor[torch.from_numpy(self._new_codes[weight])] = 0.0 if state else tensor[OUT_OF_VOCABULARY].clone()
        return tensor
