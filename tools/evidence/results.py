"""What a claim's cells measured: means with intervals, by popularity of the document, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.evaluation.comparison import MeasuredRows, System
from tools.evidence.benches import Figures
from tools.evidence.claims import Claim, Expectation, Verdict
from tools.evidence.running import Trial
from tools.evidence.stored import StoredTrial

PARTS = 10  # of the split's rows, from those of the rarest documents to those of the most popular


@dataclass(frozen=True)
class Measured:
    """A cell on a set."""

    cell: str
    mean: float  # of the claim's metric, over rows and seeds
    error: float  # its standard error
    seeds: int
    cpu_seconds: float  # of one training, the mean over seeds, and over the sets of a pool
    cold: float | None  # the metric of rows whose document is no train positive; none where there are no such rows
    deciles: list[float]  # the metric by tenths of the rows, rare documents first; cold ones left out


@dataclass(frozen=True)
class Compared:
    """An expectation on a set."""

    mean: float  # of the cell's metric less the other's
    low: float
    high: float
    verdict: Verdict
    margin: float = 0.0  # what the interval is held against

    @property
    def distance(self) -> float:
        """Return how far the nearer end of the interval is from the margin."""
        return min(abs(self.low - self.margin), abs(self.high - self.margin))

    def __str__(self) -> str:
        """Return for example `+0.0135 [+0.0053, +0.0212]`."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class SetResult:
    """A claim on a set."""

    members: list[str]  # the sets that are pooled in it, or the set itself
    rows: int  # of the split that count
    query_ids: int  # of them: users, or texts
    cold_rows: int
    cells: list[Measured]
    expected: list[Compared | None]  # in the claim's order; none where a cell is not tried on this set


@dataclass(frozen=True)
class Result:
    """A claim tried: what `docs/evidence.md` says of it."""

    claim: str
    why: str
    metric: str
    split: str
    expect: list[str]  # in words
    sets: dict[str, SetResult]
    verdict: Verdict
    figures: list[Figures] = field(default_factory=list)  # of the claim's benches
    cpu_hours: float = 0.0  # of all its trainings, each counted once

    def decisive(self) -> str:
        """Return in words by which figure the verdict is what it is: of those that agree with it the closest call."""
        calls = [
            (found.distance, f"{words}: {found} on {name}")
            for name, one in self.sets.items()
            for words, found in zip(self.expect, one.expected, strict=True)
            if found is not None and found.verdict == self.verdict
        ]
        return min(calls)[1] if calls else ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Result:
        """Return what `to_dict` gave."""

        def of_set(one: dict[str, Any]) -> SetResult:
            cells = [Measured(**cell) for cell in one["cells"]]
            return SetResult(**{**one, "cells": cells, "expected": [c and Compared(**c) for c in one["expected"]]})

        figures = [Figures(**one) for one in content["figures"]]
        sets = {name: of_set(one) for name, one in content["sets"].items()}
        return cls(**{**content, "sets": sets, "figures": figures})


def collect(
    claim: Claim, which: Sequence[Trial], kept: Mapping[str, StoredTrial], figures: Sequence[Figures] = ()
) -> Result:
    """Return what the trials of a claim measured, which is `kept`, with its benches' figures.

    Raises DataError where a trial is not finished.
    """
    if unfinished := [str(trial) for trial in which if trial.name not in kept]:
        raise DataError(f"not finished: {'; '.join(unfinished)}")
    finished = {name: [(trial, kept[trial.name]) for trial in which if trial.set_name == name] for name in claim.sets}
    sets = {pool: _of_sets(claim, {name: finished[name] for name in members}) for pool, members in claim.pools.items()}
    verdicts = [found.verdict for one in sets.values() for found in one.expected if found is not None]
    seconds = {trial.name: kept[trial.name].cpu_seconds for trial in which}
    own = {trial.folder: seconds[trial.name] - sum(seconds[needed.name] for needed in trial.needed) for trial in which}
    return Result(
        claim.claim, claim.why, claim.metric, claim.split, [_in_words(expected) for expected in claim.expect], sets,
        together(verdicts), list(figures), round(sum(own.values()) / 3600, 1),
    )  # fmt: skip


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Return what several verdicts are as one: holds where all do, does not hold where one does not, else open."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "open"


def _of_sets(claim: Claim, finished: Mapping[str, Sequence[tuple[Trial, StoredTrial]]]) -> SetResult:
    """Return a claim on the rows of all sets of a pool; `finished` by set."""
    parts, popularities = zip(*(_ranked(claim, name, of_set) for name, of_set in finished.items()), strict=True)
    values = {}
    for cell in claim.cells_on(next(iter(finished))):
        by_seed = zip(*(part[cell] for part in parts), strict=True)
        values[cell] = System.of_seeds([System.pooled(systems) for systems in by_seed])
    popularity = np.concatenate(popularities)
    seconds: dict[str, list[float]] = {name: [] for name in values}
    for trial, kept in chain.from_iterable(finished.values()):
        seconds[trial.cell_name].append(kept.cpu_seconds)
    cells = []
    for name, system in values.items():
        metric = np.atleast_2d(system.values[claim.metric])
        cells.append(
            Measured(
                name,
                _rounded(metric.mean()),
                _rounded(system.errors()[claim.metric]),
                len(metric),
                round(float(np.mean(seconds[name])), 1),
                *_by_popularity(metric.mean(axis=0), popularity),
            )
        )
    expected = [_compared(expected, values, claim.metric) for expected in claim.expect]
    query_ids = next(iter(values.values())).query_ids
    assert query_ids is not None
    num_queries, num_cold = len(np.unique(query_ids)), int((popularity == 0).sum())
    return SetResult(list(finished), len(popularity), num_queries, num_cold, cells, expected)


def _ranked(
    claim: Claim, set_name: str, finished: Sequence[tuple[Trial, StoredTrial]]
) -> tuple[dict[str, list[System]], np.ndarray]:
    """Return what each cell measured on a set, by seed, and the popularity of each row's document."""
    config = load_config(claim.sets[set_name].config, claim.sets[set_name].set)
    dataset = Dataset.open(config.data.dir)
    rows = MeasuredRows.of(dataset, claim.split)
    systems: dict[str, list[System]] = {name: [] for name in claim.cells_on(set_name)}
    for trial, kept in finished:
        system = kept.saved().system(trial.cell_name, trial, dataset, rows, config.data.exclude_seen)
        systems[trial.cell_name].append(system)
    return systems, _popularity(dataset, claim.split)


def _compared(expected: Expectation, systems: dict[str, System], metric: str) -> Compared | None:
    if expected.cell not in systems or expected.than not in systems:
        return None
    found = systems[expected.cell].difference(systems[expected.than], metric)
    if np.isnan(found.low):
        raise DataError(f"{expected.cell} and {expected.than} cannot be compared: all rows are of one query id")
    verdict = expected.verdict(found.low, found.high)
    return Compared(_rounded(found.mean), _rounded(found.low), _rounded(found.high), verdict, expected.margin)


def _popularity(dataset: Dataset, split: str) -> np.ndarray:
    """Return how often the document of each row that counts is a train positive, int64."""
    counts = dataset.doc_counts()
    parts = [counts[rows.doc_rows[rows.relevance > 0]] for rows in dataset.iterate(split, 65_536)]
    found: np.ndarray = np.concatenate(parts)
    return found


def _by_popularity(values: np.ndarray, popularity: np.ndarray) -> tuple[float | None, list[float]]:
    """Return the mean of the rows of cold documents, and those of PARTS equal parts of the others, rare ones first."""
    cold, warm = values[popularity == 0], np.flatnonzero(popularity > 0)
    order = warm[np.argsort(popularity[warm], kind="stable")]
    parts = [_rounded(part.mean()) for part in np.array_split(values[order], PARTS) if len(part)]
    return _rounded(cold.mean()) if len(cold) else None, parts


def _in_words(expected: Expectation) -> str:
    how = "beats" if expected.better is not None else "does not beat"
    by = f" by more than {expected.margin:g}" if expected.margin else ""
    return f"{expected.cell} {how} {expected.than}{by}"


def _rounded(value: float) -> float:
    return round(float(value), 4)
