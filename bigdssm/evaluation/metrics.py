"""Metrics of ranks, with standard errors and paired bootstrap intervals.

A row has one relevant document; NaN is the rank of a row that has none and does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CHUNK_DRAWS = 4_000_000


def row_metrics(
    ranks: np.ndarray, ks: Sequence[int] = (10,), recall_ks: Sequence[int] = (100,)
) -> dict[str, np.ndarray]:
    """Return float64 [rows with a rank] by name: hr_at_k, ndcg_at_k, mrr (uncut), recall_at_k.

    With one relevant document the ideal DCG is 1, and NDCG@k is 1 / log2(1 + rank) within the first k. Source:
    Järvelin and Kekäläinen 2002.
    """
    ranks = np.asarray(ranks, np.float64)
    ranks = ranks[~np.isnan(ranks)]
    values: dict[str, np.ndarray] = {}
    for k in ks:
        within = ranks <= k
        values[f"hr_at_{k}"] = within.astype(np.float64)
        values[f"ndcg_at_{k}"] = within / np.log2(1 + ranks)
    values["mrr"] = 1 / ranks
    for k in recall_ks:
        values[f"recall_at_{k}"] = (ranks <= k).astype(np.float64)
    return values


def mean_metrics(ranks: np.ndarray, ks: Sequence[int] = (10,)) -> dict[str, float]:
    """Return the mean over rows of every metric of `row_metrics`; NaN where no row has a rank."""
    return means(row_metrics(ranks, ks))


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean over rows of every metric; NaN where there are no rows."""
    return {name: float(rows.mean()) if len(rows) else float("nan") for name, rows in values.items()}


def standard_errors(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the standard error of every mean of `means`; NaN below two rows."""
    return {
        name: float(rows.std(ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else float("nan")
        for name, rows in values.items()
    }


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return for example `+0.0123 [+0.0010, +0.0236]`."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_bootstrap(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> Difference:
    """Return the mean of a − b over paired rows and its percentile interval over resampled rows.

    The same rows and seed give the same interval on every machine and numpy. Raises ValueError where the rows do not
    pair. Source: Efron and Tibshirani 1993, section 13.3.
    """
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired rows are needed, got shapes {a.shape} and {b.shape}")
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    rows = len(difference)
    random = np.random.RandomState(seed)  # its stream is frozen; a Generator's may change between versions
    means = np.empty(NUM_RESAMPLES)
    at_once = max(1, CHUNK_DRAWS // rows)
    for first in range(0, NUM_RESAMPLES, at_once):
        size = min(at_once, NUM_RESAMPLES - first)
        means[first : first + size] = difference[random.randint(0, rows, (size, rows))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(difference.mean()), float(low), float(high))
