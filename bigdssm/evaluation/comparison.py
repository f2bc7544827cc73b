"""Several systems on the same rows: their table, their paired differences, and both as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import xxhash
from rich.box import SIMPLE
from rich.table import Table

from bigdssm.cluster.metrics import metric_label
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.evaluation.baselines import Markov, Popularity
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.evaluation.metrics import Difference, means, paired_bootstrap, row_metrics, shown_metrics, standard_errors
from bigdssm.utils.atomic import write_json
from bigdssm.utils.hashing import file_checksum

SHOWN_OF_RUNS = ("ndcg_at_10", "recall_at_100", "mrr")
MARKOV = "Markov, window 3"


@dataclass(frozen=True)
class System:
    """What one system is worth on the rows of a split, or on the queries of a collection."""

    name: str
    values: dict[str, np.ndarray]  # float64 [rows or queries] by metric; [seeds, rows] of a model trained several times
    seconds: float  # to make and to evaluate it
    ranks: np.ndarray | None = None  # float64 [rows of the split], where the values are of ranks
    query_ids: np.ndarray | None = None  # int64 [rows], whose each value is; by default each is of a query of its own

    def __post_init__(self) -> None:
        """Raise DataError where there is nothing that a figure could be of."""
        if not all(rows.size for rows in self.values.values()):
            raise DataError(f"{self.name} cannot be measured: no row has a relevant document")

    @classmethod
    def of_ranks(cls, name: str, ranks: np.ndarray, query_ids: np.ndarray, seconds: float) -> System:
        """Return the system that gives the rows of a split, each of a query (int64), these ranks."""
        return cls(name, row_metrics(ranks), seconds, ranks, query_ids[~np.isnan(ranks)])

    @classmethod
    def of_seeds(cls, systems: Sequence[System]) -> System:
        """Return one system of a model that was trained with several seeds, or the only one as it is."""
        first = systems[0]
        if len(systems) == 1:
            return first
        values = {name: np.stack([system.values[name] for system in systems]) for name in first.values}
        seconds = float(np.mean([system.seconds for system in systems]))
        return cls(first.name, values, seconds, query_ids=first.query_ids)

    @classmethod
    def pooled(cls, systems: Sequence[System]) -> System:
        """Return one system on the rows of several splits together, each of ranks."""
        first = systems[0]
        values = {name: np.concatenate([system.values[name] for system in systems]) for name in first.values}
        query_ids = [system.query_ids for system in systems if system.query_ids is not None]
        assert len(query_ids) == len(systems)
        seconds = sum(system.seconds for system in systems)
        return cls(first.name, values, seconds, query_ids=np.concatenate(query_ids))

    def by_seed(self) -> list[dict[str, float]]:
        """Return the means of every seed; none of a system without several."""
        number = max(len(rows) if rows.ndim == 2 else 0 for rows in self.values.values())
        return [means({name: rows[seed] for name, rows in self.values.items()}) for seed in range(number)]

    def difference(self, other: System, metric: str) -> Difference:
        """Return this system's mean `metric` less the other's, paired by row."""
        return paired_bootstrap(self.values[metric], other.values[metric], self.query_ids)

    def errors(self) -> dict[str, float]:
        """Return the standard errors of the means of all metrics."""
        return standard_errors(self.values, self.query_ids)


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Return each path's own name, and of the folders above it as many as tell it from the others."""
    whole = [os.path.abspath(path) for path in paths]
    bare = [os.path.splitext(name)[0] if path.is_file() else name for path, name in zip(paths, whole, strict=True)]
    same = {name: {w for w, b in zip(whole, bare, strict=True) if b == name} for name in bare}
    # A suffix stays where nothing else tells two files apart.
    parts = [Path(b if len(same[b]) == 1 else w).parts for w, b in zip(whole, bare, strict=True)]
    return [next("/".join(own[-n:]) for n in range(1, len(own) + 1) if _only(own[-n:], parts)) for own in parts]


def _only(tail: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> bool:
    """Return whether one path alone ends so, however often it comes."""
    return len({path for path in paths if path[-len(tail) :] == tail}) == 1


def baseline_systems(dataset: Dataset, split: str, exclude_seen: bool = True) -> list[System]:
    """Return popularity and, where rows have histories, the Markov baseline."""
    found = [_fitted("popularity", Popularity, dataset, split, exclude_seen)]
    if dataset.sequences is not None:
        found.append(_fitted(MARKOV, Markov, dataset, split, exclude_seen))
    return found


def table(systems: Sequence[System], title: str, shown: Sequence[str] | None = None) -> Table:
    """Return the systems as a rich table: metrics (by default those of ranks) ± error, and seconds."""
    shown = shown or shown_metrics()
    # Narrow enough for 80 columns, which is what rich takes where there is no terminal.
    drawn = Table(title=title, box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    drawn.add_column("system", no_wrap=True)
    for label in (*map(metric_label, shown), "seconds"):
        drawn.add_column(label, justify="right", no_wrap=True)
    for system in systems:
        average, errors = means(system.values), system.errors()
        cells = [f"{average[name]:.4f} ± {errors[name]:.4f}" for name in shown]
        drawn.add_row(system.name, *cells, f"{system.seconds:.1f}")
    return drawn


def differences(pairs: Sequence[tuple[System, System]], shown: Sequence[str] | None = None) -> list[str]:
    """Return a sentence for each pair: the first less the second with 95 % intervals."""
    lines = []
    for a, b in pairs:
        parts = [
            f"{metric_label(name)} {a.difference(b, name)}{_range_of_seeds(a, b, name)}"
            for name in shown or shown_metrics()
        ]
        lines.append(f"{a.name} − {b.name}: {', '.join(parts)}")
    return lines


def _range_of_seeds(a: System, b: System, metric: str) -> str:
    """Return for example ` (seeds +0.0410 to +0.0490)`; nothing where there are none."""
    difference = a.values[metric] - b.values[metric]
    if difference.ndim == 1:
        return ""
    of_seeds = difference.mean(axis=1)
    return f" (seeds {of_seeds.min():+.4f} to {of_seeds.max():+.4f})"


def as_json(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Return one object per system: name, the means of the metrics, seconds; those of every seed under `seeds`."""
    found = []
    for system in systems:
        entry: dict[str, Any] = {
            "name": system.name,
            **_without_nan(means(system.values)),
            "seconds": round(system.seconds, 3),
        }
        if seeds := system.by_seed():
            entry["seeds"] = [_without_nan(values) for values in seeds]
        found.append(entry)
    return found


def differences_as_json(
    pairs: Sequence[tuple[System, System]], shown: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return one object per pair and metric: what less what, mean and 95 % interval."""
    return [
        {
            "system": a.name,
            "less": b.name,
            "metric": metric,
            "mean": found.mean,
            "low": None if np.isnan(found.low) else found.low,
            "high": None if np.isnan(found.high) else found.high,
        }
        for a, b in pairs
        for metric in shown or shown_metrics()
        for found in [a.difference(b, metric)]
    ]


def save_comparison(
    path: Path, systems: Sequence[System], pairs: Sequence[tuple[System, System]], dataset: Dataset, split: str,
    exclude_seen: bool = True,
) -> None:  # fmt: skip
    """Write the JSON `path`, and beside it each system's ranks as .npy."""
    rows = {"split": split, "rows": MeasuredRows.of(dataset, split).checksum, "exclude_seen": exclude_seen}
    content: dict[str, Any] = {**rows, "systems": as_json(systems)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, (entry, system) in enumerate(zip(content["systems"], systems, strict=True)):
        assert system.ranks is not None
        entry["standard_errors"] = _without_nan(system.errors())
        entry["ranks"] = f"{path.stem}.ranks-{number}.npy"
        np.save(path.with_name(entry["ranks"]), system.ranks)
        entry["ranks_checksum"] = file_checksum(path.with_name(entry["ranks"]))
    content["differences"] = differences_as_json(pairs)
    write_json(path, content)


@dataclass(frozen=True)
class MeasuredRows:
    """The rows of a split that ranks are of."""

    query_ids: np.ndarray  # int64 [rows that can be used]
    checksum: str  # xxh3_128, in hex, of each row's query id, place and document, and of all documents

    @classmethod
    def of(cls, dataset: Dataset, split: str) -> MeasuredRows:
        """Return those of a dataset."""
        query_ids = [np.zeros(0, np.int64)]
        digest = xxhash.xxh3_128(np.sort(dataset.catalogue.doc_ids).tobytes())
        for rows in dataset.iterate(split, 65_536):
            query_ids.append(rows.query_ids)
            for column in (rows.query_ids, rows.position, dataset.catalogue.ids(rows.doc_rows), rows.relevance):
                digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
        return cls(np.concatenate(query_ids), digest.hexdigest())


@dataclass(frozen=True)
class SavedRanks:
    """The ranks of a system on the rows of a split, as they were saved, and what rows these are."""

    name: str
    ranks: np.ndarray  # float64 [queries that can be used]
    seconds: float  # to make and to evaluate it
    split: str
    rows: str  # the checksum of MeasuredRows
    exclude_seen: bool

    def system(self, name: str, where: object, dataset: Dataset, rows: MeasuredRows, exclude_seen: bool) -> System:
        """Return the system that has them. Raises DataError: they do not pair with ranks of the dataset's rows."""
        if (len(self.ranks), self.rows) != (len(rows.query_ids), rows.checksum):
            raise DataError(
                f"{where} was measured on other rows than those of split {self.split} of {dataset.dir}: "
                f"{len(self.ranks)} of a split {self.split}; measure both on datasets made of the same tables"
            )
        if self.exclude_seen != exclude_seen:
            raise DataError(
                f"{where} was measured with seen documents {'left out' if self.exclude_seen else 'among the others'}, "
                "this model's data.exclude_seen says otherwise; measure both with the same data.exclude_seen"
            )
        return System.of_ranks(name, self.ranks, rows.query_ids, self.seconds)


def read_ranks(path: Path) -> SavedRanks:
    """Return the ranks of the first system of a saved comparison. Raises DataError: missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entry = content["systems"][0]
        file = path.with_name(Path(entry["ranks"]).name)
        if file_checksum(file) != entry["ranks_checksum"]:
            raise ValueError(f"{file.name} does not hold the ranks that were measured")
        ranks, seconds = np.load(file, allow_pickle=False), float(entry["seconds"])
        exclude_seen = content.get("exclude_seen", True)
        return SavedRanks(entry["name"], ranks, seconds, content["split"], content["rows"], exclude_seen)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} is no comparison written by bigdssm evaluate: {error!r}") from None


def load_system(path: Path, dataset: Dataset, split: str, exclude_seen: bool = True) -> System:
    """Return the first system of a saved comparison.

    Raises DataError: missing, damaged, or of other rows, or with seen documents treated otherwise, which do not pair.
    The features of these may be others.
    """
    saved = read_ranks(path)
    name = f"{saved.name} ({path.stem})"
    return saved.system(name, path, dataset, MeasuredRows.of(dataset, split), exclude_seen)


def _fitted(
    name: str, kind: type[Popularity] | type[Markov], dataset: Dataset, split: str, exclude_seen: bool
) -> System:
    started = perf_counter()
    evaluation = evaluate_scores(kind.fit(dataset), dataset, split, exclude_seen=exclude_seen)
    return System.of_ranks(name, evaluation.ranks, evaluation.query_ids, perf_counter() - started)


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else round(value, 6) for name, value in values.items()}
