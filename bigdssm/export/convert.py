"""Export a stage's weights or a model folder: write aside, compare with the trainer, rename."""

import glob
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from bigdssm.checkpoints.checkpoint import CHECKPOINTS, checkpoints_in, find_checkpoint, folder_checksums
from bigdssm.checkpoints.model_folder import (
    BEST,
    CONFIG_FILE,
    META_FILE,
    ModelFolder,
    is_model_folder,
    load_checkpoint_model,
    load_model_folder,
)
from bigdssm.cluster.metrics import METRICS_FILE, read_stage
from bigdssm.config import StageName, TablesConfig
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.export import adapter_format, model_format, onnx_format, sentence_transformers_format  # noqa: F401, formats
from bigdssm.export.adapter_format import without_adapters
from bigdssm.export.formats import CARD_FILE, EXPORT_FORMATS, ExportFormat, Parity, ReportedMetrics, model_card
from bigdssm.export.onnx_model import EXPORT_FILE
from bigdssm.models import DualEncoder
from bigdssm.utils.atomic import check_replaceable, new_folder, real_path, write_json

DENSE_BYTES = 2**31  # of one table: ONNX files are at most 2 GiB
FLOAT_BYTES = 4


@dataclass(frozen=True)
class ExportSource:
    """A trained model to export."""

    model: ModelFolder
    name: str  # for messages: best, step-00000100, …
    metrics: ReportedMetrics | None = None


def stage_source(stage_dir: Path, which: str) -> ExportSource:
    """Load a stage's `best`, `latest` or `step-…` weights; checkpoints of any ZeRO stage and world size.

    Raises CheckpointError: missing or damaged weights.
    """
    best = stage_dir / BEST
    if which == BEST:
        if not is_model_folder(best):
            stopped = "the stage was stopped before its first validation; use --checkpoint latest"
            hint = stopped if checkpoints_in(stage_dir / CHECKPOINTS) else "has the stage validated or finished yet?"
            raise CheckpointError(f"{stage_dir} has no {BEST}/ folder; {hint}")
        folder = load_model_folder(best)
        return ExportSource(folder, BEST, _validation(stage_dir, folder.provenance.get("step")))
    path = find_checkpoint(stage_dir, which)
    model = load_checkpoint_model(path)
    if model.config.stage(cast(StageName, stage_dir.name)).weight_average:  # validation used the averaged weights
        return ExportSource(model, path.name)
    return ExportSource(model, path.name, _validation(stage_dir, int(path.name.removeprefix("step-"))))


def folder_source(folder: Path) -> ExportSource:
    """Load a model folder. Raises CheckpointError: missing or damaged."""
    return ExportSource(load_model_folder(folder), folder.name)


def export(source: ExportSource, out: Path, kind: str | ExportFormat = "model", *, overwrite: bool = False) -> Parity:
    """Export `source` to the folder `out` with a model card; returns the parity with the trainer.

    overwrite: `out` may hold something else; its files with other names are kept. Raises, without writing anything:
    ConfigError: the format does not support the model, or `out` holds something else; CheckpointError: the vectors
    differ by more than `formats.PARITY_LIMIT`.
    """
    kind = EXPORT_FORMATS.make(kind)
    if not kind.keeps_adapters:
        source = replace(source, model=without_adapters(source.model))
    target = kind.format
    is_model_format = target == model_format.ModelExport.format
    if source.model.schema.event_inputs and not is_model_format:
        raise ConfigError(
            f"--format {target} has no inputs for the features of events "
            f"{', '.join(source.model.schema.event_inputs)}; use --format model"
        )
    if not kind.keeps_tables:
        source = replace(source, model=with_dense_tables(source.model, target))
    out = real_path(out)
    marker = META_FILE if is_model_format else EXPORT_FILE
    check_replaceable(
        out, marker, lambda meta: is_model_format or meta.get("format") == target,
        f"is not an export of the format {target}", overwrite=overwrite,
    )  # fmt: skip
    try:  # the files of an earlier export, if any
        checksums = json.loads((out / marker).read_text(encoding="utf-8"))["checksums"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        checksums = {}
    with new_folder(out, [*map(glob.escape, checksums), marker, CARD_FILE, CONFIG_FILE]) as temporary:
        parity = kind.write(source.model, temporary)
        parity.check(f"the {target} export")
        card = model_card(source.model, out.name, kind, parity, source.metrics)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        if not is_model_format:
            content = {
                "format": target,
                "model_checksum": source.model.checksum,
                "provenance": source.model.provenance,
                "parity": asdict(parity),
                "checksums": folder_checksums(temporary),
            }
            write_json(temporary / EXPORT_FILE, content)
    return parity


def _validation(stage_dir: Path, step: Any) -> ReportedMetrics | None:
    """Return the validation metrics of exactly this step, or None."""
    if not (stage_dir / METRICS_FILE).is_file():
        return None
    for record in read_stage(stage_dir):
        if record["step"] == step and "validation" in record:
            return ReportedMetrics(f"step {step} of {stage_dir.name}", record["validation"])
    return None


def with_dense_tables(folder: ModelFolder, target: str) -> ModelFolder:
    """Return the model with all rows of its sharded tables in memory; `folder` itself if no table is sharded.

    Raises ConfigError: a table is too large for the format `target`.
    """
    model = folder.model
    if not model.tables.sharded:
        return folder
    state = dict(model.state_dict())
    for name, spec in model.tables.sharded.items():
        if (size := spec.rows * spec.dim * FLOAT_BYTES) > DENSE_BYTES:
            raise ConfigError(
                f"--format {target}: the table {name} has {spec.rows} rows of width {spec.dim}, {size / 1e9:.1f} GB; "
                f"the format holds tables of up to {DENSE_BYTES / 1e9:.1f} GB; use --format model"
            )
        assert model.tables.source is not None
        state[f"tables.tables.{name}.weight"] = model.tables.source.look_up(name, torch.arange(spec.rows))
    config = replace(folder.config, model=replace(folder.config.model, tables=TablesConfig(sharding="replicated")))
    texts = {name: cast(Any, encoder).architecture for name, encoder in model.text.items()}
    dense = DualEncoder(config.model, folder.schema, texts)
    dense.load_state_dict(state)
    return replace(folder, model=dense.eval(), config=config)  # the scores, and thus the checksum, stay
