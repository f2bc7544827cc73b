"""Assignment of rows to splits: by a hash of their group, by time, or by a column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from bigdssm.config.keys import SPLITS
from bigdssm.dataset.partition import CUT_OFFS
from bigdssm.dataset.schema import uniform
from bigdssm.errors import ConfigError, DataError
from bigdssm.features.columns import RowCheck, is_empty, strings
from bigdssm.features.times import DeclaredUnit, TimeRule, Times, parse_time, times
from bigdssm.ingest.dataset_writer import DATASET_FILE, SPLIT, DatasetWriter
from bigdssm.ingest.engines import (
    LocalEngine,
    RowFile,
    RowTable,
    float_sort_keys,
    ranges,
    read_facts,
    sort_key_to_float,
)
from bigdssm.ingest.job import ColumnOptions
from bigdssm.ingest.times import record_times
from bigdssm.utils.hashing import hash_strings

DEFAULT_FRACTIONS = (0.05, 0.05)  # validation, test
SplitTime = float | str | date | None
"""A number in the unit of the table's times, or a date or ISO 8601 string; None: not given."""
NAMES = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2, "none": len(SPLITS)}
UNITS_PER_JOB = 1 << 20
ROWS_PER_RUN = 1 << 20  # per sorted run of times
TIMES = "times.npy"
LABELLED = pa.schema([("unit", pa.int64()), ("split", pa.int32())])


@dataclass(frozen=True)
class SplitTimes:
    """The cut-off times of a split by time, in the unit of the table's times."""

    validation: float
    test: float
    until: float  # later rows are dropped; infinity: none

    options: str = ""  # the command-line options that set them, for messages
    train_from: float = np.inf  # later rows are train rows; takes precedence over the others
    given_numbers: tuple[float, ...] = ()  # those that were given as numbers, not as dates
    has_seconds: bool = False  # whether dates were converted to seconds, because the unit was to be found

    @classmethod
    def of_dataset(cls, split: Mapping[str, Any]) -> "SplitTimes":
        """Return the cut-off times of an existing dataset (`as_json`).

        Rows after the last are train rows.
        """
        first, second, end = (np.inf if split[name] is None else split[name] for name in CUT_OFFS)
        return cls(first, second, np.inf, train_from=end)

    @classmethod
    def of_shares(cls, engine: LocalEngine, rows: RowTable, shares: Sequence[float]) -> "SplitTimes":
        """Return the cut-off times that have these shares of the rows before them."""
        first, second = quantiles(engine, rows, shares)
        return cls(first, second, np.inf)

    @property
    def starts(self) -> list[float]:
        """The finite cut-off times, ascending."""
        times = (self.validation, self.test, self.train_from)
        return sorted(time for time in times if np.isfinite(time))

    def as_json(self, engine: LocalEngine, table: str) -> dict[str, Any]:
        """Return the cut-off times of a table's rows for dataset.json, null for infinity."""
        ((newest,),) = engine.fetch(f"SELECT max(time) FROM {table}")
        end = self.until if np.isfinite(self.until) else float(np.nextafter(newest, np.inf))
        times = dict(zip(CUT_OFFS, (self.validation, self.test, end), strict=True))
        return {name: time if np.isfinite(time) else None for name, time in times.items()}

    def check_unit(self, rule: TimeRule, where: str) -> None:
        """Raise DataError if a cut-off time is in another unit than the times of a column, whose rule is `rule`."""
        if self.has_seconds and rule.unit != "s":
            raise DataError(
                f"{where}, with {self.options}, mixes units of time: the column is in {rule.unit}; with --time-unit "
                f"{rule.unit} dates are converted"
            )
        wrong = [time for time in self.given_numbers if not rule.accepts(np.array(time))]
        if wrong:
            raise DataError(
                f"{where}, with {self.options}, mixes units of time: {wrong[0]:.15g} is given, needs {rule.needed}"
            )


@dataclass(frozen=True, kw_only=True)
class SplitOptions(ColumnOptions):
    """The options of splits, which tables of pairs and of interactions share."""

    default_split: ClassVar[str]
    split: str | None = None  # None: the recorded split for an append, else the default one
    validation_fraction: float = DEFAULT_FRACTIONS[0]  # split=time: the newest rows before the test rows
    test_fraction: float = DEFAULT_FRACTIONS[1]  # split=time: the newest rows
    validation_from: SplitTime = None  # split=time: start of validation; with test_from, replaces both fractions
    test_from: SplitTime = None
    until: SplitTime = None  # in addition: later rows are dropped
    time_unit: DeclaredUnit | None = None  # of numbers in columns of times; None: data.time_unit

    @property
    def fractions(self) -> tuple[float, float]:
        """The fractions of validation and test."""
        return self.validation_fraction, self.test_fraction

    def split_times(self, rule: TimeRule) -> SplitTimes | None:
        """Return the explicit cut-off times, or None: the fractions determine them. Raises ConfigError.

        `rule`: of the column of times.
        """
        options = {"--validation-from": self.validation_from, "--test-from": self.test_from, "--until": self.until}
        parsed = {option: parse_time(value, rule) for option, value in options.items() if value is not None}
        given = {option: time for option, (time, _) in parsed.items()}
        if unparsed := [option for option, time in given.items() if not np.isfinite(time)]:
            raise ConfigError(f"{unparsed[0]} {options[unparsed[0]]!r} is neither a number nor an ISO-8601 time")
        if not given:
            return None
        if self.split != "time":
            split = self.split or self.default_split
            raise ConfigError(f"{next(iter(given))} needs --split time, not --split {split}")
        if missing := [option for option in ("--validation-from", "--test-from") if option not in given]:
            raise ConfigError(
                f"{next(iter(given))} needs {missing[0]}, too; --validation-from and --test-from may be equal "
                "for an empty validation split"
            )
        text = ", ".join(f"{option} {options[option]}" for option in given)
        if self.fractions != DEFAULT_FRACTIONS:
            raise ConfigError(f"{text}: fractions of validation and test would have no effect; leave them out")
        times = SplitTimes(
            given["--validation-from"],
            given["--test-from"],
            given.get("--until", np.inf),
            options=text,
            given_numbers=tuple(time for time, is_date in parsed.values() if not is_date),
            has_seconds=rule.unit is None and any(is_date for _, is_date in parsed.values()),
        )
        if not times.validation <= times.test < times.until:
            raise ConfigError(f"{text}: validation comes before test, and test before the end")
        return times

    def check_recorded(self, *, whole_documents: bool = False) -> None:
        """Raise ConfigError if an append without --split has options of a split."""
        options = {
            "--whole-documents": whole_documents or None, "--validation-from": self.validation_from,
            "--test-from": self.test_from, "--until": self.until,
        }  # fmt: skip
        given = [option for option, value in options.items() if value is not None]
        if self.fractions != DEFAULT_FRACTIONS:
            given.append("--validation-fraction or --test-fraction")
        if self.split is None and given:
            raise ConfigError(f"{given[0]} needs --split; without it an append uses the split of the dataset at --out")


def recorded_split(writer: DatasetWriter, choices: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the recorded split of the dataset to append to.

    None for a new dataset, or without a record. Raises DataError: the split is not one of `choices`, or is by time
    without cut-off times.
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


PairSplit = Literal["random", "time", "column", "train"]


class Splitter:
    """Assigns rows to splits (indices into SPLITS), while rows are read or after all are read."""

    def __init__(
        self,
        kind: PairSplit,
        column: str | None,
        fractions: tuple[float, float],
        seed: int,
        whole_documents: bool = False,
        split_times: SplitTimes | None = None,
        rule: TimeRule | None = None,
    ) -> None:
        """`split_times` replace the fractions of validation and test in a split by time; `rule`: of its column."""
        check_fractions(*fractions)
        if whole_documents and kind != "random":
            raise ConfigError(f"--whole-documents needs --split random, not --split {kind}")
        if kind in ("time", "column") and column is None:
            raise ConfigError(f"--split {kind} needs --{'time' if kind == 'time' else 'split'}-column")
        self._kind, self._column, self._seed, self._whole_documents = kind, column, seed, whole_documents
        self._fractions, self._split_times, self._rule = fractions, split_times, rule or TimeRule()
        self.description: dict[str, Any] = {"how": kind, "column": column}
        if kind == "random":
            self.description |= {"fractions": list(fractions), "seed": seed, "whole_documents": whole_documents}

    @classmethod
    def of_dataset(cls, split: Mapping[str, Any], column: str | None, rule: TimeRule) -> "Splitter":
        """Return the splitter for a recorded split; `column` replaces its column. Raises ConfigError: it has none."""
        if column is not None and split["how"] == "random" and split.get("column") is None:
            raise ConfigError("--group-column: the dataset is split by query; leave it out, or give --split")
        split_times = SplitTimes.of_dataset(split) if split["how"] == "time" else None
        return cls(
            split["how"], column or split.get("column"), tuple(split.get("fractions", DEFAULT_FRACTIONS)),
            split.get("seed", 0), split.get("whole_documents", False), split_times, rule,
        )  # fmt: skip

    @property
    def columns(self) -> dict[str, str]:
        """The required source column, if any, and the option that names it."""
        if self._column is None or self._kind == "train":
            return {}
        return {self._column: {"random": "--group-column", "time": "--time-column"}.get(self._kind, "--split-column")}

    @property
    def no_train_hint(self) -> str:
        """A likely reason for an empty train split, as the end of a sentence."""
        no_time = "nearly all rows have one time" if self._split_times is None else "none is before --validation-from"
        return {
            "time": f"; {no_time}",
            "column": f"; {self._column} is never train",
            "random": f"; nearly all rows are of one {self._column or 'query'}",
            "train": "",
        }[self._kind]

    def assign(self, check: RowCheck, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, Times]:
        """Return the rows' splits and units, int64 [rows], and their times.

        A random split keeps the rows of a unit together. `divide` assigns splits by time, and splits of units joined by
        documents.
        """
        zeros = np.zeros(len(query_ids), np.int64)  # in place of values that the kind of split does not use
        no_times = Times.zeros(len(query_ids))
        if self._kind == "time":
            return zeros, zeros, times(check, str(self._column), self._rule)
        if self._kind == "column":
            names = strings(check, str(self._column))
            numbers = np.array([NAMES.get(value.lower(), -1) for value in names.to_pylist()], np.int64)
            check.fail(numbers < 0, f"{self._column} is {{}}, needs train, validation, test or none", names)
            return numbers, zeros, no_times
        if self._kind == "train":
            return zeros, query_ids, no_times
        units = query_ids
        if self._column is not None:  # a row without a group is grouped by query
            groups = strings(check, self._column)
            units = np.where(is_empty(groups), query_ids, hash_strings(groups))
        return self._random_splits(units), units, no_times

    def divide(
        self, engine: LocalEngine, writer: DatasetWriter, folders: Sequence[Path], *, siamese: bool = False
    ) -> None:
        """Create the view `assigned_rows`: the rows of `pair_rows` with their splits.

        Completes `description`, from which `of_dataset` restores the splitter for an append. `folders` are the outputs
        of the read step. Raises DataError: times in several units.
        """
        if self._kind == "time":
            where = f"column {self._column!r}"
            rule = record_times(writer, self._rule, {where: [read_facts(folder)["times"] for folder in folders]})
            if self._split_times is not None:
                self._split_times.check_unit(rule, where)
            validation, test = self._fractions
            rows = RowTable.of(folder / "rows.parquet" for folder in folders)
            shares = (1 - validation - test, 1 - test)
            split_times = self._split_times or SplitTimes.of_shares(engine, rows, shares)
            times = (split_times.validation, split_times.test, split_times.until, split_times.train_from)
            from_validation, from_test, end, from_train = (  # exact literals
                f"CAST('{'Infinity' if np.isinf(time) else repr(time)}' AS DOUBLE)" for time in times
            )
            # indices into SPLITS
            split = (
                f"CASE WHEN time >= {from_train} THEN 0 WHEN time >= {from_test} THEN 2 "
                f"WHEN time >= {from_validation} THEN 1 ELSE 0 END"
            )
            engine.view("assigned_rows", f"SELECT *, {split} AS split FROM pair_rows WHERE time < {end}")
            self.description |= split_times.as_json(engine, "pair_rows")
        elif self._whole_documents:
            # Units that share a document (siamese: or a query) must be in one split. The label of a connected component
            # is its least unit. Every step takes the least label of all neighbours; with pointer jumping, which halves
            # the length of chains, the number of steps is logarithmic.
            nodes = ["content", "doc_id", *(["query_id"] if siamese else [])]
            both = " UNION ".join(f"SELECT unit, {name} AS content FROM pair_rows" for name in nodes)
            engine.select("edges", both, order="unit, content")
            labels = engine.select("labels0", "SELECT DISTINCT unit, unit AS label FROM edges", order="unit")
            for step in range(1, 64):
                previous = f"labels{step - 1}"
                engine.view(
                    "unit_labels",
                    f"SELECT edges.unit, content, label FROM edges JOIN {previous} ON edges.unit = {previous}.unit",
                )
                engine.view("content_labels", "SELECT content, min(label) AS label FROM unit_labels GROUP BY content")
                engine.view(
                    "least_labels",
                    "SELECT u.unit, min(c.label) AS label FROM unit_labels u JOIN content_labels c "
                    "ON u.content = c.content GROUP BY u.unit",
                )
                # pointer jumping: the label of the label
                jumped = (
                    f"SELECT l.unit, {previous}.label FROM least_labels l JOIN {previous} ON l.label = {previous}.unit"
                )
                labels = engine.select(f"labels{step}", jumped, order="unit")
                changed = (
                    f"SELECT count(*) FROM labels{step} a JOIN {previous} b ON a.unit = b.unit WHERE a.label <> b.label"
                )
                if engine.fetch(changed) == [(0,)]:
                    break
            split_folders = engine.map(
                "assign_units", ranges(labels, UNITS_PER_JOB), partial(self._split_units, labels), rows=labels.num_rows
            )
            engine.table("unit_splits", [folder / "splits.parquet" for folder in split_folders])
            engine.view("assigned_rows", "SELECT r.*, u.split FROM pair_rows r JOIN unit_splits u ON r.unit = u.unit")
        else:
            engine.view(
                "assigned_rows", f"SELECT *, split_read AS split FROM pair_rows WHERE split_read < {len(SPLITS)}"
            )

    def _random_splits(self, units: np.ndarray) -> np.ndarray:
        validation, test = self._fractions
        u = uniform(units, "split", self._seed)
        # indices into SPLITS
        return np.where(u < test, 2, np.where(u < test + validation, 1, 0))

    def _split_units(self, labels: RowTable, job: tuple[int, int], folder: Path) -> None:
        with RowFile(folder / "splits.parquet", LABELLED) as file:
            for piece in labels.batches(*job):
                split = self._random_splits(piece.column("label").to_numpy())
                file.add(pa.table({"unit": piece.column("unit"), "split": pa.array(split.astype(np.int32))}))


def check_fractions(validation: float, test: float) -> None:
    """Raise ConfigError unless the fractions leave rows for the train split."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ConfigError(f"split fractions {validation} and {test} must be at least 0 and sum to less than 1")


def quantiles(engine: LocalEngine, table: RowTable, shares: Sequence[float]) -> list[float]:
    """Return the exact quantiles of a table's times; infinity for a share of all rows."""
    folders = engine.map("times", ranges(table, ROWS_PER_RUN), partial(_sort_times, table), rows=table.num_rows)
    runs = [np.load(folder / TIMES, mmap_mode="r") for folder in folders]
    ranks = (int(table.num_rows * share) for share in shares)
    return [_time_at(runs, rank) if rank < table.num_rows else np.inf for rank in ranks]


def _sort_times(table: RowTable, job: tuple[int, int], folder: Path) -> None:
    np.save(folder / TIMES, np.sort(table.read(*job, ["time"]).column("time").to_numpy()))


def _time_at(runs: Sequence[np.ndarray], rank: int) -> float:
    """Return the time of this rank over all sorted runs, by bisection over float64 values."""
    low, high = float_sort_keys(np.array([min(run[0] for run in runs), max(run[-1] for run in runs)])).tolist()
    while low < high:
        middle = (low + high) // 2
        if sum(int(np.searchsorted(run, sort_key_to_float(middle), "right")) for run in runs) > rank:
            high = middle
        else:
            low = middle + 1
    return sort_key_to_float(low)
