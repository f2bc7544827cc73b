"""Assignment of rows to splits: by a hash of their group, by time, or by a column of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError, DataError
from bigdssm.features.columns import RowCheck, TimeUnits, check_time_units, is_empty, parse_time, strings, times
from bigdssm.ingest.dataset_writer import DATASET_FILE, SPLIT, DatasetWriter
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import RowFile, RowTable, ranges, read_facts
from bigdssm.ingest.row_keys import uniform
from bigdssm.ingest.sorting import of_ordinal, ordinals_of
from bigdssm.utils.string_hashing import hash_strings

DEFAULT_FRACTIONS = (0.05, 0.05)  # of validation and of test
CUT_OFFS = ("validation_from", "test_from", "train_from")
SplitTime = float | str | date | None
"""A time in the unit of the table's times, or a date or ISO 8601, in seconds; none: it is not told."""


@dataclass(frozen=True)
class SplitTimes:
    """From when on rows are of validation, of test, and of nothing; in the unit of the table's times."""

    validation: float
    test: float
    until: float  # infinity: none is left out

    said: str = ""  # the options that told them
    train_from: float = np.inf  # rows from then on are of train, whatever the others are

    @classmethod
    def of_dataset(cls, split: Mapping[str, Any]) -> SplitTimes:
        """Return the cut-off times of a dataset, as `as_json` describes them; rows after the last are of train."""
        first, second, end = (np.inf if split[name] is None else split[name] for name in CUT_OFFS)
        return cls(first, second, np.inf, train_from=end)

    def as_json(self, newest: float) -> dict[str, Any]:
        """Return the cut-off times as JSON types, null for infinity; `newest` is the time of the newest row."""
        end = self.until if np.isfinite(self.until) else float(np.nextafter(newest, np.inf))
        times = (self.validation, self.test, end)
        return {name: time if np.isfinite(time) else None for name, time in zip(CUT_OFFS, times, strict=True)}

    @classmethod
    def told(
        cls,
        split: str,
        fractions: tuple[float, float],
        validation_from: SplitTime,
        test_from: SplitTime,
        until: SplitTime,
    ) -> SplitTimes | None:
        """Return those that a table's options say, or None where `fractions` of the rows decide. Raises ConfigError."""
        options = {"--validation-from": validation_from, "--test-from": test_from, "--until": until}
        given = {option: _read(option, value) for option, value in options.items() if value is not None}
        if not given:
            return None
        if split != "time":
            raise ConfigError(f"{next(iter(given))} goes with --split time, not with --split {split}")
        for option in ("--validation-from", "--test-from"):
            if option not in given:
                raise ConfigError(
                    f"{next(iter(given))} needs {option} beside it; --validation-from and --test-from may be the same "
                    "where validation is to have no rows"
                )
        said = ", ".join(f"{option} {options[option]}" for option in given)
        if fractions != DEFAULT_FRACTIONS:
            raise ConfigError(f"{said}: fractions of validation and test would have no effect; leave them out")
        found = cls(given["--validation-from"], given["--test-from"], given.get("--until", np.inf), said)
        if not found.validation <= found.test < found.until:
            raise ConfigError(f"{said}: validation comes before test, and test before the end")
        return found

    def check_units(self, facts: Sequence[Mapping[str, Any]], where: str) -> None:
        """Raise DataError where they are in another unit than the times whose facts these are, part by part."""
        units = TimeUnits()
        moments = np.array([self.validation, self.test, self.until])
        units.add(moments[np.isfinite(moments)])
        check_time_units([*facts, units.facts()], f"{where}, with {self.said},")


def own_split(writer: DatasetWriter, choices: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the split that the dataset of an append has, one of `choices`; None: a new dataset, or it records none.

    Raises DataError where it is none of them, or one by time without its times.
    """
    split = writer.content.get(SPLIT) if writer.append else None
    if split is None:
        return None
    where, fix = f"{writer.out / DATASET_FILE} is damaged: split", "copy the dataset whole"
    if split["how"] not in choices:
        raise DataError(f"{where}.how is {split['how']}, needs one of {', '.join(choices)}; {fix}")
    if missing := [name for name in CUT_OFFS if split["how"] == "time" and name not in split]:
        raise DataError(f"{where}.{missing[0]} is missing; {fix}")
    return dict(split)


def check_own_split(fractions: tuple[float, float], **options: object) -> None:
    """Raise ConfigError where an append without a split has an option of one: the dataset's own split decides."""
    given = [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value is not False
    ]
    if fractions != DEFAULT_FRACTIONS:
        given.append("--validation-fraction or --test-fraction")
    if given:
        raise ConfigError(f"{given[0]} needs --split; without it an append takes the split of the dataset at --out")


def _read(option: str, value: float | str | date) -> float:
    moment = parse_time(value)
    if not np.isfinite(moment):
        raise ConfigError(f"{option} {value!r} is no number and no ISO-8601 time")
    return moment


PairSplit = Literal["random", "time", "column", "train"]
SPLITS = ("train", "validation", "test")
NAMES = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2, "none": len(SPLITS)}
UNITS_PER_JOB = 1 << 20
ROWS_PER_RUN = 1 << 20  # whose times are sorted at once
TIMES = "times.npy"
LABELLED = pa.schema([("unit", pa.int64()), ("split", pa.int32())])


class Splitter:
    """Gives rows their splits, numbers in SPLITS: as they are read, or when all are there."""

    def __init__(
        self,
        how: PairSplit,
        column: str | None,
        fractions: tuple[float, float],
        seed: int,
        whole_documents: bool = False,
        moments: SplitTimes | None = None,
    ) -> None:
        """`moments` divide by time in place of the fractions of validation and of test."""
        check_fractions(*fractions)
        if whole_documents and how != "random":
            raise ConfigError(f"--whole-documents goes with --split random, not with --split {how}")
        if how in ("time", "column") and column is None:
            raise ConfigError(f"--split {how} needs --{'time' if how == 'time' else 'split'}-column")
        self._how, self._column, self._seed, self._whole_documents = how, column, seed, whole_documents
        self._fractions, self._moments = fractions, moments
        self.described: dict[str, Any] = {"how": how, "column": column}
        if how == "random":
            self.described |= {"fractions": list(fractions), "seed": seed, "whole_documents": whole_documents}

    @classmethod
    def of_dataset(cls, split: Mapping[str, Any], column: str | None) -> Splitter:
        """Return the splitter that a dataset's split describes; `column`: in place of its own."""
        moments = SplitTimes.of_dataset(split) if split["how"] == "time" else None
        fractions = split.get("fractions", DEFAULT_FRACTIONS)
        return cls(
            split["how"], column or split.get("column"), tuple(fractions), split.get("seed", 0),
            split.get("whole_documents", False), moments,
        )  # fmt: skip

    @property
    def columns(self) -> dict[str, str]:
        """Return the source column that it needs, if it needs one, and the option that names it."""
        if self._column is None or self._how == "train":
            return {}
        return {self._column: {"random": "--group-column", "time": "--time-column"}.get(self._how, "--split-column")}

    @property
    def why_no_train(self) -> str:
        """Return what may have left the train split without a row, to end a sentence with."""
        no_time = "nearly all rows have one time" if self._moments is None else "none is before --validation-from"
        return {
            "time": f"; {no_time}",
            "column": f"; {self._column} never says train",
            "random": f"; nearly all rows are of one {self._column or 'query'}",
            "train": "",
        }[self._how]

    def of_rows(self, check: RowCheck, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of every row of a batch its split, the unit that a random split keeps together, and its time.

        int64, int64, float64 [rows]. The split by time, and that of units that documents join, is `divide`'s.
        """
        nothing = np.zeros(len(query_ids), np.int64)
        if self._how == "time":
            return nothing, nothing, times(check, str(self._column))
        if self._how == "column":
            return self._said(check), nothing, nothing
        units = self._units(check, query_ids)
        return nothing if self._how == "train" else self._drawn(units), units, nothing

    def divide(self, engine: LocalEngine, folders: Sequence[Path]) -> None:
        """Have the engine know the rows that were `found` with their splits as `divided`.

        Sets `described`, from which `of_dataset` makes a splitter that splits the rows of an append alike.

        `folders` are those of the reading. Raises DataError where times are in several units.
        """
        if self._how == "time":
            facts = [read_facts(folder) for folder in folders]
            check_time_units(facts, f"column {self._column!r}")
            moments = self._moments
            if moments is None:
                validation, test = self._fractions
                found = RowTable.of(folder / "rows.parquet" for folder in folders)
                first, second = quantiles(engine, found, (1 - validation - test, 1 - test))
                moments = SplitTimes(first, second, np.inf)
            else:
                moments.check_units(facts, f"column {self._column!r}")
            times = (moments.validation, moments.test, moments.until, moments.train_from)
            from_validation, from_test, end, from_train = map(as_sql, times)
            split = f"WHEN time >= {from_test} THEN 2 WHEN time >= {from_validation} THEN 1 ELSE 0 END"
            split = f"CASE WHEN time >= {from_train} THEN 0 {split}"
            engine.view("divided", f"SELECT *, {split} AS split FROM found WHERE time < {end}")
            ((newest,),) = engine.fetch("SELECT max(time) FROM found")
            self.described |= moments.as_json(newest)
        elif self._whole_documents:
            labels = _joined_units(engine)
            work = partial(self._draw_labels, labels)
            drawn = engine.map("draw", ranges(labels, UNITS_PER_JOB), work, rows=labels.num_rows)
            engine.table("drawn", [folder / "splits.parquet" for folder in drawn])
            engine.view("divided", "SELECT found.*, drawn.split FROM found JOIN drawn ON found.unit = drawn.unit")
        else:
            engine.view("divided", f"SELECT *, split_read AS split FROM found WHERE split_read < {len(SPLITS)}")

    def _units(self, check: RowCheck, query_ids: np.ndarray) -> np.ndarray:
        """Return what a random split keeps together: the rows of one group, or without a column of one query, int64."""
        if self._column is None or self._how != "random":
            return query_ids
        groups = strings(check, self._column)
        # A row without a group is its own.
        return np.where(is_empty(groups), query_ids, hash_strings(groups))

    def _said(self, check: RowCheck) -> np.ndarray:
        said = strings(check, str(self._column))
        numbers = np.array([NAMES.get(value.lower(), -1) for value in said.to_pylist()], np.int64)
        check.fail(numbers < 0, f"{self._column} is {{}}, needs train, validation, test or none", said)
        return numbers

    def _drawn(self, units: np.ndarray) -> np.ndarray:
        validation, test = self._fractions
        u = uniform(units, "split", self._seed)
        return np.where(u < test, 2, np.where(u < test + validation, 1, 0))

    def _draw_labels(self, labels: RowTable, job: tuple[int, int], folder: Path) -> None:
        with RowFile(folder / "splits.parquet", LABELLED) as file:
            for piece in labels.batches(*job):
                split = self._drawn(piece.column("label").to_numpy())
                file.add(pa.table({"unit": piece.column("unit"), "split": pa.array(split.astype(np.int32))}))


def check_fractions(validation: float, test: float) -> None:
    """Raise ConfigError unless the fractions of a split leave some rows to train on."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ConfigError(f"split fractions {validation} and {test} must not be negative and sum to less than 1")


def quantiles(engine: LocalEngine, table: RowTable, shares: Sequence[float]) -> list[float]:
    """Return the times before which these shares of a table's rows lie, exactly; infinity where all do."""
    folders = engine.map("times", ranges(table, ROWS_PER_RUN), partial(_sort_times, table), rows=table.num_rows)
    runs = [np.load(folder / TIMES, mmap_mode="r") for folder in folders]
    places = [int(table.num_rows * share) for share in shares]
    return [_time_at(runs, place) if place < table.num_rows else np.inf for place in places]


def _sort_times(table: RowTable, job: tuple[int, int], folder: Path) -> None:
    np.save(folder / TIMES, np.sort(table.read(*job, ["time"]).column("time").to_numpy()))


def _time_at(runs: Sequence[np.ndarray], place: int) -> float:
    """Return what is at a place of all times, which are sorted in each run, by bisection of the float64 there are."""
    low, high = ordinals_of(np.array([min(run[0] for run in runs), max(run[-1] for run in runs)])).tolist()
    while low < high:
        middle = (low + high) // 2
        if sum(int(np.searchsorted(run, of_ordinal(middle), "right")) for run in runs) > place:
            high = middle
        else:
            low = middle + 1
    return of_ordinal(low)


def as_sql(number: float) -> str:
    """Return a float64 as the engines' SQL has it, to the last bit."""
    return f"CAST('{'Infinity' if np.isinf(number) else repr(number)}' AS DOUBLE)"


def _joined_units(engine: LocalEngine) -> RowTable:
    """Return each unit with the least unit that documents connect it with, `label`."""
    both = "SELECT unit, content FROM found UNION SELECT unit, doc_id AS content FROM found"
    engine.select("edges", both, order="unit, content")
    labels = engine.select("labels0", "SELECT DISTINCT unit, unit AS label FROM edges", order="unit")
    for step in range(1, 64):
        known = f"labels{step - 1}"
        engine.view("near", f"SELECT edges.unit, content, label FROM edges JOIN {known} ON edges.unit = {known}.unit")
        engine.view("least", "SELECT content, min(label) AS label FROM near GROUP BY content")
        engine.view(
            "nearer",
            "SELECT near.unit, min(least.label) AS label FROM near JOIN least ON near.content = least.content "
            "GROUP BY near.unit",
        )
        # A label's own label is at most it: long chains shorten by half.
        own = f"SELECT nearer.unit, {known}.label FROM nearer JOIN {known} ON nearer.label = {known}.unit"
        labels = engine.select(f"labels{step}", own, order="unit")
        changed = f"SELECT count(*) FROM labels{step} a JOIN {known} b ON a.unit = b.unit WHERE a.label <> b.label"
        if engine.fetch(changed) == [(0,)]:
            break
    return labels
