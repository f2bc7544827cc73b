"""Row files: the updated rows of all tables that one rank has saved, in a checkpoint or a model folder.

A file has the safetensors layout; per table NAME it has the flat tensors NAME/rows int64 [n] (ascending), NAME/values
[n · d], NAME/key int64 [1] of its initial values and, in checkpoints, NAME/updated int32 [n], NAME/sightings int32 [n]
and the optimizer states.
The files of all ranks together hold a table; they are memory-mapped, and only the rows that are looked up are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigdssm.errors import CheckpointError
from bigdssm.tables.rows import OUT_OF_VOCABULARY, TableSpec, initial_rows
from bigdssm.tables.sharded import ShardedTables

ROWS, VALUES, KEY, COUNTS = "rows", "values", "key", ("updated", "sightings")
_NUMPY = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "BF16": np.uint16}


def table_tensors(tables: ShardedTables, *, states: bool) -> dict[str, Tensor]:
    """Return this rank's rows of all tables as the tensors of a row file; `states`: of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, store in tables.stores.items():
        content = store.content(tables.steps)
        if not states and store.sightings is not None:  # other rows are out of vocabulary
            admitted = content["sightings"] >= store.spec.admit_after
            content = {key: tensor[admitted] for key, tensor in content.items()}
        kept = content if states else {key: content[key] for key in (ROWS, VALUES)}
        tensors |= {f"{name}/{key}": tensor.reshape(-1).contiguous() for key, tensor in kept.items()}
        tensors[f"{name}/{KEY}"] = torch.from_numpy(np.array([store.key], np.uint64).view(np.int64))
    return tensors


def row_file(rank: int) -> str:
    """Return the name of a rank's file in the folder `tables` of a model folder."""
    return f"rows-{rank:05d}.safetensors"


def write_row_file(path: Path, tables: ShardedTables) -> None:
    """Write this rank's rows, without states. Raises OSError."""
    save_file(table_tensors(tables, states=False), path)


def write_rows(path: Path, saved: Path) -> None:
    """Write the rows of a row file, without states, to another one. Raises CheckpointError: `saved` is none."""
    kept = {name: array for name, array in _mapped(saved).items() if name.rpartition("/")[2] in (ROWS, VALUES, KEY)}
    save_file({name: _tensor(array) for name, array in kept.items()}, path)


class MappedTables:
    """The tables in row files, for inference; rows that were never updated have their initial values."""

    def __init__(self, paths: Sequence[Path], specs: Mapping[str, TableSpec]) -> None:
        """Raises CheckpointError: a file is missing or damaged, or lacks a table."""
        self.paths, self.specs = list(paths), dict(specs)
        self._files = [_mapped(path) for path in paths]
        for path, file in zip(paths, self._files, strict=True):
            for name, spec in specs.items():
                rows, values = (file.get(f"{name}/{key}") for key in (ROWS, VALUES))
                if rows is None or values is None or len(rows) * spec.dim != len(values) or f"{name}/{KEY}" not in file:
                    raise CheckpointError(f"{path} does not hold the table {name} of width {spec.dim}; copy it again")
        if specs and not paths:
            raise CheckpointError(f"no file holds the rows of the tables {', '.join(specs)}; copy the folder again")

    def look_up(self, name: str, rows: Tensor) -> Tensor:
        """Return vectors float32 [*rows.shape, d] of rows int64, zeros for row 0, on the rows' device."""
        spec = self.specs[name]
        distinct, inverse = np.unique(rows.detach().cpu().numpy(), return_inverse=True)
        if spec.admit_after > 1:
            known = self._is_saved(name, distinct)
            distinct = np.where(known | (distinct == 0), distinct, OUT_OF_VOCABULARY)
        values = initial_rows(distinct, spec.dim, self.key(name), spec.std)
        values[distinct == 0] = 0
        for file in self._files:
            saved = file[f"{name}/{ROWS}"]
            if len(saved):
                at = np.minimum(np.searchsorted(saved, distinct), len(saved) - 1)
                found = np.flatnonzero(saved[at] == distinct)
                values[found] = _float32(file[f"{name}/{VALUES}"].reshape(-1, spec.dim)[at[found]])
        vectors = torch.from_numpy(values[inverse.reshape(-1)]).view(*rows.shape, spec.dim)
        return vectors.to(rows.device)

    def _is_saved(self, name: str, rows: np.ndarray) -> np.ndarray:
        saved = np.zeros(len(rows), bool)
        for file in self._files:
            saved |= np.isin(rows, file[f"{name}/{ROWS}"])
        return saved

    def key(self, name: str) -> int:
        """Return the key of a table's initial values."""
        return int(self._files[0][f"{name}/{KEY}"].view(np.uint64)[0])

    def contents(self, name: str, owned: Any) -> Iterator[dict[str, Tensor]]:
        """Yield the saved rows of each file for which `owned(rows)` is true, as `RowStore.load` takes them."""
        for file in self._files:
            rows = np.asarray(file[f"{name}/{ROWS}"])
            at = np.flatnonzero(owned(rows))
            if not len(at):
                continue
            content = {ROWS: torch.from_numpy(rows[at])}
            prefix = f"{name}/"
            for key in (key.removeprefix(prefix) for key in file if key.startswith(prefix)):
                if key not in (ROWS, KEY):
                    values = file[prefix + key].reshape(len(rows), -1)[at]
                    values = values[:, 0] if key in COUNTS else values
                    content[key] = _tensor(values)
            yield content


def load_tables(tables: ShardedTables, saved: MappedTables) -> None:
    """Set this rank's rows to saved ones, with their states if they were saved."""
    for name, store in tables.stores.items():
        store.key = saved.key(name)
        for content in saved.contents(name, lambda rows: tables.partition.owner(rows) == tables.partition.rank):
            store.load(content)


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Memory-map the tensors of a safetensors file, bfloat16 as uint16. Raises CheckpointError."""
    try:
        content = np.memmap(path, np.uint8, "r")
        size = int(content[:8].view(np.uint64)[0])
        header: dict[str, Any] = json.loads(bytes(content[8 : 8 + size]))
        arrays = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                arrays[name] = content[first:last].view(_NUMPY[entry["dtype"]])
        return arrays
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a row file: {error}; copy the folder again") from None


def _tensor(values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor


def _float32(values: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = _tensor(values).float().numpy()
    return numbers
