"""Memory-mapped Arrow files with random access by row: catalogue and sequences.

The record batches of several files form one table. Opening reads only the footers, and all processes on a machine
share the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bigdssm.errors import DataError
from bigdssm.features import ragged
from bigdssm.features.ragged import Column, Ragged, from_arrow
from bigdssm.utils.arrow import open_arrow


class MappedTable:
    """Arrow files as one table with rows 0 … num_rows - 1.

    Each file must contain the columns of the first one; later files may have more.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._batches: list[pa.RecordBatch] = []
        self.rows_per_file: list[int] = []
        for path in self.paths:
            reader = open_arrow(path)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            others = self._batches[0].schema.names if self._batches else []
            if not set(others) <= set(reader.schema.names):
                missing = sorted(set(others) - set(reader.schema.names))
                raise DataError(f"{path} lacks the columns {missing} of {self.paths[0]}; rebuild the dataset")
            self._batches += [batch for batch in batches if batch.num_rows]
            self.rows_per_file.append(sum(batch.num_rows for batch in batches))
            self.schema = reader.schema
        self._starts = ragged.offsets_of(np.array([batch.num_rows for batch in self._batches], np.int64))
        self._columns: dict[str, list[Column]] = {}

    @property
    def num_rows(self) -> int:
        """The number of rows in all files."""
        return int(self._starts[-1])

    def _parts(self, name: str) -> list[Column]:
        if name not in self._columns:
            arrays = [batch.column(batch.schema.get_field_index(name)) for batch in self._batches]
            if any(array.null_count for array in arrays):
                raise DataError(f"{self.paths[0].parent}: column {name} has nulls; rebuild the dataset")
            self._columns[name] = [from_arrow(array) for array in arrays]
        return self._columns[name]

    def column(self, name: str) -> np.ndarray:
        """Return a whole fixed-width column; copied only if the table has several record batches."""
        parts = self._parts(name)
        return np.asarray(ragged.concat(parts) if parts else from_arrow(pa.array([], self.schema.field(name).type)))

    def take(self, name: str, rows: np.ndarray) -> Column:
        """Return the column's values at `rows` (int64, in range), in that order."""
        return self._gather(name, rows, lambda part, local: ragged.take(part, local))

    def take_slices(self, name: str, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Ragged:
        """Return, for every i, the slice [starts[i], ends[i]) of the list at rows[i]."""

        def cut(part: Ragged, local: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Ragged:
            first = part.offsets[local]
            return ragged.gather_ranges(part.values, first + begin, first + end)

        return self._gather(name, rows, cut, starts, ends)

    def lengths(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the lengths of the lists at `rows`, int64."""
        return self._gather(name, rows, lambda part, local: part.offsets[local + 1] - part.offsets[local])

    def strings(self, name: str, rows: np.ndarray) -> list[str]:
        """Return a string column's values at `rows`."""
        return list(self.arrow(name, rows).to_pylist())

    def arrow(self, name: str, rows: np.ndarray) -> pa.Array:
        """Return the column's values at `rows` (int64, in range), in that order, as an Arrow array."""
        if not len(rows):
            return pa.array([], self.schema.field(name).type)
        groups, local, back = self._by_batch(rows)
        pieces = [self._batches[b].column(name).take(pa.array(local[group])) for b, group in groups]
        return pa.concat_arrays(pieces).take(pa.array(back))

    def _by_batch(self, rows: np.ndarray) -> tuple[list[tuple[int, np.ndarray]], np.ndarray, np.ndarray]:
        """Return (batch, indices into `rows`) groups, the rows within batches, the inverse order."""
        batch_of = np.searchsorted(self._starts, rows, "right") - 1
        order = np.argsort(batch_of, kind="stable")
        present, begins = np.unique(batch_of[order], return_index=True)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        groups = list(zip(present.tolist(), np.split(order, begins[1:]), strict=True))
        return groups, rows - self._starts[batch_of], back

    def _gather(self, name: str, rows: np.ndarray, cut, *more: np.ndarray):  # type: ignore[no-untyped-def]
        parts = self._parts(name)
        if len(parts) == 1:
            return cut(parts[0], rows, *more)
        if not len(rows):
            empty = from_arrow(pa.array([], self.schema.field(name).type))
            return cut(parts[0] if parts else empty, rows, *more)
        groups, local, back = self._by_batch(rows)
        pieces = [cut(parts[b], local[group], *(m[group] for m in more)) for b, group in groups]
        return ragged.take(ragged.concat(pieces), back)
