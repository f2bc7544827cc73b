"""Split pairs into train, validation and test: at random, by time or by a column; cut events into rows of splits.

Events are cut by one job per range of sequences, from a bucket with the range's events.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from bigdssm.config.keys import SPLITS
from bigdssm.dataset.catalogue import (
    DOCUMENT_COLUMN,
    SINCE_COLUMN,
    CatalogueFile,
    MappedTable,
    Versions,
    distinct_documents,
)
from bigdssm.dataset.rows import EVENT_PREFIX, TIME_COLUMN, VERSION_COLUMN
from bigdssm.dataset.schema import SortedKeys, shuffle_keys, uniform
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, TextTokenizer, encode_columns, ragged
from bigdssm.features.columns import RowCheck, TimeUnits, check_time_units, is_empty, parse_time, strings, times
from bigdssm.features.ragged import Ragged, offsets_of
from bigdssm.ingest.dataset_writer import DATASET_FILE, SPLIT, DatasetWriter
from bigdssm.ingest.documents import DistinctDocuments, canonical_columns, spool_columns
from bigdssm.ingest.engines import (
    LocalEngine,
    RowFile,
    RowTable,
    finished_folder,
    float_sort_keys,
    ranges,
    read_bucket,
    read_facts,
    sort_key_to_float,
    stable_order,
    write_buckets,
    write_facts,
)
from bigdssm.ingest.job import ColumnOptions, Ingestion, move_files, write_arrow
from bigdssm.utils.hashing import hash_strings

DEFAULT_FRACTIONS = (0.05, 0.05)  # validation, test
CUT_OFFS = ("validation_from", "test_from", "train_from")
SplitTime = float | str | date | None
"""A number in the unit of the table's times, or a date or ISO 8601 string (in seconds); None: not given."""
NAMES = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2, "none": len(SPLITS)}
UNITS_PER_JOB = 1 << 20
ROWS_PER_RUN = 1 << 20  # per sorted run of times
TIMES = "times.npy"
LABELLED = pa.schema([("unit", pa.int64()), ("split", pa.int32())])
ARRAYS = ("times", "begin", "file_row")  # of `Versions`, saved for workers
SEQUENCES_PER_FILE = 1 << 16
SEQUENCES_AT_ONCE = 1 << 12  # cut together: fits a core's cache
EVENTS_PER_FILE = 1 << 22  # at most: bounds memory
MAX_SAMPLED_TIMES = 1 << 21  # of targets, sampled to estimate leakage
ROW = pa.schema(
    [
        ("split", pa.int32()),
        ("sequence", pa.int64()),
        ("first", pa.int32()),
        ("end_", pa.int32()),  # `end` is an SQL keyword
        ("shuffle", pa.int64()),  # a hash of the last event's ordinal
        ("time", pa.float64()),  # of the first target
    ]
)
BUCKET = pa.schema(
    [
        ("place", pa.int64()),
        ("item", pa.int32()),
        ("time", pa.float64()),
        ("relevance", pa.float32()),
        ("sequence", pa.uint16()),  # within its file, < SEQUENCES_PER_FILE
    ]
)
POSITIVE = pa.schema([("doc", pa.int64()), ("count", pa.int64())])
TARGET_TIME = pa.schema([("split", pa.int32()), ("time", pa.float64())])


@dataclass(frozen=True)
class SplitTimes:
    """The cut-off times of a split by time, in the unit of the table's times."""

    validation: float
    test: float
    until: float  # later rows are dropped; infinity: none

    options: str = ""  # the command-line options that set them, for messages
    train_from: float = np.inf  # later rows are train rows; takes precedence over the others

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

    def as_json(self, engine: LocalEngine, table: str) -> dict[str, Any]:
        """Return the cut-off times of a table's rows for dataset.json, null for infinity."""
        ((newest,),) = engine.fetch(f"SELECT max(time) FROM {table}")
        end = self.until if np.isfinite(self.until) else float(np.nextafter(newest, np.inf))
        times = dict(zip(CUT_OFFS, (self.validation, self.test, end), strict=True))
        return {name: time if np.isfinite(time) else None for name, time in times.items()}

    def check_units(self, facts: Sequence[Mapping[str, Any]], where: str) -> None:
        """Raise DataError if the unit differs from a column's, given the facts of its parts."""
        cut_offs = np.array([self.validation, self.test, self.until])
        units = TimeUnits(cut_offs[np.isfinite(cut_offs)])
        check_time_units([*facts, units.facts()], f"{where}, with {self.options},")


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

    @property
    def fractions(self) -> tuple[float, float]:
        """The fractions of validation and test."""
        return self.validation_fraction, self.test_fraction

    def split_times(self) -> SplitTimes | None:
        """Return the explicit cut-off times, or None: the fractions determine them. Raises ConfigError."""
        options = {"--validation-from": self.validation_from, "--test-from": self.test_from, "--until": self.until}
        given = {option: parse_time(value) for option, value in options.items() if value is not None}
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
        times = SplitTimes(given["--validation-from"], given["--test-from"], given.get("--until", np.inf), text)
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
    ) -> None:
        """`split_times` replace the fractions of validation and test in a split by time."""
        check_fractions(*fractions)
        if whole_documents and kind != "random":
            raise ConfigError(f"--whole-documents needs --split random, not --split {kind}")
        if kind in ("time", "column") and column is None:
            raise ConfigError(f"--split {kind} needs --{'time' if kind == 'time' else 'split'}-column")
        self._kind, self._column, self._seed, self._whole_documents = kind, column, seed, whole_documents
        self._fractions, self._split_times = fractions, split_times
        self.description: dict[str, Any] = {"how": kind, "column": column}
        if kind == "random":
            self.description |= {"fractions": list(fractions), "seed": seed, "whole_documents": whole_documents}

    @classmethod
    def of_dataset(cls, split: Mapping[str, Any], column: str | None) -> "Splitter":
        """Return the splitter for a recorded split; `column` replaces its column. Raises ConfigError: it has none."""
        if column is not None and split["how"] == "random" and split.get("column") is None:
            raise ConfigError("--group-column: the dataset is split by query; leave it out, or give --split")
        split_times = SplitTimes.of_dataset(split) if split["how"] == "time" else None
        return cls(
            split["how"], column or split.get("column"), tuple(split.get("fractions", DEFAULT_FRACTIONS)),
            split.get("seed", 0), split.get("whole_documents", False), split_times,
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

    def assign(self, check: RowCheck, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows' splits, units and times: int64, int64, float64 [rows].

        A random split keeps the rows of a unit together. `divide` assigns splits by time, and splits of units joined by
        documents.
        """
        zeros = np.zeros(len(query_ids), np.int64)  # in place of values that the kind of split does not use
        if self._kind == "time":
            return zeros, zeros, times(check, str(self._column))
        if self._kind == "column":
            names = strings(check, str(self._column))
            numbers = np.array([NAMES.get(value.lower(), -1) for value in names.to_pylist()], np.int64)
            check.fail(numbers < 0, f"{self._column} is {{}}, needs train, validation, test or none", names)
            return numbers, zeros, zeros
        if self._kind == "train":
            return zeros, query_ids, zeros
        units = query_ids
        if self._column is not None:  # a row without a group is grouped by query
            groups = strings(check, self._column)
            units = np.where(is_empty(groups), query_ids, hash_strings(groups))
        return self._random_splits(units), units, zeros

    def divide(self, engine: LocalEngine, folders: Sequence[Path], *, siamese: bool = False) -> None:
        """Create the view `assigned_rows`: the rows of `pair_rows` with their splits.

        Completes `description`, from which `of_dataset` restores the splitter for an append. `folders` are the outputs
        of the read step. Raises DataError: times in several units.
        """
        if self._kind == "time":
            facts = [read_facts(folder) for folder in folders]
            check_time_units(facts, f"column {self._column!r}")
            if self._split_times is not None:
                self._split_times.check_units(facts, f"column {self._column!r}")
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


@dataclass(frozen=True)
class EarlierEvents:
    """The sequences of existing partitions, oldest partition first; pickled by path."""

    parts: tuple[tuple[tuple[Path, ...], Path], ...]  # sequence files and key file

    def __reduce__(self) -> "tuple[type[EarlierEvents], tuple[object]]":
        return EarlierEvents, (self.parts,)

    @cached_property
    def _tables(self) -> list[tuple[MappedTable, SortedKeys]]:
        return [(MappedTable(files), SortedKeys([keys])) for files, keys in self.parts]

    def take(self, user_ids: np.ndarray, columns: Mapping[str, type], *, last: bool = False) -> dict[str, Ragged]:
        """Return list columns of the users' sequences, or only their last events.

        Empty for unknown users. user_ids int64 [users]. The newest partition with a user has all of the user's events.
        """
        pieces_by_name = {name: [Ragged.of_lists([[]], dtype)] for name, dtype in columns.items()}
        row_of_user = np.zeros(len(user_ids), np.int64)  # row 0 is the empty sequence
        num_rows = 1
        for table, keys in reversed(self._tables):
            rows = keys.find(user_ids)
            new = np.flatnonzero((rows >= 0) & (row_of_user == 0))
            row_of_user[new] = num_rows + np.arange(len(new))
            num_rows += len(new)
            if len(new):
                for name, pieces in pieces_by_name.items():
                    ends = table.lengths(name, rows[new])
                    starts = np.maximum(ends - 1, 0) if last else np.zeros_like(ends)
                    pieces.append(table.take_slices(name, rows[new], starts, ends))
        return {name: Ragged.concat(pieces).take(row_of_user) for name, pieces in pieces_by_name.items()}

    def compare(self, user_ids: np.ndarray, new: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the mask of existing events, and each user's newest time (−inf: none).

        `new` has the list columns of sequences; an event exists if all of its values are equal. Arrays are [events].
        """
        users, user = np.unique(user_ids, return_inverse=True)
        last = self.take(users, {TIME_COLUMN: np.float64}, last=True)[TIME_COLUMN]
        newest = np.full(len(users), -np.inf)
        newest[last.lengths > 0] = last.values
        repeated = np.zeros(len(user_ids), bool)
        candidates = np.flatnonzero(new[TIME_COLUMN] <= newest[user])
        if len(candidates):
            old_users, new_user = np.unique(user_ids[candidates], return_inverse=True)
            types = {name: np.int32 if name == "items" else values.dtype.type for name, values in new.items()}
            stored = self.take(old_users, types)
            known_user = np.repeat(np.arange(len(old_users)), stored["items"].lengths)
            existing = _comparable(known_user, {name: column.values for name, column in stored.items()})
            given = _comparable(new_user, {name: new[name][candidates].astype(types[name]) for name in types})
            repeated[candidates] = np.isin(given, existing)
        return repeated, newest[user]


def _comparable(user: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pack events into one comparable value each, [events]."""
    events = np.empty(len(user), [("user", np.int64), *((name, values.dtype) for name, values in columns.items())])
    events["user"] = user
    for name, values in columns.items():
        events[name] = values + values.dtype.type(0)  # −0.0 becomes 0.0: values are compared by bytes
    return events.view(np.dtype((np.void, events.dtype.itemsize)))


@dataclass(frozen=True)
class ItemVersions:
    """A lookup of versions by item and time; pickled as its files, which workers map."""

    folder: Path
    num_docs: int

    @classmethod
    def of(cls, engine: LocalEngine, existing: Sequence[CatalogueFile], documents: DistinctDocuments) -> "ItemVersions":
        """Index the versions in existing catalogue files and in new `documents`."""
        folder = engine.spool / "item_versions"
        if folder.exists():
            return cls(folder, documents.total)
        assert documents.changed is not None
        rows = documents.changed.read(columns=[DOCUMENT_COLUMN, SINCE_COLUMN])
        document, since = (rows.column(name).to_numpy() for name in (DOCUMENT_COLUMN, SINCE_COLUMN))
        first = documents.table.read(columns=[SINCE_COLUMN]).column(SINCE_COLUMN).to_numpy()
        if existing:
            table = MappedTable([file.path for file in existing if file.since is None])
            first = np.concatenate([table.column(SINCE_COLUMN), first])
        if earlier := [file.path for file in existing if file.since is not None]:
            table = MappedTable(earlier)
            document = np.concatenate([table.column(DOCUMENT_COLUMN), document])
            since = np.concatenate([table.column(SINCE_COLUMN), since])
        versions = Versions.of(documents.total, document, since, first[distinct_documents(document)])
        oldest = first.copy()  # start of every document's oldest version, float64 [documents]
        np.minimum.at(oldest, document, since)
        with finished_folder(folder) as unfinished:
            np.save(unfinished / "oldest.npy", oldest)
            for name in ARRAYS:
                np.save(unfinished / f"{name}.npy", getattr(versions, name))
        return cls(folder, documents.total)

    @cached_property
    def _versions(self) -> Versions:
        arrays = (np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS)
        return Versions(self.num_docs, *arrays)

    def find(self, items: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the version numbers of items at times, int32, see `Versions.visible_rows`.

        And the number of times before all versions of their items.
        """
        oldest = np.load(self.folder / "oldest.npy", mmap_mode="r", allow_pickle=False)
        num_early = int((times < oldest[items]).sum())
        if not len(self._versions.begin):
            return np.full(len(items), -1, np.int32), num_early
        file_rows = self._versions.file_rows_at(items.astype(np.int64), times)
        return np.where(file_rows < self.num_docs, -1, file_rows - self.num_docs).astype(np.int32), num_early


def _cut_range(
    buckets: Sequence[Path], sequences: RowTable, num_events: int, user: dict[str, Feature], event: dict[str, Feature],
    text: TextTokenizer | None, split_kind: str, thresholds: tuple[float, float, float], targets_per_row: int,
    min_history: int, seed: int, earlier: EarlierEvents, has_times: bool, versions: ItemVersions | None,
    job: tuple[int, tuple[int, int]], folder: Path,
) -> None:  # fmt: skip
    """Cut a range of sequences, with its bucket of events, into a sequence file and rows; see `cut_sequences`."""
    number, (first, last) = job
    rows_of_users = sequences.read(first, last)
    user_ids, lengths = (rows_of_users.column(name).to_numpy() for name in ("user_id", "length"))
    # the new events [events] by sequence (from 0 in this range), time and ordinal, and their positions in the sequences
    bucket = read_bucket(buckets, number)
    by_time = stable_order(bucket.column("time").to_numpy())
    order = by_time[np.argsort(bucket.column("sequence").to_numpy()[by_time], kind="stable")]
    names = ("item", "time", "relevance", "place")
    item, time, relevance, ordinal = (bucket.column(name).to_numpy()[order] for name in names)
    offsets = offsets_of(lengths)
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    new_position = np.arange(len(item), dtype=np.int32) - offsets.astype(np.int32)[sequence]
    # the list columns of the sequences: existing events followed by the new ones
    lists = {"items": item, "relevance": relevance}
    if has_times:
        lists[TIME_COLUMN] = time
    facts: dict[str, Any] = {}
    if versions is not None:
        lists[VERSION_COLUMN], facts["num_early"] = versions.find(item, time)
    encoded = encode_columns(canonical_columns(bucket, "e", event), event, None, large=True)
    lists |= {EVENT_PREFIX + name: np.asarray(column)[order] for name, column in encoded.items()}
    before = earlier.take(user_ids, {name: values.dtype.type for name, values in lists.items()})
    columns = {
        "query_key": rows_of_users.column("key").combine_chunks().cast(pa.large_string()),
        "query_id": pa.array(user_ids),
    }
    for name, values in lists.items():
        rows = Ragged(values, offsets)
        if len(before[name].values):
            rows = ragged.joined(before[name], rows)
        columns[name] = pa.LargeListArray.from_arrays(pa.array(rows.offsets), pa.array(rows.values))
    columns |= encode_columns(canonical_columns(rows_of_users, "u", user), user, text, large=True)
    facts["made"] = write_arrow(folder / f"sequences-{number:06d}.arrow", columns)
    # the split of every event, an index into SPLITS; −1: too few events before it
    split = np.zeros(len(item), np.int8)
    if split_kind == "leave-one-out":
        from_last = lengths[sequence] - 1 - new_position
        split[from_last == 1], split[from_last == 0] = 1, 2
    elif split_kind == "time":
        for which, threshold in zip((1, 2, 0), thresholds, strict=True):
            split[time >= threshold] = which
    position = new_position + before["items"].lengths.astype(np.int32)[sequence]
    split = np.where(position >= min_history, split, -1)
    # rows of at most targets_per_row consecutive targets of a sequence, cut from the newest
    bounds = offsets[[*range(0, last - first, SEQUENCES_AT_ONCE), last - first]]
    for which, name in enumerate(SPLITS):
        most = targets_per_row if which == 0 else 1
        with RowFile(folder / f"{name}.parquet", ROW) as file:
            for begin, end in pairwise(bounds):
                # a row starts with a run of consecutive targets, or where a multiple of `most` targets of it is left
                targets = begin + np.flatnonzero(split[begin:end] == which)
                follows = np.zeros(len(targets), bool)
                follows[1:] = (np.diff(targets) == 1) & (np.diff(sequence[targets]) == 0)
                run_ends = np.append(np.flatnonzero(~follows)[1:], len(targets))
                from_end = run_ends[np.cumsum(~follows) - 1] - 1 - np.arange(len(targets))
                starts = np.flatnonzero(~follows | (from_end % most == most - 1))
                newest = targets[np.append(starts[1:], len(targets))[: len(starts)] - 1]
                oldest = targets[starts]
                columns_of_rows = [
                    np.full(len(starts), which, np.int32),
                    sequence[oldest].astype(np.int64) + first,
                    position[oldest],
                    position[newest] + 1,
                    shuffle_keys(ordinal[newest], seed),
                    time[oldest],
                ]
                file.add(pa.table(columns_of_rows, schema=ROW))
    # train positives, facts and, for the estimate of leakage, times of sampled targets
    docs, counts = np.unique(item[(split == 0) & (relevance > 0)], return_counts=True)
    with RowFile(folder / "positives.parquet", POSITIVE) as file:
        file.add(pa.table([docs, counts], schema=POSITIVE))
    if split_kind == "leave-one-out":
        sampled = (split >= 0) & (uniform(ordinal, "leak", 0) < MAX_SAMPLED_TIMES / max(1, num_events))
        with RowFile(folder / "times.parquet", TARGET_TIME) as file:
            file.add(pa.table([split[sampled].astype(np.int32), time[sampled]], schema=TARGET_TIME))
        # whether times are just event numbers of each sequence, from 0 or 1
        facts["counts_events"] = bool((time == new_position).all() or (time == new_position + 1).all())
    write_facts(folder, **facts)


def cut_sequences(
    run: Ingestion, events: RowTable, sequences: RowTable, keys: SortedKeys, user: dict[str, Feature],
    event: dict[str, Feature], text: TextTokenizer | None, *, split_kind: str, thresholds: tuple[float, float, float],
    targets_per_row: int, min_history: int, seed: int, earlier: EarlierEvents, has_times: bool,
    versions: ItemVersions | None,
) -> tuple[list[Path], list[dict[str, Any]]]:  # fmt: skip
    """Cut all sequences; create the table `cut_positives` of train positives.

    `events` are in the order of their table; `keys` finds sequences by user_id; `user` are the features of a sequence's
    user, `event` those of an event; `thresholds`: the start times of validation, test and train after it, of a split by
    time; targets have at least `min_history` events before them; `versions`: if items have times. Returns the folders
    of the splits' rows, sorted by sequence and position, and {"file", "rows", "checksum"} per sequence file.
    """
    engine = run.engine
    # each file's range of sequences has at most EVENTS_PER_FILE events, or one sequence
    file_ranges: list[tuple[int, int]] = []
    for first, last in ranges(sequences, SEQUENCES_PER_FILE):
        ends = np.cumsum(sequences.read(first, last, ["length"]).column("length").to_numpy())
        start, before = 0, 0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, before + EVENTS_PER_FILE, "right")))
            file_ranges.append((first + start, first + stop))
            start, before = stop, int(ends[stop - 1])
    jobs = list(enumerate(file_ranges))
    assign = partial(_by_range, keys, np.array([first for _, (first, _) in jobs]), spool_columns("e", event))
    buckets = write_buckets(engine, "event_buckets", events, assign, len(jobs))
    work = partial(
        _cut_range, buckets, sequences, events.num_rows, user, event, text, split_kind, thresholds, targets_per_row,
        min_history, seed, earlier, has_times, versions,
    )  # fmt: skip
    folders = engine.map("cut", jobs, work, rows=events.num_rows)
    engine.table("cut_positives", [folder / "positives.parquet" for folder in folders])
    if split_kind == "leave-one-out" and has_times and not all(read_facts(f)["counts_events"] for f in folders):
        times = RowTable.of(folder / "times.parquet" for folder in folders).read()
        split = times.column("split").to_numpy()
        time = times.column("time").to_numpy()
        train_times, test_times = np.sort(time[split == 0]), time[split == 2]
        younger = 0.0  # the share of train targets that are newer, averaged over the test targets
        if len(train_times) and len(test_times):
            not_newer = np.searchsorted(train_times, test_times, side="right").mean()
            younger = float(1 - not_newer / len(train_times))
        run.notes.append(
            f"leave-one-out leaks: on average {younger:.1%} of the train targets are newer than a test target; "
            f"with --split time none is"
        )
    return folders, move_files(folders, run.writer.partition_dir)


def _by_range(
    keys: SortedKeys, firsts: np.ndarray, features: Sequence[tuple[str, pa.DataType]], events: pa.Table
) -> tuple[pa.Table, np.ndarray]:
    """Assign events to ranges of sequences, given by their first sequences; `features` are columns of events."""
    sequence = keys.find(events.column("user_id").to_numpy())
    file = np.searchsorted(firsts, sequence, "right") - 1
    schema = pa.schema([*BUCKET, *features])
    numbered = events.append_column("sequence", pa.array(sequence - firsts[file]))
    return numbered.select(schema.names).cast(schema), file
