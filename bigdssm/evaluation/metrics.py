"""Metrics of ranks, with standard errors and paired bootstrap intervals.

A row has one relevant document; rows without one have rank NaN and do not count. Several rows may share a query, such
as a user at several times, or a text with several documents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.utils.arguments import short_repr
from bigdssm.utils.components import add_named

NUM_RESAMPLES = 2000
CHUNK_DRAWS = 4_000_000
RESERVED_NAMES = ("step", "name", "seconds", "seeds")  # keys of records and reports
NOT_IN_TABLES = ("recall_at_100",)  # tables have 80 columns


Metric = Callable[[np.ndarray], np.ndarray]
"""Maps ranks (float64 [rows], 1 is best) to values [rows]."""

# With one relevant document the ideal DCG is 1, and NDCG@10 is 1 / log2(1 + rank) within the first 10. Source:
# Järvelin and Kekäläinen 2002.
_METRICS: dict[str, Metric] = {
    "hr_at_10": lambda ranks: ranks <= 10,
    "ndcg_at_10": lambda ranks: (ranks <= 10) / np.log2(1 + ranks),
    "mrr": lambda ranks: 1 / ranks,  # uncut
    "recall_at_100": lambda ranks: ranks <= 100,
}


def register_metric(name: str, metric: Metric) -> None:
    """Register a metric that validation and evaluation report. Raises ValueError: the name is taken; ConfigError."""
    if name in RESERVED_NAMES:
        raise ConfigError(f"the metric {name!r}: needs another name than {', '.join(RESERVED_NAMES)}; rename it")
    _values(name, metric, np.arange(1.0, 129.0))  # an invalid one would end a run at its first validation
    add_named(_METRICS, name, metric, "a metric")


def _values(name: str, metric: Metric, ranks: np.ndarray) -> np.ndarray:
    """Return the values of a metric, float64 [rows]. Raises ConfigError: another shape, or not finite."""
    values = metric(ranks)
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(())
    if values is None or numbers.shape != ranks.shape or not np.isfinite(numbers).all():
        raise ConfigError(
            f"the metric {name} returned {short_repr(values)}: needs a finite number per rank, an array of {len(ranks)}"
        )
    return numbers


def table_metrics() -> tuple[str, ...]:
    """Return the metrics of tables and log lines; JSON reports contain all."""
    return tuple(name for name in _METRICS if name not in NOT_IN_TABLES)


def find_metric(name: str, key: str = "validation_metric") -> str:
    """Return `name`. Raises ConfigError, naming the config key `key`: no such metric."""
    if name not in _METRICS:
        raise ConfigError(
            f"{key}: got {name}, needs one of {', '.join(_METRICS)}, or a registered metric whose module is imported "
            "(docs/extending.md)"
        )
    return name


def row_metrics(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return float64 [rows with a rank] by metric. Raises ConfigError: a registered metric returns other values."""
    ranks = np.asarray(ranks, np.float64)
    ranks = ranks[~np.isnan(ranks)]
    return {name: _values(name, metric, ranks) for name, metric in _METRICS.items()}


def mean_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Return the mean over rows by metric; NaN if no row has a rank."""
    return means(row_metrics(ranks))


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean over rows (and seeds) by metric; NaN without rows."""
    return {name: float(rows.mean()) if rows.size else float("nan") for name, rows in values.items()}


def standard_errors(values: Mapping[str, np.ndarray], query_ids: np.ndarray | None = None) -> dict[str, float]:
    """Return the standard errors of `means`, clustered by query (and seed); NaN below two queries.

    query_ids: int64 [rows]; default: a distinct query per row. Source: Cochran 1977, section 6.3 (ratio estimator:
    sums per query over rows per query).
    """
    errors = dict.fromkeys(values, float("nan"))
    for name, metric_values in values.items():
        values_SR = np.atleast_2d(metric_values)
        seeds, rows = values_SR.shape
        sums_1Q, counts_Q = _by_query((values_SR - values_SR.mean()).mean(axis=0, keepdims=True), query_ids)
        if (queries := len(counts_Q)) >= 2:
            of_seeds = values_SR.mean(axis=1).var(ddof=1) / seeds if seeds > 1 else 0.0
            errors[name] = float(((sums_1Q**2).sum() / rows**2 * queries / (queries - 1) + of_seeds) ** 0.5)
    return errors


def _by_query(values_SR: np.ndarray, query_ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums per query [S, Q], in order of first appearance, and the rows per query [Q]."""
    rows = values_SR.shape[1]
    if query_ids is None:
        return values_SR, np.ones(rows, np.int64)
    _, first, query = np.unique(query_ids, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    query = order[query]
    sums_SQ = np.stack([np.bincount(query, weights=values_R) for values_R in values_SR])
    return sums_SQ, np.bincount(query)


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval, NaN if undefined."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return for example `+0.0123 [+0.0010, +0.0236]`."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_bootstrap(a: np.ndarray, b: np.ndarray, query_ids: np.ndarray | None = None, *, seed: int = 0) -> Difference:
    """Return the mean of a − b over paired rows and its percentile interval over resampled queries.

    query_ids: int64 [rows]: rows of one query are resampled together, since they are not independent; default: a
    distinct query per row. a and b may be [seeds, rows], paired by seed, too: then queries and seeds are resampled.
    The interval is deterministic across machines and numpy versions; NaN for a single query. Raises ValueError: the
    shapes do not pair. Source: Efron and Tibshirani 1993, section 13.3; Field and Welsh 2007 for rows of one query;
    Owen 2007 for two factors.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape[-1] != b.shape[-1] or not a.size or (a.ndim == b.ndim == 2 and len(a) != len(b)):
        raise ValueError(f"got shapes {a.shape} and {b.shape}, needs paired rows")
    difference_SR = np.atleast_2d(a - b)
    sums_SQ, counts_Q = _by_query(difference_SR, query_ids)
    seeds, queries = sums_SQ.shape
    if queries < 2:
        return Difference(float(difference_SR.mean()), float("nan"), float("nan"))
    random = np.random.RandomState(seed)  # its stream is frozen; a Generator's may change between versions
    means = np.empty(NUM_RESAMPLES)
    at_once = max(1, CHUNK_DRAWS // (seeds * queries))
    for first in range(0, NUM_RESAMPLES, at_once):
        size = min(at_once, NUM_RESAMPLES - first)
        drawn = random.randint(0, queries, (size, queries))
        of_seeds = sums_SQ[:, drawn].sum(axis=2) / counts_Q[drawn].sum(axis=1)
        if seeds > 1:
            of_seeds = np.take_along_axis(of_seeds, random.randint(0, seeds, (seeds, size)), axis=0)
        means[first : first + size] = of_seeds.mean(axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(difference_SR.mean()), float(low), float(high))
