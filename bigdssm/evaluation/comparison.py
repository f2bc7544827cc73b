"""Compare several systems on the same rows: table, paired differences, and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import xxhash
from rich.box import SIMPLE
from rich.table import Column, Table

from bigdssm import distributed
from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.evaluation.baselines import (
    DailyEvents,
    Scores,
    markov,
    popularity,
    popularity_of_days,
)
from bigdssm.evaluation.chains import ChainEvents, action_of, tuned_chain
from bigdssm.evaluation.counted_events import is_split_by_time
from bigdssm.evaluation.evaluate import Reranking, evaluate_scores, evaluate_split
from bigdssm.evaluation.metrics import Difference, means, paired_bootstrap, row_metrics, standard_errors, table_metrics
from bigdssm.evaluation.slices import Slice
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.utils.atomic import write_json
from bigdssm.utils.hashing import file_checksum
from bigdssm.utils.log import Progress, metric_label, no_progress

RUN_METRICS = ("ndcg_at_10", "recall_at_100", "mrr")
MARKOV = "Markov, window 3"
RECENT_DAYS = (7, 30)  # of popularity


@dataclass(frozen=True)
class System:
    """Metric values of one system on the rows of a split, or on the queries of a collection."""

    name: str
    values: dict[str, np.ndarray]  # float64 [rows or queries] by metric; [seeds, rows] of a model of several seeds
    seconds: float  # to build and evaluate it
    ranks: np.ndarray | None = None  # float64 [rows of the split], if the values come from ranks
    query_ids: np.ndarray | None = None  # int64 [rows]: query of a value; default: a distinct query per value
    coverage: float | None = None  # share of the candidates among the first answers, if computed
    options: str = ""  # of a chain, in words, and how they were chosen

    def __post_init__(self) -> None:
        """Raise DataError if there are no values."""
        if not all(rows.size for rows in self.values.values()):
            raise DataError(f"{self.name} cannot be measured: no row has a relevant document")

    @classmethod
    def from_ranks(
        cls, name: str, ranks: np.ndarray, query_ids: np.ndarray, seconds: float, coverage: float | None = None
    ) -> System:
        """Return the system with these ranks on the rows of a split; `query_ids` are int64."""
        return cls(name, row_metrics(ranks), seconds, ranks, query_ids[~np.isnan(ranks)], coverage)

    @classmethod
    def from_seeds(cls, systems: Sequence[System]) -> System:
        """Combine the systems of a model's seeds; a single one is returned as is."""
        first = systems[0]
        if len(systems) == 1:
            return first
        values = {name: np.stack([system.values[name] for system in systems]) for name in first.values}
        seconds = float(np.mean([system.seconds for system in systems]))
        return cls(first.name, values, seconds, query_ids=first.query_ids)

    def difference(self, other: System, metric: str) -> Difference:
        """Return this system's mean `metric` minus the other's, paired by row."""
        return paired_bootstrap(self.values[metric], other.values[metric], self.query_ids)

    def of_slice(self, rows: np.ndarray) -> System:
        """Return the system on some of its rows, bool [rows]."""
        assert self.query_ids is not None
        values = {name: metric_values[..., rows] for name, metric_values in self.values.items()}
        return System(self.name, values, self.seconds, query_ids=self.query_ids[rows], options=self.options)

    def errors(self) -> dict[str, float]:
        """Return the standard errors of the means of all metrics."""
        return standard_errors(self.values, self.query_ids)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct trailing parts of paths, without suffixes if possible."""
    absolute = [os.path.abspath(path) for path in paths]
    bare = [os.path.splitext(name)[0] if path.is_file() else name for path, name in zip(paths, absolute, strict=True)]
    same = {name: {w for w, b in zip(absolute, bare, strict=True) if b == name} for name in bare}
    # A suffix is kept if two files differ in nothing else.
    parts = [Path(b if len(same[b]) == 1 else w).parts for w, b in zip(absolute, bare, strict=True)]
    tails = ([path[-n:] for n in range(1, len(path) + 1)] for path in parts)
    # per path the first tail that no other distinct path has
    distinct = set(parts)
    return [next("/".join(t) for t in of_path if sum(p[-len(t) :] == t for p in distinct) == 1) for of_path in tails]


def baseline_systems(
    dataset: Dataset, split: str, exclude_seen: bool | str = True, *, by_day: bool = False, coverage: bool = False
) -> list[System]:
    """Fit and evaluate popularity and, if rows have histories, the Markov baseline.

    by_day: and recent popularity, if events are of several days, and the `chain_systems`.
    """
    evaluate = partial(_evaluate_baseline, dataset, split, exclude_seen, coverage=coverage)
    started = perf_counter()
    systems = [evaluate("popularity", popularity(dataset), started)]
    if dataset.sequences is not None:
        started = perf_counter()
        systems.append(evaluate(MARKOV, markov(dataset), started))
    if by_day and dataset.has_times:
        started = perf_counter()
        events = DailyEvents(dataset)
        reading_s = perf_counter() - started  # part of the seconds of every baseline that counts them
        if len(np.unique(events.day)) > 1:
            for days in RECENT_DAYS:
                started = perf_counter() - reading_s
                systems.append(evaluate(f"popularity, {days} days", popularity_of_days(events, days), started))
    if by_day:
        systems += chain_systems(dataset, split, exclude_seen, dataset, coverage=coverage)
    return systems


def chain_systems(
    dataset: Dataset,
    split: str,
    exclude_seen: bool | str,
    fitted_on: Dataset,
    *,
    coverage: bool = False,
) -> list[System]:
    """Evaluate a chain with options chosen on validation: frozen and, in a split by time, rebuilt daily.

    fitted_on: more partitions of the same dataset, whose events the chains count. The seconds contain the choice.
    There is no chain without histories.
    """
    if dataset.sequences is None:
        return []
    names = {"chain": False, "daily chain": True} if is_split_by_time(fitted_on) else {"chain": False}
    chosen = "chosen on validation" if dataset.num_rows("validation") else "defaults: no validation split"
    systems = []
    for name, daily in names.items():
        started = perf_counter()
        chain = tuned_chain(ChainEvents(fitted_on, action_of(fitted_on), daily=daily), dataset, exclude_seen)
        system = _evaluate_baseline(dataset, split, exclude_seen, name, chain, started, coverage=coverage)
        systems.append(replace(system, options=f"{chain.options} ({chosen})"))
    return systems


def _evaluate_baseline(
    dataset: Dataset,
    split: str,
    exclude_seen: bool | str,
    name: str,
    scores: Scores,
    started: float,
    *,
    coverage: bool = False,
) -> System:
    """Evaluate a fitted baseline; `started`: the time at which its fit began, of perf_counter."""
    measured = evaluate_scores(scores, dataset, split, exclude_seen=exclude_seen, coverage=coverage)
    seconds = perf_counter() - started
    return System.from_ranks(name, measured.ranks, measured.query_ids, seconds, measured.coverage)


def model_system(
    name: str, folder: ModelFolder, dataset: Dataset, split: str, exclude_seen: bool | str, *,
    rerank: Reranking | None = None, spent_s: float = 0.0, coverage: bool = False, progress: Progress = no_progress,
) -> System:  # fmt: skip
    """Evaluate a model folder, whose best documents `rerank` orders; `spent_s`: seconds of its training.

    With a process group the ranks share documents and queries: all must call it.
    """
    dataset = folder.view(dataset)
    encoders = tower_encoders(folder.model, dataset)
    measured = evaluate_split(
        encoders, dataset, split, exclude_seen=exclude_seen, rerank=rerank, coverage=coverage, progress=progress,
        rank=distributed.rank(), world_size=distributed.world_size(),
    )  # fmt: skip
    return System.from_ranks(
        name, measured.ranks, measured.query_ids, measured.seconds + spent_s, measured.coverage
    )  # fmt: skip


def table(
    systems: Sequence[System], title: str, metrics: Sequence[str] | None = None, *, few: bool = False,
    seconds: bool = True,
) -> Table:  # fmt: skip
    """Return a rich table of metrics (default: `table_metrics`) ± standard error, and seconds.

    few: there are too few queries for standard errors.
    """
    metrics = metrics or table_metrics()
    labels = [*map(metric_label, metrics), *(["seconds"] if seconds else [])]
    columns = [Column("system", no_wrap=True), *(Column(label, justify="right", no_wrap=True) for label in labels)]
    # At most 80 columns, rich's width without a terminal.
    drawn = Table(*columns, title=title, box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    for system in systems:
        average, errors = means(system.values), system.errors()
        cells = [f"{average[name]:.4f} " + ("too few" if few else f"± {errors[name]:.4f}") for name in metrics]
        if seconds:
            cells.append(f"{system.seconds:.1f}")
        drawn.add_row(system.name, *cells)
    return drawn


def slice_tables(systems: Sequence[System], slices: Sequence[Slice], of: str) -> Iterator[Table]:
    """Yield a table per slice with rows, as `table`; `of` is the name of distinct query ids, such as users."""
    for part in slices:
        if part.rows.any():
            title = f"{part.condition}: {part.rows.sum()} queries of {part.num_queries} {of}"
            of_slice = [system.of_slice(part.rows) for system in systems]
            yield table(of_slice, title, few=part.has_few, seconds=False)


def slices_as_json(
    systems: Sequence[System], pairs: Sequence[tuple[System, System]], slices: Sequence[Slice]
) -> list[dict[str, Any]]:
    """Return one object per slice: option, condition, rows, queries, systems, differences; intervals if not too few."""
    entries = []
    for part in slices:
        entry: dict[str, Any] = {
            "by": part.by,
            "condition": part.condition,
            "rows": int(part.rows.sum()),
            "queries": part.num_queries,
            "too_few": part.has_few,
            "systems": [],
            "differences": [],
        }
        entries.append(entry)
        if part.rows.any():
            of_slice = {id(system): system.of_slice(part.rows) for system in systems}
            entry["systems"] = as_json(list(of_slice.values()))
            if not part.has_few:
                for described, system in zip(entry["systems"], of_slice.values(), strict=True):
                    described["standard_errors"] = _without_nan(system.errors())
                entry["differences"] = differences_as_json([(of_slice[id(a)], of_slice[id(b)]) for a, b in pairs])
    return entries


def differences(pairs: Sequence[tuple[System, System]], metrics: Sequence[str] | None = None) -> list[str]:
    """Return a line per pair: first minus second, with 95 % intervals."""
    lines = []
    for a, b in pairs:
        parts = []
        for name in metrics or table_metrics():
            of_seeds = (a.values[name] - b.values[name]).mean(axis=-1)
            seeds = f" (seeds {of_seeds.min():+.4f} to {of_seeds.max():+.4f})" if of_seeds.ndim else ""
            parts.append(f"{metric_label(name)} {a.difference(b, name)}{seeds}")
        lines.append(f"{a.name} − {b.name}: {', '.join(parts)}")
    return lines


def options_of(systems: Sequence[System]) -> list[str]:
    """Return a line per system with options."""
    return [f"{system.name}: {system.options}" for system in systems if system.options]


def as_json(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Return one object per system: name, metric means, seconds, and the means per seed under `seeds`."""
    entries = []
    for system in systems:
        entry: dict[str, Any] = {
            "name": system.name,
            **_without_nan(means(system.values)),
            "seconds": round(system.seconds, 3),
        }
        if system.coverage is not None:
            entry["coverage"] = round(system.coverage, 6)
        if system.options:
            entry["options"] = system.options
        number = max(len(rows) if rows.ndim == 2 else 0 for rows in system.values.values())
        if number:
            by_seed = ({name: rows[seed] for name, rows in system.values.items()} for seed in range(number))
            entry["seeds"] = [_without_nan(means(values)) for values in by_seed]
        entries.append(entry)
    return entries


def differences_as_json(
    pairs: Sequence[tuple[System, System]], metrics: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return one object per pair and metric: system, subtracted system, mean and 95 % interval."""
    return [
        {
            "system": a.name,
            "less": b.name,
            "metric": metric,
            "mean": difference.mean,
            "low": None if np.isnan(difference.low) else difference.low,
            "high": None if np.isnan(difference.high) else difference.high,
        }
        for a, b in pairs
        for metric in metrics or table_metrics()
        for difference in [a.difference(b, metric)]
    ]


def save_comparison(
    path: Path, systems: Sequence[System], pairs: Sequence[tuple[System, System]], dataset: Dataset, split: str,
    exclude_seen: bool | str = True, slices: Sequence[Slice] = (),
) -> None:  # fmt: skip
    """Write the comparison to the JSON file `path`, and each system's ranks to a .npy file next to it."""
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
    if slices:
        content["slices"] = slices_as_json(systems, pairs, slices)
    write_json(path, content)


@dataclass(frozen=True)
class MeasuredRows:
    """Identity of the evaluated rows of a split."""

    query_ids: np.ndarray  # int64 [usable rows]
    checksum: str  # xxh3_128 (hex) of the rows' query ids, positions, documents and relevances, and of all document ids

    @classmethod
    def of(cls, dataset: Dataset, split: str) -> MeasuredRows:
        """Read the rows of a dataset's split."""
        query_ids = [np.zeros(0, np.int64)]
        digest = xxhash.xxh3_128(np.sort(dataset.catalogue.doc_ids).tobytes())
        for rows in dataset.iterate(split, 65_536):
            query_ids.append(rows.query_ids)
            for column in (rows.query_ids, rows.position, dataset.catalogue.ids(rows.doc_rows), rows.relevance):
                digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
        return cls(np.concatenate(query_ids), digest.hexdigest())


@dataclass(frozen=True)
class SavedRanks:
    """Saved ranks of a system on the rows of a split."""

    name: str
    ranks: np.ndarray  # float64 [usable queries]
    seconds: float  # to build and evaluate it
    split: str
    rows: str  # checksum of MeasuredRows
    exclude_seen: bool | str

    def system(
        self, name: str, where: object, dataset: Dataset, rows: MeasuredRows, exclude_seen: bool | str
    ) -> System:
        """Return the system of these ranks. Raises DataError: they were measured on other rows."""
        if (len(self.ranks), self.rows) != (len(rows.query_ids), rows.checksum):
            raise DataError(
                f"{where} was measured on other rows than those of split {self.split} of {dataset.dir}: "
                f"{len(self.ranks)} of a split {self.split}; measure both on datasets built from the same tables"
            )
        if self.exclude_seen != exclude_seen:
            raise DataError(
                f"{where} was measured with data.exclude_seen={str(self.exclude_seen).lower()}, this model has "
                f"{str(exclude_seen).lower()}; measure both with the same data.exclude_seen"
            )
        return System.from_ranks(name, self.ranks, rows.query_ids, self.seconds)


def read_ranks(path: Path) -> SavedRanks:
    """Read the ranks of the first system of a saved comparison. Raises DataError: missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entry = content["systems"][0]
        file = path.with_name(Path(entry["ranks"]).name)
        if file_checksum(file) != entry["ranks_checksum"]:
            raise ValueError(f"{file.name} does not match its checksum")
        ranks, seconds = np.load(file, allow_pickle=False), float(entry["seconds"])
        exclude_seen = content.get("exclude_seen", True)
        return SavedRanks(entry["name"], ranks, seconds, content["split"], content["rows"], exclude_seen)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} is not a comparison written by bigdssm evaluate: {error!r}") from None


def load_system(path: Path, dataset: Dataset, split: str, exclude_seen: bool | str = True) -> System:
    """Load the first system of a saved comparison; its features may differ from the dataset's.

    Raises DataError: missing, damaged, or measured on other rows or with another data.exclude_seen.
    """
    saved = read_ranks(path)
    rows = MeasuredRows.of(dataset, split)
    return saved.system(f"{saved.name} ({path.stem})", path, dataset, rows, exclude_seen)


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else round(value, 6) for name, value in values.items()}
