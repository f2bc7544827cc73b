"""Row files: the updated rows of all tables that one rank has saved, in a checkpoint or a model folder.

A file has the safetensors layout; per table NAME it has the flat tensors NAME/rows int64 [n] (ascending), NAME/values
[n · d], NAME/key int64 [1] of its initial values and, in checkpoints, NAME/updated and NAME/occurrences int32 [n] and
the optimizer states.
The files of all ranks together hold a table; they are memory-mapped, and only the rows that are looked up are read.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigdssm.errors import CheckpointError
from bigdssm.tables.rows import OUT_OF_VOCABULARY, TableSpec, initial_rows
from bigdssm.tables.sharded import ShardedTables

ROWS, VALUES, KEY, UPDATED, OCCURRENCES = "rows", "values", "key", "updated", "occurrences"
COUNTS = (UPDATED, OCCURRENCES)
Content = dict[str, Tensor]
_NUMPY = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "BF16": np.uint16}


def table_tensors(tables: ShardedTables, *, states: bool) -> dict[str, Tensor]:
    """Return this rank's rows of all tables as the tensors of a row file.

    states: include optimizer states, step numbers and occurrences; else only admitted rows are returned.
    """
    tensors: dict[str, Tensor] = {}
    for name, store in tables.stores.items():
        content = store.content(tables.steps, states=states)
        tensors |= {f"{name}/{key}": tensor.reshape(-1).contiguous() for key, tensor in content.items()}
        tensors[f"{name}/{KEY}"] = torch.from_numpy(np.array([store.key], np.uint64).view(np.int64))
    return tensors


def row_file(rank: int) -> str:
    """Return the name of a rank's file in the folder `tables` of a model folder."""
    return f"rows-{rank:05d}.safetensors"


def write_row_file(path: Path, tables: ShardedTables) -> None:
    """Write this rank's rows, without states. Raises OSError."""
    save_file(table_tensors(tables, states=False), path)


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
        if not (spec := self.specs[name]).hash_rows:
            return self._vectors(name, rows)
        return self._vectors(name, torch.from_numpy(spec.hashed(rows.cpu().numpy()))).sum(-2).to(rows.device)

    def _vectors(self, name: str, rows: Tensor) -> Tensor:
        spec = self.specs[name]
        distinct, inverse = np.unique(rows.detach().cpu().numpy(), return_inverse=True)
        found = [_find(file, name, distinct, spec) for file in self._files]
        values = initial_rows(distinct, spec.dim, self.key(name), spec.std)
        if spec.admit_after > 1:  # rows that are not admitted have the vector of the one out of vocabulary
            admitted = np.isin(np.arange(len(distinct)), np.concatenate([index for index, _ in found]))
            if not admitted.all() and OUT_OF_VOCABULARY not in distinct:
                one = self._vectors(name, torch.tensor([OUT_OF_VOCABULARY])).numpy()
            else:
                one = values[distinct == OUT_OF_VOCABULARY]
            values[~admitted & (distinct != OUT_OF_VOCABULARY)] = one if len(one) else 0
        for file, (index, at) in zip(self._files, found, strict=True):
            values[index] = _float32(file[f"{name}/{VALUES}"].reshape(-1, spec.dim)[at])
        values[distinct == 0] = 0
        vectors = torch.from_numpy(values[inverse.reshape(-1)]).view(*rows.shape, spec.dim)
        return vectors.to(rows.device)

    def write(self, folder: Path) -> None:
        """Write the admitted rows, without states, to row files in a new folder. Raises OSError."""
        folder.mkdir()
        for rank, file in enumerate(self._files):
            tensors: Content = {}
            for name, spec in self.specs.items():
                rows = np.asarray(file[f"{name}/{ROWS}"])
                _, at = _find(file, name, rows, spec)
                values = file[f"{name}/{VALUES}"].reshape(-1, spec.dim)[at]
                tensors |= {f"{name}/{ROWS}": _tensor(rows[at]), f"{name}/{VALUES}": _tensor(values).reshape(-1)}
                tensors[f"{name}/{KEY}"] = _tensor(file[f"{name}/{KEY}"])
            save_file(tensors, folder / row_file(rank))

    def key(self, name: str) -> int:
        """Return the key of a table's initial values."""
        return int(self._files[0][f"{name}/{KEY}"].view(np.uint64)[0])

    def contents(self, name: str, owned: Callable[[np.ndarray], np.ndarray], *, states: bool) -> Iterator[Content]:
        """Yield the saved rows of each file for which `owned(rows)` is true, as `RowStore.load` takes them.

        states: all rows with their states, step numbers and occurrences; else the admitted rows alone.
        """
        prefix = f"{name}/"
        for file in self._files:
            rows = np.asarray(file[prefix + ROWS])
            at = np.arange(len(rows)) if states else _find(file, name, rows, self.specs[name])[1]
            at = at[owned(rows[at])]
            if not len(at):
                continue
            content = {ROWS: torch.from_numpy(rows[at])}
            for key in (key.removeprefix(prefix) for key in file if key.startswith(prefix)):
                if key == VALUES or (states and key not in (ROWS, KEY)):
                    values = file[prefix + key].reshape(len(rows), -1)[at]
                    content[key] = _tensor(values[:, 0] if key in COUNTS else values)
            yield content


def _find(file: dict[str, np.ndarray], name: str, rows: np.ndarray, spec: TableSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of admitted saved rows: in `rows`, and in the file."""
    saved = file[f"{name}/{ROWS}"]
    if not len(saved):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    at = np.minimum(np.searchsorted(saved, rows), len(saved) - 1)
    hit = saved[at] == rows
    if (occurrences := file.get(f"{name}/{OCCURRENCES}")) is not None:
        hit &= (occurrences[at] >= spec.admit_after) | (rows == OUT_OF_VOCABULARY)
    index = np.flatnonzero(hit)
    return index, at[index]


def load_tables(tables: ShardedTables, saved: MappedTables, *, states: bool) -> None:
    """Set this rank's rows to saved ones; states: with states, step numbers and occurrences, to resume."""
    for name, store in tables.stores.items():
        store.key = saved.key(name)
        for content in saved.contents(name, tables.partition.owns, states=states):
            store.load(content)


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Memory-map the tensors of a safetensors file, bfloat16 as uint16. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # a row is read without those around it
        content = np.frombuffer(mapped, np.uint8)
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
