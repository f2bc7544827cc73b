"""Decoded rows, before they become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.features import ragged
from bigdssm.features.ragged import Column


@dataclass(frozen=True)
class Rows:
    """m rows as columns; a history holds the newest items' codes, oldest first."""

    step: int
    row_ids: np.ndarray  # int64 [m]: the row's number in the split
    query: dict[str, Column]
    doc_rows: np.ndarray  # int64 [m]: catalogue rows; -1 without a catalogue
    relevance: np.ndarray  # float32 [m]
    query_ids: np.ndarray  # int64 [m]
    sequence: np.ndarray | None = None  # int64 [m]: the number of the row's sequence
    end: np.ndarray | None = None  # int32 [m]: the row's history is items[:end] of its sequence
    doc: dict[str, Column] = field(default_factory=dict)  # rows that bring their documents: the features of each
    doc_ids: np.ndarray | None = None  # int64 [m], of rows that bring their documents
    sequences: MappedTable | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.row_ids)

    def seen_ragged(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the catalogue rows of every event before each row's own: values, offsets (int64 [m + 1]).

        Without sequences nothing is seen.
        """
        if self.sequences is None or self.sequence is None or self.end is None:
            return np.empty(0, np.int64), np.zeros(len(self) + 1, np.int64)
        begin = np.zeros_like(self.sequence)
        seen = self.sequences.take_slices("items", self.sequence, begin, self.end.astype(np.int64))
        return seen.values, seen.offsets

    def seen(self, i: int) -> np.ndarray:
        """Return the catalogue rows of every event before row i's own, int64, oldest first."""
        if self.sequences is None or self.sequence is None or self.end is None:
            return np.empty(0, np.int64)
        end = self.end[i : i + 1].astype(np.int64)
        return self.sequences.take_slices("items", self.sequence[i : i + 1], np.zeros(1, np.int64), end)[0]

    def take(self, rows: np.ndarray) -> Rows:
        """Return the given rows (int64), in the given order."""

        def taken(name: str) -> Any:
            return None if getattr(self, name) is None else getattr(self, name)[rows]

        return Rows(
            step=self.step,
            query={name: ragged.take(column, rows) for name, column in self.query.items()},
            doc={name: ragged.take(column, rows) for name, column in self.doc.items()},
            sequences=self.sequences,
            **{name: taken(name) for name in _ARRAYS},
        )

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of parts of one step below each other."""
        if len(parts) == 1:
            return parts[0]

        def together(name: str) -> Any:
            return None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])

        return cls(
            step=parts[0].step,
            query={name: ragged.concat([part.query[name] for part in parts]) for name in parts[0].query},
            doc={name: ragged.concat([part.doc[name] for part in parts]) for name in parts[0].doc},
            sequences=parts[0].sequences,
            **{name: together(name) for name in _ARRAYS},
        )


_ARRAYS = ("row_ids", "doc_rows", "relevance", "query_ids", "sequence", "end", "doc_ids")
