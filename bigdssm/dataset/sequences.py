"""The sequences of a dataset: each user's events in order of time, of which rows are pieces.

A row (sequence, first, end) gives a query for each target items[first:end]. The one at place p has seen items[:p].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.features.ragged import offsets_of

EVENT_COLUMNS = ("items", "relevance")  # lists with one value an event; further ones of events stand beside them
TIME_COLUMN = "event_time"  # such a list, float64, where events have times
VERSION_COLUMN = "version"  # such a list, where items have times: which version of its item an event saw


@dataclass(frozen=True)
class Targets:
    """The targets of R rows, m in all, row after row."""

    row: np.ndarray  # int64 [m]
    place: np.ndarray  # int64 [m]: in the sequence
    item: np.ndarray  # int64 [m]: the catalogue row
    relevance: np.ndarray  # float32 [m]
    version: np.ndarray | None = None  # int32 [m]: of the item, as `Versions.named` takes it; None: without times

    @classmethod
    def of(
        cls, table: MappedTable, sequence: np.ndarray, first: np.ndarray, end: np.ndarray, *, dated: bool = False
    ) -> Targets:  # fmt: skip
        """Return those of rows int64 [R], whose places are within their sequences; `dated`: with their versions."""
        items = table.take_slices("items", sequence, first, end)
        relevance = table.take_slices("relevance", sequence, first, end)
        row = np.repeat(np.arange(len(sequence)), items.lengths)
        place = np.arange(len(row)) - offsets_of(items.lengths)[row] + first[row]
        version = versions_of(table, sequence, first, end) if dated else None
        return cls(row, place, items.values.astype(np.int64), relevance.values, version)

    def faults(self, num_docs: int) -> Iterator[tuple[int, str]]:
        """Yield the number of each target that cannot be used, and why."""
        for number in np.flatnonzero(~self.good(num_docs)).tolist():
            item, relevance = self.item[number], self.relevance[number]
            if 0 <= item < num_docs:
                yield number, f"relevance is {relevance}, needs a number of at least 0"
            else:
                yield number, f"unknown document: {item} is not a row of the catalogue's {num_docs}"

    def good(self, num_docs: int) -> np.ndarray:
        """Return whether each target can be used, bool [m]."""
        known = (self.item >= 0) & (self.item < num_docs)
        good: np.ndarray = known & np.isfinite(self.relevance) & (self.relevance >= 0)
        return good

    def take(self, targets: np.ndarray) -> Targets:
        """Return some of them."""
        version = None if self.version is None else self.version[targets]
        return Targets(self.row[targets], self.place[targets], self.item[targets], self.relevance[targets], version)


def versions_of(table: MappedTable, sequence: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the versions that events [first, end) of sequences saw, int32; for datasets whose items have times."""
    return table.take_slices(VERSION_COLUMN, sequence, first, end).values
