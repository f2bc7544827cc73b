"""Ragged columns: rows of different lengths, stored as one value array and offsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray  # int64 [rows + 1], starts at 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the values of one row."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Return the rows' lengths, int64 [rows]."""
        return np.diff(self.offsets)

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[int] | np.ndarray], dtype: type = np.int32) -> "Ragged":
        """Return the rows of a list of lists."""
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        parts: list[np.ndarray] = [np.asarray(row, dtype) for row in rows]
        return cls(np.concatenate(parts) if parts else np.empty(0, dtype), offsets_of(lengths))

    @classmethod
    def concat(cls, parts: "Sequence[Ragged]") -> "Ragged":
        """Concatenate the rows of all parts."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), offsets_of(lengths))

    def take(self, rows: np.ndarray) -> "Ragged":
        """Return the given rows, in the given order."""
        return gather_ranges(self.values, self.offsets[rows], self.offsets[rows + 1])

    def padded(self, fill: float, dtype: Any = np.int64) -> np.ndarray:
        """Return the rows padded with `fill`, [rows, length of the longest row, at least 1]."""
        lengths = self.lengths
        width = max(1, int(lengths.max(initial=0)))
        out: np.ndarray = np.full((len(self), width), fill, dtype)
        out[np.arange(width) < lengths[:, None]] = self.values
        return out


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return the int64 offsets [rows + 1] of rows with these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def gather_ranges(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Ragged:
    """Return the ranges values[start:end] as rows."""
    lengths = ends - starts
    offsets = offsets_of(lengths)
    index = np.repeat(starts - offsets[:-1], lengths)
    index += np.arange(offsets[-1])
    return Ragged(values[index], offsets)


Column = np.ndarray | Ragged
"""One column: fixed width, or ragged."""


def values_of(column: Column) -> np.ndarray:
    """Return the values of all rows, end to end."""
    return column.values if isinstance(column, Ragged) else np.asarray(column)


def rows_with(mask: np.ndarray, column: Column) -> np.ndarray:
    """Return the mask of rows of which any value is in the mask of values, bool [R]."""
    if not isinstance(column, Ragged):
        return mask
    rows = np.zeros(len(column), bool)
    rows[np.searchsorted(column.offsets, np.flatnonzero(mask), "right") - 1] = True
    return rows


def concat(columns: Sequence[Column]) -> Column:
    """Concatenate columns of one kind."""
    if len(columns) == 1:
        return columns[0]
    rows = [column for column in columns if isinstance(column, Ragged)]
    if rows:
        return Ragged.concat(rows)
    return np.concatenate([np.asarray(column) for column in columns])


def joined(first: Ragged, second: Ragged) -> Ragged:
    """Return rows of the values of `first` followed by those of `second`, as many rows."""
    pairs = np.arange(2 * len(first)).reshape(2, -1).T.ravel()
    both = Ragged.concat([first, second]).take(pairs)
    return Ragged(both.values, both.offsets[::2])


def take(column: Column, rows: np.ndarray) -> Column:
    """Return the given rows of a column, in the given order."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def from_arrow(array: pa.Array) -> Column:
    """Return an Arrow array without nulls as a column; its values are not copied."""
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        return array.to_numpy()
    offsets = array.offsets.to_numpy().astype(np.int64, copy=False)
    values = array.values.to_numpy()[offsets[0] : offsets[-1]]
    return Ragged(values, offsets - offsets[0] if offsets[0] else offsets)
