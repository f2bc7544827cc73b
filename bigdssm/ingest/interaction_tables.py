"""Reading items, users and events of interactions, with user features as of each event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from bigdssm.dataset.catalogue import SINCE_COLUMN
from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.row_keys import hash_rows
from bigdssm.dataset.schema import Schema
from bigdssm.errors import DataError
from bigdssm.features import Feature
from bigdssm.features.canonical import canonical
from bigdssm.features.columns import (
    RowCheck,
    TimeUnits,
    check_time_units,
    ids,
    merged_units,
    relevances,
    strings,
    times,
)
from bigdssm.ingest.dataset_writer import TIMES
from bigdssm.ingest.documents import (
    DistinctDocuments,
    StoredDocuments,
    document_rows,
    document_schema,
    first_rows,
    number_documents,
    number_versions,
    spool_columns,
)
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import FirstRows, RowFile, RowTable, read_facts, write_facts
from bigdssm.ingest.existing_events import EarlierEvents
from bigdssm.ingest.job import Ingestion, check_column_names
from bigdssm.ingest.reading import (
    ORDINAL_BITS,
    TablePart,
    column_options,
    feature_columns,
    read_part,
    row_ordinals,
)
from bigdssm.ingest.splits import DEFAULT_FRACTIONS, SplitTime, SplitTimes
from bigdssm.sources.base import Source
from bigdssm.utils.string_hashing import hash_strings

CUT_COLUMNS = ("split", "sequence", "first", "end_", "shuffle")
USER = pa.schema([("place", pa.int64()), ("user_id", pa.int64()), ("key", pa.large_string())])
SEQUENCE = USER.append(pa.field("length", pa.int64()))  # events
EVENT = pa.schema(
    [
        ("place", pa.int64()),
        ("user_id", pa.int64()),
        ("item", pa.int64()),  # catalogue row
        ("time", pa.float64()),
        ("relevance", pa.float32()),
    ]
)


def numbered_user_versions(table: str) -> str:
    """Return a query that numbers each user's rows by time: `nth`, and `from_newest`.

    Of rows with equal times, the later row in the table is newer.
    """
    return (
        "SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY time, place) AS nth, "
        f"row_number() OVER (PARTITION BY user_id ORDER BY time DESC, place DESC) AS from_newest FROM {table}"
    )


def join_users(
    engine: LocalEngine, splits: Mapping[str, RowTable], num_features: int
) -> tuple[dict[str, RowTable], int]:
    """Join the splits' rows with user features as of their times (an as-of join).

    The order is unchanged. A row gets its user's newest row (`users`, from `found_users`) up to the time of its first
    target, or nulls. Also returns the number of rows older than all rows of their user.
    """
    engine.table("cut_rows", (Path(file) for table in splits.values() for file in table.files))
    columns = ", ".join(f"r.{name}" for name in CUT_COLUMNS)
    engine.view(
        "asked",
        f"SELECT s.user_id, r.time, CAST(NULL AS INT) AS version, {columns} FROM cut_rows r "
        "JOIN sequences s ON r.sequence = s.number "
        "UNION ALL SELECT user_id, time, 1 AS version, -1 AS split, 0, 0, 0, 0 FROM found_users",
    )
    # the default window frame includes all rows with the current row's time
    engine.view(
        "dated",
        "SELECT *, count(version) OVER (PARTITION BY user_id ORDER BY time) AS nth, "
        "count(version) OVER (PARTITION BY user_id) AS versions FROM asked",
    )
    features = "".join(f", users.u{number}" for number in range(num_features))
    engine.select(
        "asked_rows",
        f"SELECT {columns}, CAST(r.nth = 0 AND r.versions > 0 AS INT) AS too_early{features} FROM dated r "
        "LEFT JOIN users ON r.user_id = users.user_id AND r.nth = users.nth WHERE r.split >= 0",
        order="split, sequence, first",
    )
    ((too_early,),) = engine.fetch("SELECT count(*) FROM asked_rows WHERE too_early = 1")
    joined = {
        name: engine.select(
            f"asked_{name}", f"SELECT * FROM asked_rows WHERE split = {number}", order="sequence, first"
        )
        for number, name in enumerate(splits)
    }
    return joined, int(too_early)


Split = Literal["leave-one-out", "time", "train"]


@dataclass(frozen=True)
class InteractionTables:
    """The source tables and their columns."""

    interactions: Path | str | Source
    items: Path | str | Source
    users: Path | str | Source | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = "timestamp"  # None: events are already in order of time
    items_time_column: str | None = None  # start of validity of a row of items; None: one row per item
    users_time_column: str | None = None  # start of validity of a row of users; None: one row per user
    rating_column: str | None = None  # the relevance; None: 1
    min_rating: float | None = None  # events with lower ratings are dropped
    positive_rating: float | None = None  # events have relevance 1, or 0 if rated lower
    split: Split | None = None  # None: the recorded split for an append, else leave-one-out
    validation_fraction: float = DEFAULT_FRACTIONS[0]  # split=time: the newest rows before the test rows
    test_fraction: float = DEFAULT_FRACTIONS[1]  # split=time: the newest rows
    validation_from: SplitTime = None  # split=time: start of validation; with test_from, replaces both fractions
    test_from: SplitTime = None
    until: SplitTime = None  # in addition: later rows are dropped

    def __post_init__(self) -> None:
        check_column_names(self)

    @property
    def split_times(self) -> SplitTimes | None:
        """Explicit cut-off times; None: determined by fractions. Raises ConfigError."""
        fractions = self.validation_fraction, self.test_fraction
        return SplitTimes.from_options(
            self.split or "leave-one-out", fractions, self.validation_from, self.test_from, self.until
        )


class ItemColumns(Protocol):
    """The columns of a table of items."""

    @property
    def item_column(self) -> str:
        """The column of ids."""

    @property
    def items_time_column(self) -> str | None:
        """The start of validity of a row; None: one row per item."""


def read_items(
    run: Ingestion, tables: ItemColumns, base: Schema, items: Source
) -> tuple[DistinctDocuments, list[Mapping[str, Any]]]:
    """Read items as documents; also return the facts of their times, if any.

    Raises DataError: no usable items.
    """
    engine, writer = run.engine, run.writer
    title = base.title or tables.item_column
    known = StoredDocuments.of(writer)
    reader = _ItemReader(tables.item_column, tables.items_time_column, title, base.doc, known)
    folders = run.read("items", [items], reader, base.doc.values())
    found = engine.table("found_documents", [folder / "documents.parquet" for folder in folders])
    if tables.items_time_column is not None:
        documents = number_versions(engine, writer, found)
    else:
        documents = number_documents(engine, writer)
        _report_repeated(run, items, "first_documents", "doc_key", tables.item_column)
    if not documents.total:
        raise DataError(f"{items.name} has no usable rows{writer.quarantine.summary()}")
    return documents, [read_facts(folder) for folder in folders] if documents.dated else []


@dataclass(frozen=True)
class _ItemReader:
    key: str
    time: str | None
    title: str
    features: dict[str, Feature]
    known: StoredDocuments

    @property
    def columns(self) -> dict[str, str]:
        options = (self.key, "--item-column"), (self.time, "--items-time-column"), (self.title, "data.title")
        return column_options(*options, *feature_columns(self.features, "doc"))

    def __call__(self, part: TablePart, folder: Path) -> None:
        with RowFile(folder / "documents.parquet", document_schema(self.features, dated=self.time is not None)) as file:
            read_part(part, self.columns, folder, partial(self._read, part, file))

    def _read(self, part: TablePart, file: RowFile, check: RowCheck, units: TimeUnits) -> None:
        keys, title = ids(check, self.key), strings(check, self.title)
        since = None if self.time is None else times(check, self.time)
        table = canonical(check, self.features)
        rows = document_rows(row_ordinals(part, check.batch), hash_rows(table), keys, title, table)
        if since is not None:
            rows = rows.append_column(SINCE_COLUMN, pa.array(since))
            units.add(since[check.good])
        file.add(self.known.compare(rows.filter(pa.array(check.good))))


def _report_repeated(run: Ingestion, source: Source, table: str, key: str, column: str) -> None:
    """Quarantine the rows of a table with a repeated key."""
    again = run.engine.select(
        f"{table}_again", f"SELECT place, {key} FROM {table} WHERE nth > 1", order=f"place, {key}"
    )
    for piece in again.batches():
        rows, keys = (piece.column(name).to_pylist() for name in ("place", key))
        run.writer.quarantine.num_good -= len(rows)
        run.writer.quarantine.add(
            (
                source.name,
                (row & ((1 << ORDINAL_BITS) - 1)) + 1,
                f"{column} {value!r} is in the table already",
                True,
            )
            for row, value in zip(rows, keys, strict=True)
        )


def read_users(
    run: Ingestion, tables: InteractionTables, user: dict[str, Feature], users: Source
) -> list[Mapping[str, Any]]:
    """Create the views `users` and `newest_users` (for serving).

    Return the facts of their times, if any.
    """
    engine = run.engine
    folders = run.read("users", [users], _UserReader(tables.user_column, tables.users_time_column, user), user.values())
    engine.table("found_users", [folder / "users.parquet" for folder in folders])
    if tables.users_time_column is not None:
        engine.view("users", numbered_user_versions("found_users"))
        engine.view("newest_users", "SELECT * FROM users WHERE from_newest = 1")
        return [read_facts(folder) for folder in folders]
    engine.view("users", first_rows("found_users", "user_id"))
    engine.view("newest_users", "SELECT * FROM users WHERE nth = 1")
    _report_repeated(run, users, "users", "key", tables.user_column)
    return []


@dataclass(frozen=True)
class _UserReader:
    key: str
    time: str | None
    features: dict[str, Feature]

    @property
    def columns(self) -> dict[str, str]:
        options = (self.key, "--user-column"), (self.time, "--users-time-column")
        return column_options(*options, *feature_columns(self.features, "query"))

    def __call__(self, part: TablePart, folder: Path) -> None:
        schema = pa.schema([*USER, ("time", pa.float64()), *spool_columns("u", self.features)])
        with RowFile(folder / "users.parquet", schema) as file:
            read_part(part, self.columns, folder, partial(self._read, part, file))

    def _read(self, part: TablePart, file: RowFile, check: RowCheck, units: TimeUnits) -> None:
        keys = ids(check, self.key)
        since = np.zeros(len(keys)) if self.time is None else times(check, self.time)
        table = canonical(check, self.features)
        known = [pa.array(row_ordinals(part, check.batch)), pa.array(hash_strings(keys)), keys, pa.array(since)]
        rows = pa.Table.from_arrays([*known, *table.columns], names=file.schema.names)
        units.add(since[check.good])
        file.add(rows.filter(pa.array(check.good)))


def read_events(
    run: Ingestion, tables: InteractionTables, user: dict[str, Feature], documents: DistinctDocuments, events: Source,
    other_times: Mapping[str, Sequence[Mapping[str, Any]]], earlier: EarlierEvents,
) -> tuple[RowTable, RowTable]:  # fmt: skip
    """Read the events; return the sequences, and the events in table order.

    A sequence has user_id, key, `length` (events), and its user's newest features. `other_times` are the facts of time
    columns in other tables. Raises DataError: no events remain, or times in several units.
    """
    engine, quarantine = run.engine, run.writer.quarantine
    split_times = tables.split_times
    until = None if split_times is None else split_times.until
    compared_with = earlier if earlier.parts and tables.time_column else None
    folders = run.read("events", [events], _EventReader(tables, documents.keys, until, compared_with))
    facts = [read_facts(folder) for folder in folders]
    if compared_with is not None:  # before other checks: in another unit all events are older, or newer
        where = f"{events.name}, column {tables.time_column!r}, with the events of {run.writer.out},"
        check_time_units([run.writer.content[TIMES], *facts], where)
    read = RowTable.of(folder / "events.parquet" for folder in folders)
    num_repeated = sum(some["num_repeated"] for some in facts)
    num_left_out = sum(some["num_good"] for some in facts) - num_repeated - read.num_rows
    engine.table("found_sequences", [folder / "sequences.parquet" for folder in folders])
    repeated = [f"{num_repeated} interactions are in {run.writer.out} already and are dropped"] if num_repeated else []
    if not read.num_rows:
        left_out = [f"{num_left_out} are {_drop_reasons(tables)}"] if num_left_out else []
        reasons = "".join(f"; {reason}" for reason in [*repeated, *left_out])
        raise DataError(f"{events.name}: no interactions remain to train on{reasons}{quarantine.summary()}")
    run.notes += repeated
    check_time_units(facts, f"{events.name}, column {tables.time_column!r}")
    for column, others in other_times.items():
        check_time_units([*facts, *others], f"{events.name}, column {tables.time_column!r}, with {column},")
    if split_times is not None:
        split_times.check_units(facts, f"{events.name}, column {tables.time_column!r}")
    if tables.time_column is not None:
        run.writer.content[TIMES] = merged_units([run.writer.content[TIMES], *facts])
    if num_left_out:
        run.notes.append(f"{num_left_out} interactions are {_drop_reasons(tables)} and dropped")
    engine.view(
        "whole_sequences",
        "SELECT min(place) AS place, user_id, min_by(key, place) AS key, CAST(sum(length) AS BIGINT) AS length "
        "FROM found_sequences GROUP BY user_id",
    )
    features = "".join(f", users.u{number}" for number in range(len(user)))
    sequences = engine.select(
        "sequences",
        f"SELECT s.*{features} FROM whole_sequences s "
        + ("LEFT JOIN newest_users users ON s.user_id = users.user_id" if user else ""),
        order="place, user_id",
    )
    if user:
        unknown = (
            "SELECT count(*) FROM sequences s WHERE NOT EXISTS (SELECT 1 FROM users u WHERE u.user_id = s.user_id)"
        )
        ((number,),) = engine.fetch(unknown)
        if number:
            run.notes.append(f"{number} users are not in the users table: their features are missing")
    return sequences, read


def _drop_reasons(tables: InteractionTables) -> str:
    low = [] if tables.min_rating is None else [f"rated below {tables.min_rating}"]
    late = [] if tables.until is None else [f"not before --until {tables.until}"]
    return " or ".join([*low, *late])


def _at_least(ratings: np.ndarray, threshold: float) -> np.ndarray:
    """Compare in float32, in which tables may store ratings: its 4.1 is less than that of float64."""
    return ratings.astype(np.float32) >= np.float32(threshold)


@dataclass(frozen=True)
class _EventReader:
    tables: InteractionTables
    items: SortedKeys
    until: float | None = None  # later events are dropped
    earlier: EarlierEvents | None = None  # for an append: the dataset's events

    @property
    def columns(self) -> dict[str, str]:
        names = ("user_column", "item_column", "time_column", "rating_column")
        return column_options(*((getattr(self.tables, name), f"--{name.replace('_', '-')}") for name in names))

    def __call__(self, part: TablePart, folder: Path) -> None:
        with (
            RowFile(folder / "events.parquet", EVENT) as events,
            RowFile(folder / "sequences.parquet", SEQUENCE) as sequences,
            FirstRows(sequences, "user_id", count="length") as first,
        ):
            repeated: list[int] = []
            read_part(part, self.columns, folder, partial(self._read, part, events, first, repeated))
        write_facts(folder, **read_facts(folder), num_repeated=sum(repeated))

    def _read(
        self, part: TablePart, events: RowFile, first: FirstRows, repeated: list[int], check: RowCheck,
        units: TimeUnits,
    ) -> None:  # fmt: skip
        users, columns = self._events(check, row_ordinals(part, check.batch))
        good = check.good
        if self.tables.min_rating is not None:
            good = good & _at_least(columns[-1], self.tables.min_rating)
        if self.until is not None:
            good = good & (columns[-2] < self.until)
        if self.tables.positive_rating is not None:
            columns = (*columns[:-1], _at_least(columns[-1], self.tables.positive_rating))
        columns = (*columns[:-1], columns[-1].astype(np.float32))
        units.add(columns[-2][good])
        if self.earlier is not None:
            good = self._new(self.earlier, check, good, columns, repeated)
        ordinals, user_id, item, time, relevance = (column[good] for column in columns)
        events.add(pa.table([ordinals, user_id, item, time, relevance], schema=EVENT))
        one = np.ones(len(ordinals), np.int64)
        first.add(pa.table([ordinals, user_id, users.filter(pa.array(good)), one], schema=SEQUENCE))

    def _new(
        self, earlier: EarlierEvents, check: RowCheck, good: np.ndarray, columns: tuple[np.ndarray, ...],
        repeated: list[int],
    ) -> np.ndarray:  # fmt: skip
        """Return the mask of new events.

        Events older than their user's newest existing event are marked bad.
        """
        again, newest = np.zeros(len(good), bool), np.full(len(good), -np.inf)
        again[good], newest[good] = earlier.compare(*(column[good] for column in columns[1:]))
        repeated.append(int(again.sum()))
        time = columns[-2]
        older = ~again & (time < newest)
        described = {row: f"{time[row]:.15g}, older than {newest[row]:.15g}" for row in np.flatnonzero(older).tolist()}
        reason = (
            f"{self.tables.time_column} is {{}}, the newest event of its user in the dataset; an append adds newer "
            "events only, so rebuild the dataset to insert older ones"
        )
        check.fail(older, reason, described)
        return good & ~again & ~older

    def _events(self, check: RowCheck, ordinals: np.ndarray) -> tuple[pa.Array, tuple[np.ndarray, ...]]:
        """Return a batch's users and event columns; bad rows are reported to `check`."""
        tables = self.tables
        users, items = ids(check, tables.user_column), ids(check, tables.item_column)
        item = self.items.find(hash_strings(items))
        check.fail(item < 0, f"{tables.item_column} {{}} is not in {tables.items}", items)
        time = np.zeros(len(item)) if tables.time_column is None else times(check, tables.time_column)
        relevance = relevances(check, tables.rating_column) if tables.rating_column else np.ones(len(item))
        return users, (ordinals, hash_strings(users), item, time, relevance)
