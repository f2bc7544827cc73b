"""Which documents follow which in the train split: a Markov chain's counts, and where vectors of items may begin."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np
from scipy.sparse import csr_matrix

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError

MOST_APART = 16  # events: 1 / distance times their least common multiple, 720,720, squared is still exact
QUERIES_AT_ONCE, MERGED_AT_ONCE = 1 << 16, 1 << 22


@dataclass(frozen=True)
class Transitions:
    """count(i → j) sums 1 / distance over the train events j that have i among the `window` events before.

    Distance 1 is the event just before. Every weight is kept times the least common multiple of the distances, so that
    sums are exact and equal ones are equal.
    """

    num_docs: int
    window: int
    starts: np.ndarray  # int64 [N+1]: the followers of i are followers[starts[i]:starts[i + 1]]
    followers: np.ndarray  # int64, ascending
    counts: np.ndarray  # int64

    @classmethod
    def of(cls, dataset: Dataset, window: int) -> Transitions:
        """Return those of `dataset`. Raises ConfigError: no such window; DataError: its rows have no history."""
        if not 0 < window <= MOST_APART:
            raise ConfigError(f"window={window}: needs at least 1 and at most {MOST_APART} events")
        num_docs = dataset.catalogue.num_docs
        keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for rows in dataset.iterate("train", QUERIES_AT_ONCE):
            if rows.sequence is None:
                raise DataError(f"{dataset.dir} holds pairs without histories, so that nothing follows anything")
            weights, items, row = last_items(rows, window)
            relevant = rows.relevance[row] > 0
            parts.append(_summed([(items[relevant] * num_docs + rows.doc_rows[row[relevant]], weights[relevant])]))
            if sum(len(part) for part, _ in parts) > max(MERGED_AT_ONCE, len(keys)):
                keys, counts = _summed([(keys, counts), *parts])
                parts = []
        keys, counts = _summed([(keys, counts), *parts])
        starts = np.searchsorted(keys, np.arange(num_docs + 1) * num_docs)
        return cls(num_docs, window, starts, keys % num_docs, counts)

    def matrix(self) -> csr_matrix:
        """Return the counts as they are kept, float64 [N, N]."""
        shape = (self.num_docs, self.num_docs)
        return csr_matrix((self.counts.astype(np.float64), self.followers, self.starts), shape)


def _summed(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of all parts, each once and ascending, and the sums of their counts, int64."""
    keys, inverse = np.unique(np.concatenate([part for part, _ in parts]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([count for _, count in parts]), len(keys))  # exact up to 2⁵³
    return keys, counts.astype(np.int64)


def last_items(rows: Rows, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (weight, catalogue row, row) of the newest `window` items of every history, int64."""
    items, offsets = rows.seen_ragged(newest=window)
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    distance = offsets[1:][row] - np.arange(len(items))
    return lcm(*range(1, window + 1)) // distance, items, row
