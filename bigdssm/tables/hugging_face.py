"""A dataset that Hugging Face's `datasets` has saved to disk (`save_to_disk`), read without that library.

state.json names its files, Arrow streams whose rows follow each other; dataset_info.json says what its columns mean to
`datasets`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigdssm.errors import DataError
from bigdssm.tables.arrow_ipc import ArrowSource
from bigdssm.tables.files import LocalFile

STATE_FILE, INFO_FILE, SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder holds a saved dataset, or several by split."""
    return (folder / SPLITS_FILE).is_file() or all((folder / name).is_file() for name in (STATE_FILE, INFO_FILE))


def saved_dataset(folder: Path) -> ArrowSource:
    """Return a folder's dataset as a source.

    Raises DataError: several splits, damaged, a file missing, or rows chosen by an index beside the files.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = ", ".join(str(folder / str(split)) for split in _json(folder / SPLITS_FILE).get("splits", []))
        raise DataError(f"{folder} holds several splits of a dataset; give one of them: {splits}")
    state = _json(folder / STATE_FILE)
    if any(value for key, value in state.items() if "indices" in key):
        raise DataError(
            f"{folder} holds rows that an index beside its files chooses; write them out: in Python, "
            f"datasets.load_from_disk(…).flatten_indices().save_to_disk(…)"
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / STATE_FILE} is of another format: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{folder / STATE_FILE} names a file {name!r}, not one of its folder; refused")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} does not exist, but {STATE_FILE} names it; copy the dataset whole")
    if not names:
        raise DataError(f"{folder} has no rows: its {STATE_FILE} names no file")
    return ArrowSource(*(LocalFile(folder / name) for name in names), name=str(folder))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
