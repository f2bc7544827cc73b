"""Metrics of ranks, with standard errors and paired bootstrap intervals.

A row has one relevant document; NaN is the rank of a row that has none and does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CHUNK_DRAWS = 4_000_000


Metric = Callable[[np.ndarray], np.ndarray]
"""From the ranks of rows (float64, 1 is best) to a value of each."""

# With one relevant document the ideal DCG is 1, and NDCG@10 is 1 / log2(1 + rank) within the first 10. Source:
# Järvelin and Kekäläinen 2002.
_METRICS: dict[str, Metric] = {
    "hr_at_10": lambda ranks: ranks <= 10,
    "ndcg_at_10": lambda ranks: (ranks <= 10) / np.log2(1 + ranks),
    "mrr": lambda ranks: 1 / ranks,  # uncut
    "recall_at_100": lambda ranks: ranks <= 100,
}


def register_metric(name: str, metric: Metric) -> None:
    """Have validation and evaluation report a metric beside the others."""
    _METRICS[name] = metric


def row_metrics(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return float64 [rows with a rank] of every metric by name."""
    ranks = np.asarray(ranks, np.float64)
    ranks = ranks[~np.isnan(ranks)]
    return {name: np.asarray(metric(ranks), np.float64) for name, metric in _METRICS.items()}


def mean_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Return the mean over rows of every metric of `row_metrics`; NaN where no row has a rank."""
    return means(row_metrics(ranks))


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean over rows (and seeds) of every metric; NaN where there are no rows."""
    return {name: float(rows.mean()) if rows.size else float("nan") for name, rows in values.items()}


def standard_errors(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the standard error of every mean of `means`, with other rows (and other seeds); NaN below two rows."""
    return {name: _standard_error(np.atleast_2d(rows)) for name, rows in values.items()}


def _standard_error(values_SR: np.ndarray) -> float:
    seeds, rows = values_SR.shape
    if rows < 2:
        return float("nan")
    variance = values_SR.mean(axis=0).var(ddof=1) / rows
    if seeds > 1:
        variance += values_SR.mean(axis=1).var(ddof=1) / seeds
    return float(variance**0.5)


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

    Either may be [seeds, rows], of models trained with several seeds, which pair too: rows and seeds are then resampled
    both. The same rows and seed give the same interval on every machine and numpy. Raises ValueError where the rows
    do not pair. Source: Efron and Tibshirani 1993, section 13.3; Owen 2007 for two factors.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape[-1] != b.shape[-1] or not a.size or (a.ndim == b.ndim == 2 and len(a) != len(b)):
        raise ValueError(f"paired rows are needed, got shapes {a.shape} and {b.shape}")
    difference_SR = np.atleast_2d(a - b)
    seeds, rows = difference_SR.shape
    random = np.random.RandomState(seed)  # its stream is frozen; a Generator's may change between versions
    means = np.empty(NUM_RESAMPLES)
    at_once = max(1, CHUNK_DRAWS // (seeds * rows))
    for first in range(0, NUM_RESAMPLES, at_once):
        size = min(at_once, NUM_RESAMPLES - first)
        of_seeds = difference_SR[:, random.randint(0, rows, (size, rows))].mean(axis=2)
        if seeds > 1:
            of_seeds = np.take_along_axis(of_seeds, random.randint(0, seeds, (seeds, size)), axis=0)
        means[first : first + size] = of_seeds.mean(axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(difference_SR.mean()), float(low), float(high))
