"""Read items, users and events of interactions, with user features as of each event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.schema import Schema
from bigdssm.dataset.versions import SINCE_COLUMN
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
    PartOfTable,
    columns_of_features,
    named_columns,
    read_part,
    row_ordinals,
)
from bigdssm.ingest.row_keys import hash_rows
from bigdssm.ingest.sources.base import Source
from bigdssm.ingest.splits import DEFAULT_FRACTIONS, SplitTime, SplitTimes
from bigdssm.utils.string_hashing import hash_strings

REQUEST_TIME = ("split", "sequence", "first", "end_", "shuffle")


def versions_of(table: str) -> str:
    """Return a query for rows of users with `nth`, of each user from 1 on by time, and `from_newest`, from its end.

    Of rows of one time the later in the table is newer.
    """
    return (
        "SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY time, place) AS nth, "
        f"row_number() OVER (PARTITION BY user_id ORDER BY time DESC, place DESC) AS from_newest FROM {table}"
    )


def join_users(
    engine: LocalEngine, splits: Mapping[str, RowTable], num_features: int
) -> tuple[dict[str, RowTable], int]:
    """Return the rows of splits with the features of their users as of their times, sorted as they were.

    A row sees the newest of its user's rows (`users`, of `found_users`) whose time is not after that of its first
    target; with none it has nulls. Returns, too, how many rows have none though their users are known.
    """
    engine.table("cut_rows", (Path(file) for table in splits.values() for file in table.files))
    asked = ", ".join(f"r.{name}" for name in REQUEST_TIME)
    engine.view(
        "asked",
        f"SELECT s.user_id, r.time, CAST(NULL AS INT) AS version, {asked} FROM cut_rows r "
        "JOIN sequences s ON r.sequence = s.number "
        "UNION ALL SELECT user_id, time, 1 AS version, -1 AS split, 0, 0, 0, 0 FROM found_users",
    )
    # The frame of a window with an order has all rows of the current row's time.
    engine.view(
        "dated",
        "SELECT *, count(version) OVER (PARTITION BY user_id ORDER BY time) AS nth, "
        "count(version) OVER (PARTITION BY user_id) AS versions FROM asked",
    )
    features = "".join(f", users.u{number}" for number in range(num_features))
    engine.select(
        "asked_rows",
        f"SELECT {asked}, CAST(r.nth = 0 AND r.versions > 0 AS INT) AS too_early{features} FROM dated r "
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
USER = pa.schema([("place", pa.int64()), ("user_id", pa.int64()), ("key", pa.large_string())])
SEQUENCE = USER.append(pa.field("length", pa.int64()))  # events
EVENT = pa.schema(
    [
        ("place", pa.int64()),
        ("user_id", pa.int64()),
        ("item", pa.int64()),  # its catalogue row
        ("time", pa.float64()),
        ("relevance", pa.float32()),
    ]
)


@dataclass(frozen=True)
class InteractionTables:
    """The source tables and what their columns are."""

    interactions: Path | str | Source
    items: Path | str | Source
    users: Path | str | Source | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = "timestamp"  # none: events are in order of time already
    items_time_column: str | None = None  # from when on a row of items holds; none: an item has one row
    users_time_column: str | None = None  # from when on a row of users holds; none: a user has one row
    rating_column: str | None = None  # becomes the relevance; without one it is 1
    min_rating: float | None = None  # events rated lower are no events
    positive_rating: float | None = None  # events have the relevance 1, or 0 where rated lower
    split: Split | None = None  # none: the dataset's own of an append, else leave-one-out
    validation_fraction: float = DEFAULT_FRACTIONS[0]  # split=time: the newest rows but the test's
    test_fraction: float = DEFAULT_FRACTIONS[1]  # split=time: the newest rows
    validation_from: SplitTime = None  # split=time: from when on, in place of both fractions; test_from goes with it
    test_from: SplitTime = None
    until: SplitTime = None  # beside these: rows from then on are left out

    def __post_init__(self) -> None:
        check_column_names(self)

    @property
    def moments(self) -> SplitTimes | None:
        """Return the times that split=time divides at; None: shares of the events decide. Raises ConfigError."""
        fractions = self.validation_fraction, self.test_fraction
        return SplitTimes.told(
            self.split or "leave-one-out", fractions, self.validation_from, self.test_from, self.until
        )


def read_items(
    run: Ingestion, tables: InteractionTables, base: Schema, items: Source
) -> tuple[DistinctDocuments, list[Mapping[str, Any]]]:
    """Return the items as documents, and the facts of their times, if they have some.

    Raises DataError where there are none.
    """
    engine, writer = run.engine, run.writer
    shown = base.title or tables.item_column
    known = StoredDocuments.of(writer)
    reader = _ItemReader(tables.item_column, tables.items_time_column, shown, base.doc, known)
    folders = run.read("items", [items], reader)
    found = engine.table("found_documents", [folder / "documents.parquet" for folder in folders])
    if tables.items_time_column is not None:
        documents = number_versions(engine, writer, found)
    else:
        documents = number_documents(engine, writer)
        _refuse_repeated(run, items, "first_documents", "doc_key", tables.item_column)
    if not documents.total:
        raise DataError(f"{items.name} has no usable rows{writer.quarantine.told()}")
    return documents, [read_facts(folder) for folder in folders] if documents.dated else []


@dataclass(frozen=True)
class _ItemReader:
    key: str
    time: str | None
    shown: str
    features: dict[str, Feature]
    known: StoredDocuments

    @property
    def columns(self) -> dict[str, str]:
        options = (self.key, "--item-column"), (self.time, "--items-time-column"), (self.shown, "data.title")
        return named_columns(*options, *columns_of_features(self.features, "doc"))

    def __call__(self, part: PartOfTable, folder: Path) -> None:
        with RowFile(folder / "documents.parquet", document_schema(self.features, dated=self.time is not None)) as file:
            read_part(part, self.columns, folder, partial(self._read, part, file))

    def _read(self, part: PartOfTable, file: RowFile, check: RowCheck, units: TimeUnits) -> None:
        keys, title = ids(check, self.key), strings(check, self.shown)
        moment = None if self.time is None else times(check, self.time)
        table = canonical(check, self.features)
        rows = document_rows(row_ordinals(part, check.batch), hash_rows(table), keys, title, table)
        if moment is not None:
            rows = rows.append_column(SINCE_COLUMN, pa.array(moment))
            units.add(moment[check.good])
        file.add(self.known.compared(rows.filter(pa.array(check.good))))


def _refuse_repeated(run: Ingestion, source: Source, table: str, key: str, column: str) -> None:
    """Report the rows of a table whose key stands in it already."""
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
                f"{column} {value!r} stands in the table already",
                True,
            )
            for row, value in zip(rows, keys, strict=True)
        )


def read_users(
    run: Ingestion, tables: InteractionTables, user: dict[str, Feature], users: Source
) -> list[Mapping[str, Any]]:
    """Have the engine know the rows of the users table as `users`, and those that are served as `newest_users`.

    Returns the facts of their times, if they have some.
    """
    engine = run.engine
    folders = run.read("users", [users], _UserReader(tables.user_column, tables.users_time_column, user))
    engine.table("found_users", [folder / "users.parquet" for folder in folders])
    if tables.users_time_column is not None:
        engine.view("users", versions_of("found_users"))
        engine.view("newest_users", "SELECT * FROM users WHERE from_newest = 1")
        return [read_facts(folder) for folder in folders]
    engine.view("users", first_rows("found_users", "user_id"))
    engine.view("newest_users", "SELECT * FROM users WHERE nth = 1")
    _refuse_repeated(run, users, "users", "key", tables.user_column)
    return []


@dataclass(frozen=True)
class _UserReader:
    key: str
    time: str | None
    features: dict[str, Feature]

    @property
    def columns(self) -> dict[str, str]:
        options = (self.key, "--user-column"), (self.time, "--users-time-column")
        return named_columns(*options, *columns_of_features(self.features, "query"))

    def __call__(self, part: PartOfTable, folder: Path) -> None:
        schema = pa.schema([*USER, ("time", pa.float64()), *spool_columns("u", self.features)])
        with RowFile(folder / "users.parquet", schema) as file:
            read_part(part, self.columns, folder, partial(self._read, part, file))

    def _read(self, part: PartOfTable, file: RowFile, check: RowCheck, units: TimeUnits) -> None:
        keys = ids(check, self.key)
        moment = np.zeros(len(keys)) if self.time is None else times(check, self.time)
        table = canonical(check, self.features)
        known = [pa.array(row_ordinals(part, check.batch)), pa.array(hash_strings(keys)), keys, pa.array(moment)]
        rows = pa.Table.from_arrays([*known, *table.columns], names=file.schema.names)
        units.add(moment[check.good])
        file.add(rows.filter(pa.array(check.good)))


def read_events(
    run: Ingestion, tables: InteractionTables, user: dict[str, Feature], documents: DistinctDocuments, events: Source,
    other_times: Mapping[str, Sequence[Mapping[str, Any]]], earlier: EarlierEvents,
) -> tuple[RowTable, RowTable]:  # fmt: skip
    """Return the sequences, and the events in the order of their table.

    A sequence has user_id, key, its number of events `length`, and its user's newest features. `other_times` are the
    facts of the times in a column of another table. Raises DataError where no event is left, or times are in several
    units.
    """
    engine, quarantine = run.engine, run.writer.quarantine
    moments = tables.moments
    until = None if moments is None else moments.until
    compared = earlier if earlier.parts and tables.time_column else None
    folders = run.read("events", [events], _EventReader(tables, documents.keys, until, compared))
    facts = [read_facts(folder) for folder in folders]
    if compared is not None:  # first: in another unit all are older, or newer
        where = f"{events.name}, column {tables.time_column!r}, with the events of {run.writer.out},"
        check_time_units([run.writer.content[TIMES], *facts], where)
    found = RowTable.of(folder / "events.parquet" for folder in folders)
    num_repeated = sum(some["num_repeated"] for some in facts)
    num_left_out = sum(some["num_good"] for some in facts) - num_repeated - found.num_rows
    engine.table("found_sequences", [folder / "sequences.parquet" for folder in folders])
    repeated = [f"{num_repeated} interactions are in {run.writer.out} already and left out"] if num_repeated else []
    if not found.num_rows:
        left_out = [f"{num_left_out} are {_why_left_out(tables)}"] if num_left_out else []
        why = "".join(f"; {reason}" for reason in [*repeated, *left_out])
        raise DataError(f"{events.name}: no interaction is left to train on{why}{quarantine.told()}")
    run.notes += repeated
    check_time_units(facts, f"{events.name}, column {tables.time_column!r}")
    for column, others in other_times.items():
        check_time_units([*facts, *others], f"{events.name}, column {tables.time_column!r}, with {column},")
    if moments is not None:
        moments.check_units(facts, f"{events.name}, column {tables.time_column!r}")
    if tables.time_column is not None:
        run.writer.content[TIMES] = merged_units([run.writer.content[TIMES], *facts])
    if num_left_out:
        run.notes.append(f"{num_left_out} interactions are {_why_left_out(tables)} and left out")
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
    return sequences, found


def _why_left_out(tables: InteractionTables) -> str:
    low = [] if tables.min_rating is None else [f"rated below {tables.min_rating}"]
    late = [] if tables.until is None else [f"not before --until {tables.until}"]
    return " or ".join([*low, *late])


@dataclass(frozen=True)
class _EventReader:
    tables: InteractionTables
    items: SortedKeys
    until: float | None = None  # events from then on are none
    earlier: EarlierEvents | None = None  # in time, of the dataset that grows

    @property
    def columns(self) -> dict[str, str]:
        names = ("user_column", "item_column", "time_column", "rating_column")
        return named_columns(*((getattr(self.tables, name), f"--{name.replace('_', '-')}") for name in names))

    def __call__(self, part: PartOfTable, folder: Path) -> None:
        with (
            RowFile(folder / "events.parquet", EVENT) as events,
            RowFile(folder / "sequences.parquet", SEQUENCE) as sequences,
            FirstRows(sequences, "user_id", count="length") as first,
        ):
            repeated: list[int] = []
            read_part(part, self.columns, folder, partial(self._read, part, events, first, repeated))
        write_facts(folder, **read_facts(folder), num_repeated=sum(repeated))

    def _read(
        self, part: PartOfTable, events: RowFile, first: FirstRows, repeated: list[int], check: RowCheck,
        units: TimeUnits,
    ) -> None:  # fmt: skip
        users, columns = self._events(check, row_ordinals(part, check.batch))
        good = check.good
        if self.tables.min_rating is not None:
            good = good & (columns[-1] >= self.tables.min_rating)
        if self.until is not None:
            good = good & (columns[-2] < self.until)
        if self.tables.positive_rating is not None:
            columns = (*columns[:-1], columns[-1] >= self.tables.positive_rating)
        columns = (*columns[:-1], columns[-1].astype(np.float32))
        units.add(columns[-2][good])
        if self.earlier is not None:
            good = self._new(self.earlier, check, good, columns, repeated)
        place, user_id, item, time, relevance = (column[good] for column in columns)
        events.add(pa.table([place, user_id, item, time, relevance], schema=EVENT))
        one = np.ones(len(place), np.int64)
        first.add(pa.table([place, user_id, users.filter(pa.array(good)), one], schema=SEQUENCE))

    def _new(
        self, earlier: EarlierEvents, check: RowCheck, good: np.ndarray, columns: tuple[np.ndarray, ...],
        repeated: list[int],
    ) -> np.ndarray:  # fmt: skip
        """Return which good events the dataset does not have; older ones than the newest of their users are failed."""
        again, newest = np.zeros(len(good), bool), np.full(len(good), -np.inf)
        again[good], newest[good] = earlier.compare(*(column[good] for column in columns[1:]))
        repeated.append(int(again.sum()))
        time = columns[-2]
        older = ~again & (time < newest)
        shown = {row: f"{time[row]:.15g}, older than {newest[row]:.15g}" for row in np.flatnonzero(older).tolist()}
        reason = (
            f"{self.tables.time_column} is {{}}, the newest event of its user in the dataset; an append goes forward "
            "in time, so make the dataset again to insert older events"
        )
        check.fail(older, reason, shown)
        return good & ~again & ~older

    def _events(self, check: RowCheck, place: np.ndarray) -> tuple[pa.Array, tuple[np.ndarray, ...]]:
        """Return the users of a batch, and the columns of all its events; what is wrong is reported to `check`."""
        tables = self.tables
        users, items = ids(check, tables.user_column), ids(check, tables.item_column)
        item = self.items.find(hash_strings(items))
        check.fail(item < 0, f"{tables.item_column} {{}} is not in {tables.items}", items)
        moment = np.zeros(len(item)) if tables.time_column is None else times(check, tables.time_column)
        relevance = relevances(check, tables.rating_column) if tables.rating_column else np.ones(len(item))
        return users, (place, hash_strings(users), item, moment, relevance)
