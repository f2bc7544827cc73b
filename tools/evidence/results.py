"""Results of a claim: means with intervals, metrics by popularity of the document, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import DataError
from bigdssm.evaluation.comparison import MeasuredRows, System
from tools.evidence.benches import BenchmarkResult
from tools.evidence.claims import Claim, Expectation, Verdict
from tools.evidence.running import Trial
from tools.evidence.stored import StoredTrial

BINS = 10  # of the split's rows, by popularity of their document


@dataclass(frozen=True)
class CellResult:
    """Metrics of a cell on a set."""

    cell: str
    mean: float  # of the claim's metric, over rows and seeds
    error: float  # standard error of the mean
    seeds: int
    cpu_seconds: float  # per training, mean over seeds and sets of a pool
    cold: float | None  # metric of rows whose document is no train positive; None without such rows
    deciles: list[float]  # metric by deciles of the other rows, rare documents first


@dataclass(frozen=True)
class Comparison:
    """Result of an expectation on a set."""

    mean: float  # difference of the metrics
    low: float
    high: float
    verdict: Verdict
    margin: float = 0.0  # threshold of the verdict

    @property
    def distance(self) -> float:
        """Return the distance of the nearer end of the interval from the margin."""
        return min(abs(self.low - self.margin), abs(self.high - self.margin))

    def __str__(self) -> str:
        """Return for example `+0.0135 [+0.0053, +0.0212]`."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class SetResult:
    """Results of a claim on a set or pool."""

    members: list[str]  # the sets of the pool, or the set
    rows: int  # evaluated rows of the split
    query_ids: int  # distinct users or texts among them
    cold_rows: int
    cells: list[CellResult]
    expected: list[Comparison | None]  # in the claim's order; None if a cell is not trained on this set


@dataclass(frozen=True)
class Result:
    """Results of a claim, as in `docs/evidence.md`."""

    claim: str
    why: str
    metric: str
    split: str
    expect: list[str]  # in words
    sets: dict[str, SetResult]
    verdict: Verdict
    figures: list[BenchmarkResult] = field(default_factory=list)  # of the claim's benchmarks
    cpu_hours: float = 0.0  # of all its training runs, each counted once

    def decisive(self) -> str:
        """Return the decisive comparison in words: the closest of those with the overall verdict."""
        calls = [
            (comparison.distance, f"{words}: {comparison} on {name}")
            for name, one in self.sets.items()
            for words, comparison in zip(self.expect, one.expected, strict=True)
            if comparison is not None and comparison.verdict == self.verdict
        ]
        return min(calls)[1] if calls else ""

    def with_texts(self, claim: Claim) -> Result:
        """Return the result with the current texts of the claim; unchanged if its comparisons differ."""
        same = self.expect == [_in_words(expected) for expected in claim.expect]
        return replace(self, claim=claim.claim, why=claim.why) if same else self

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Result:
        """Build a result from the output of `to_dict`."""

        def of_set(one: dict[str, Any]) -> SetResult:
            cells = [CellResult(**cell) for cell in one["cells"]]
            return SetResult(**{**one, "cells": cells, "expected": [c and Comparison(**c) for c in one["expected"]]})

        figures = [BenchmarkResult(**one) for one in content["figures"]]
        sets = {name: of_set(one) for name, one in content["sets"].items()}
        return cls(**{**content, "sets": sets, "figures": figures})


def collect(
    claim: Claim, trials: Sequence[Trial], stored: Mapping[str, StoredTrial], figures: Sequence[BenchmarkResult] = ()
) -> Result:
    """Collect the `stored` results of a claim's trials, and the results of its benchmarks.

    Raises DataError: a trial is not finished.
    """
    if unfinished := [str(trial) for trial in trials if trial.name not in stored]:
        raise DataError(f"not finished: {'; '.join(unfinished)}")
    finished = {
        name: [(trial, stored[trial.name]) for trial in trials if trial.set_name == name] for name in claim.sets
    }
    sets = {pool: _of_sets(claim, {name: finished[name] for name in members}) for pool, members in claim.pools.items()}
    verdicts = [comparison.verdict for one in sets.values() for comparison in one.expected if comparison is not None]
    seconds = {trial.name: stored[trial.name].cpu_seconds for trial in trials}
    own = {trial.folder: seconds[trial.name] - sum(seconds[needed.name] for needed in trial.needed) for trial in trials}
    return Result(
        claim.claim, claim.why, claim.metric, claim.split, [_in_words(expected) for expected in claim.expect], sets,
        together(verdicts), list(figures), round(sum(own.values()) / 3600, 1),
    )  # fmt: skip


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Combine verdicts: holds if all hold, does not hold if one does not, otherwise open."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "open"


def _pooled(systems: Sequence[System]) -> System:
    """Concatenate the rows of several splits; the systems must be of ranks."""
    first = systems[0]
    values = {name: np.concatenate([system.values[name] for system in systems]) for name in first.values}
    query_ids = [system.query_ids for system in systems if system.query_ids is not None]
    assert len(query_ids) == len(systems)
    seconds = sum(system.seconds for system in systems)
    return System(first.name, values, seconds, query_ids=np.concatenate(query_ids))


def _of_sets(claim: Claim, finished: Mapping[str, Sequence[tuple[Trial, StoredTrial]]]) -> SetResult:
    """Return the results on the rows of all sets of a pool; `finished` by set."""
    parts, popularities = zip(*(_ranked(claim, name, of_set) for name, of_set in finished.items()), strict=True)
    values = {}
    for cell in claim.cells_on(next(iter(finished))):
        by_seed = zip(*(part[cell] for part in parts), strict=True)
        values[cell] = System.from_seeds([_pooled(systems) for systems in by_seed])
    popularity = np.concatenate(popularities)
    seconds: dict[str, list[float]] = {name: [] for name in values}
    for trial, stored in chain.from_iterable(finished.values()):
        seconds[trial.cell_name].append(stored.cpu_seconds)
    cells = []
    for name, system in values.items():
        metric = np.atleast_2d(system.values[claim.metric])
        cells.append(
            CellResult(
                name,
                _rounded(metric.mean()),
                _rounded(system.errors()[claim.metric]),
                len(metric),
                round(float(np.mean(seconds[name])), 1),
                *_by_popularity(metric.mean(axis=0), popularity),
            )
        )
    rows = {"all": popularity >= 0, "cold": popularity == 0, "warm": popularity > 0}
    expected = [_compare(expected, values, claim.metric, rows[expected.rows]) for expected in claim.expect]
    query_ids = next(iter(values.values())).query_ids
    assert query_ids is not None
    num_queries, num_cold = len(np.unique(query_ids)), int((popularity == 0).sum())
    return SetResult(list(finished), len(popularity), num_queries, num_cold, cells, expected)


def _ranked(
    claim: Claim, set_name: str, finished: Sequence[tuple[Trial, StoredTrial]]
) -> tuple[dict[str, list[System]], np.ndarray]:
    """Return the results of every cell on a set by seed, and the popularity of the rows' documents."""
    config = load_config(claim.sets[set_name].config, claim.sets[set_name].set)
    dataset = Dataset.open(config.data.dir).with_rules(EventRules.of(config.data))
    rows = MeasuredRows.of(dataset, claim.split)
    systems: dict[str, list[System]] = {name: [] for name in claim.cells_on(set_name)}
    for trial, stored in finished:
        system = stored.saved().system(trial.cell_name, trial, dataset, rows, config.data.exclude_seen)
        systems[trial.cell_name].append(system)
    return systems, _popularity(dataset, claim.split)


def _compare(expected: Expectation, systems: dict[str, System], metric: str, rows: np.ndarray) -> Comparison | None:
    """Compare two cells on `rows`, bool; None if a cell is not trained on this set."""
    if expected.cell not in systems or expected.than not in systems:
        return None
    cells = systems[expected.cell], systems[expected.than]
    if not rows.all():
        cells = cells[0].of_slice(rows), cells[1].of_slice(rows)
    difference = cells[0].difference(cells[1], metric)
    low, high = difference.low, difference.high
    if np.isnan(low):
        raise DataError(f"{expected.cell} and {expected.than} cannot be compared: all rows are of one query id")
    verdict = expected.verdict(low, high)
    return Comparison(_rounded(difference.mean), _rounded(low), _rounded(high), verdict, expected.margin)


def _popularity(dataset: Dataset, split: str) -> np.ndarray:
    """Return the number of train positives of the document per evaluated row, int64."""
    counts = dataset.doc_counts()
    parts = [counts[rows.doc_rows[rows.relevance > 0]] for rows in dataset.iterate(split, 65_536)]
    popularity: np.ndarray = np.concatenate(parts)
    return popularity


def _by_popularity(values: np.ndarray, popularity: np.ndarray) -> tuple[float | None, list[float]]:
    """Return the mean of rows with cold documents, and the means of BINS equal bins of the others, rare first."""
    cold, warm = values[popularity == 0], np.flatnonzero(popularity > 0)
    order = warm[np.argsort(popularity[warm], kind="stable")]
    bins = [_rounded(part.mean()) for part in np.array_split(values[order], BINS) if len(part)]
    return _rounded(cold.mean()) if len(cold) else None, bins


def _in_words(expected: Expectation) -> str:
    how = "beats" if expected.better is not None else "does not beat"
    by = f" by more than {expected.margin:g}" if expected.margin else ""
    on = "" if expected.rows == "all" else f" on {expected.rows} rows"
    return f"{expected.cell} {how} {expected.than}{by}{on}"


def _rounded(value: float) -> float:
    return round(float(value), 4)
