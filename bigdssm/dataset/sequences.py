"""The sequences of a dataset: each user's events in order of time.

Rows are segments of sequences. A row (sequence, first, end) has one query per target in items[first:end]. The target at
position p is predicted from items[:p].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.features.ragged import offsets_of

EVENT_COLUMNS = ("items", "relevance")  # lists with one value per event, in addition to further event columns
TIME_COLUMN = "event_time"  # list of float64, if events have times
VERSION_COLUMN = "version"  # list, if items have times: the item version that an event saw


@dataclass(frozen=True)
class Targets:
    """The m targets of R rows, ordered by row."""

    row: np.ndarray  # int64 [m]
    position: np.ndarray  # int64 [m]: in the sequence
    item: np.ndarray  # int64 [m]: the catalogue row
    relevance: np.ndarray  # float32 [m]

    @classmethod
    def of(cls, table: MappedTable, sequence: np.ndarray, first: np.ndarray, end: np.ndarray) -> Targets:
        """Read the targets of rows (int64 [R], in range)."""
        items = table.take_slices("items", sequence, first, end)
        relevance = table.take_slices("relevance", sequence, first, end)
        row = np.repeat(np.arange(len(sequence)), items.lengths)
        position = np.arange(len(row)) - offsets_of(items.lengths)[row] + first[row]
        return cls(row, position, items.values.astype(np.int64), relevance.values)

    def faults(self, num_docs: int) -> Iterator[tuple[int, str]]:
        """Yield (target number, reason) of the invalid targets."""
        for number in np.flatnonzero(~self.valid(num_docs)).tolist():
            item, relevance = self.item[number], self.relevance[number]
            if 0 <= item < num_docs:
                yield number, f"relevance is {relevance}, needs a number of at least 0"
            else:
                yield number, f"unknown document: {item} is not a row of the catalogue's {num_docs}"

    def valid(self, num_docs: int) -> np.ndarray:
        """Return the mask of valid targets, bool [m]."""
        known = (self.item >= 0) & (self.item < num_docs)
        good: np.ndarray = known & np.isfinite(self.relevance) & (self.relevance >= 0)
        return good

    def take(self, targets: np.ndarray) -> Targets:
        """Select targets by index or mask."""
        return Targets(self.row[targets], self.position[targets], self.item[targets], self.relevance[targets])


def versions_of(table: MappedTable, sequence: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the item versions of events [first, end) of sequences, int32, see `Versions.version_rows`.

    Only for items with times.
    """
    return table.take_slices(VERSION_COLUMN, sequence, first, end).values
