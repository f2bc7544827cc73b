"""Transition counts between documents, for Markov baselines and warm starts."""

from dataclasses import dataclass
from math import lcm

import numpy as np
from scipy.sparse import csr_matrix

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError

MAX_WINDOW = 16  # events: the squared least common multiple of the distances, 720,720², is still exact
QUERIES_AT_ONCE, MERGED_AT_ONCE = 1 << 16, 1 << 22


@dataclass(frozen=True)
class Transitions:
    """count(i → j): the sum of 1 / distance over train events j with i in the window before.

    The window has `window` events; the preceding event has distance 1. Weights are scaled by the least common multiple
    of the distances, so that sums are exact integers.
    """

    num_docs: int
    window: int
    starts: np.ndarray  # int64 [N+1]: the followers of i are followers[starts[i]:starts[i + 1]]
    followers: np.ndarray  # int64, ascending
    counts: np.ndarray  # int64

    @classmethod
    def of(cls, dataset: Dataset, window: int) -> "Transitions":
        """Count the transitions in `dataset`.

        Raises ConfigError: invalid window; DataError: rows without histories.
        """
        if not 0 < window <= MAX_WINDOW:
            raise ConfigError(f"window={window}: needs at least 1 and at most {MAX_WINDOW} events")
        num_docs = dataset.catalogue.num_docs
        keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for rows in dataset.iterate("train", QUERIES_AT_ONCE):
            if rows.sequence is None:
                raise DataError(f"{dataset.dir} has pairs without histories, so no transitions")
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
        """Return the scaled counts, float64 [N, N]."""
        shape = (self.num_docs, self.num_docs)
        return csr_matrix((self.counts.astype(np.float64), self.followers, self.starts), shape)


def _summed(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum counts by key: ascending distinct keys, int64 sums."""
    keys, inverse = np.unique(np.concatenate([part for part, _ in parts]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([count for _, count in parts]), len(keys))  # exact up to 2⁵³
    return keys, counts.astype(np.int64)


def last_items(rows: Rows, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (weight, catalogue row, row) of the newest `window` items per history, int64."""
    items, offsets = rows.seen_ragged(newest=window)
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    distance = offsets[1:][row] - np.arange(len(items))
    return lcm(*range(1, window + 1)) // distance, items, row
