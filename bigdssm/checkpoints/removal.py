"""Remove users and items from the models of a run: values, rows of tables, and checkpoints that have them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bigdssm.checkpoints.checkpoint import (
    CHECKPOINTS,
    COMMON,
    TRAINED_CODES,
    checkpoints_in,
    open_tensors,
    read_manifest,
)
from bigdssm.checkpoints.model_folder import (
    BEST,
    CONFIG_FILE,
    FROZEN_FILE,
    META_FILE,
    TABLES_DIR,
    WEIGHTS_FILE,
    is_model_folder,
    model_identity,
    read_model_meta,
    stored_checksum,
)
from bigdssm.config import load_written_config
from bigdssm.dataset.schema import Schema
from bigdssm.errors import CheckpointError
from bigdssm.features.categorical import FIRST_CODE, Categorical, categorical_of
from bigdssm.features.history import histories_of
from bigdssm.models.embedding_tables import table_name
from bigdssm.tables.files import holds_rows, write_without
from bigdssm.utils.atomic import Changes, write_json

WEIGHT = "tables.tables.{}.weight"  # of a table
Codes = Mapping[tuple[str, str], np.ndarray]  # int64 ascending, by side and feature: those of removed users and items


def forget_in_model(folder: Path, codes: Codes, changes: Changes) -> None:
    """Erase `codes` from the vocabularies and tables of a model folder.

    Its checksum stays: no other vector changes. Raises CheckpointError: not a model folder, or damaged.
    """
    meta = read_model_meta(folder)
    with changes.new_version(folder) as temporary:
        Schema.load(folder).erase(codes, temporary)
        rows = _rows_of_tables(folder, codes)
        for name in (WEIGHTS_FILE, FROZEN_FILE):
            if name not in meta["checksums"] or not (tables := _tables_in(folder / name, rows)):
                continue
            weights, is_changed = load_file(folder / name), False
            for table in tables:
                weight = weights[WEIGHT.format(table)]
                zeroed = torch.from_numpy(rows[table][rows[table] < len(weight)])
                is_changed |= bool(weight[zeroed].any())
                weight[zeroed] = 0
            if is_changed:
                save_file(weights, temporary / name, metadata={"format": "pt"})
        for name in meta["checksums"]:
            if name.startswith(f"{TABLES_DIR}/") and holds_rows(folder / name, rows):
                (temporary / TABLES_DIR).mkdir(exist_ok=True)
                write_without(folder / name, temporary / name, rows)
        checksums = {
            name: stored_checksum(temporary / name) if (temporary / name).exists() else checksum
            for name, checksum in meta["checksums"].items()
        }
        if checksums != meta["checksums"]:
            write_json(temporary / META_FILE, {**meta, "checksums": checksums, "identity": model_identity(meta)})


def forget_in_stage(folder: Path, codes: Codes, changes: Changes) -> None:
    """Erase `codes` from the best model of a stage's folder, and remove the checkpoints that may contain their rows.

    If best/ does not contain `codes`, its run began without them, and its checkpoints stay. Raises CheckpointError.
    """
    checkpoints, best = folder / CHECKPOINTS, folder / BEST
    changes.remove_all(checkpoints, ["damaged-*", ".*"])
    if not is_model_folder(best) or _contains(best, codes):
        for path in checkpoints_in(checkpoints):
            if _may_contain(path, folder, codes):
                changes.remove(path)
    if is_model_folder(best):
        forget_in_model(best, codes, changes)


def _contains(folder: Path, codes: Codes) -> bool:
    """Return whether the vocabularies, or the codes and rows of hashed ids, of a model folder have one of `codes`."""
    schema = Schema.load(folder)
    for side, features in schema.sides.items():
        for name, feature in categorical_of(features).items():
            forgotten = codes.get((side, name), np.zeros(0, np.int64))
            forgotten = forgotten[forgotten < feature.num_codes]
            # hashed values have no vocabulary that would show an earlier deletion
            if len(forgotten) and (
                feature.hash_buckets or len(np.setdiff1d(forgotten - FIRST_CODE, feature.vocabulary.erased_indices))
            ):
                return True
    return False


def _may_contain(path: Path, stage: Path, codes: Codes) -> bool:
    """Return whether a checkpoint has rows of `codes`, or lists them as trained; True if it is damaged."""
    try:
        checkpoint = read_manifest(path)
        rows = _rows_of_tables(stage, codes)
        for table, table_rows in rows.items():
            spec = checkpoint.tensors.get(WEIGHT.format(table))
            if spec is not None and (table_rows < spec.shape[0]).any():
                return True
        if len(_tables_in(stage / BEST / FROZEN_FILE, rows)):  # a resume requires the same frozen weights
            return True
        if any(holds_rows(file, rows) for files in checkpoint.table_files() for file in files):
            return True
        if any(name.startswith(COMMON + TRAINED_CODES) for name in checkpoint.tensors):
            for name, tensor in open_tensors(path).with_prefix(COMMON + TRAINED_CODES).items():
                trained, table_rows = tensor.numpy(), codes.get(("doc", name), np.zeros(0, np.int64))
                # of vocabularies, these are bits, which name no one
                if trained.dtype != np.uint8 and np.isin(table_rows, trained).any():
                    return True
    except (CheckpointError, OSError):
        return True
    return False


def _rows_of_tables(folder: Path, codes: Codes) -> dict[str, np.ndarray]:
    """Return the rows of `codes` by table; tables whose rows are shared by codes have none."""
    config = load_written_config(folder / CONFIG_FILE)
    rows: dict[str, np.ndarray] = {}
    for (side, name), side_codes in codes.items():
        feature = getattr(config.data, side).get(name)
        if config.model.tables.hash_rows and isinstance(feature, Categorical) and feature.hash_buckets:
            continue
        table = table_name("doc" if config.data.siamese else side, name)
        rows[table] = np.union1d(rows.get(table, side_codes), side_codes)
    if config.model.query.history.transition is not None:
        for name, history in histories_of(config.data.query).items():
            if (of_items := rows.get(table_name("doc", str(history.of)))) is not None:
                rows[table_name("query", name)] = of_items
    return rows


def _tables_in(path: Path, rows: Mapping[str, np.ndarray]) -> list[str]:
    """Return the tables of `rows` in a file of weights, which may not exist."""
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    return [table for table in rows if len(rows[table]) and WEIGHT.format(table) in names]
