"""Build a dataset of (history → next item) rows from events, items and users.

Steps: read and number items; read users and events; sort events by user (in order of first occurrence), time and
ordinal; cut ranges of sequences into rows; sort train rows by a hash of their ordinal; write shards, sequences and
catalogue. See docs/ingestion.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig, check_history_lengths
from bigdssm.config.keys import SPLITS
from bigdssm.dataset.catalogue import DOCUMENT_COLUMN, SINCE_COLUMN, catalogue_files
from bigdssm.dataset.partition import read_partition
from bigdssm.dataset.remote import SEQUENCE_KEYS_FILE
from bigdssm.dataset.rows import EVENT_PREFIX, TIME_COLUMN, VERSION_COLUMN
from bigdssm.dataset.schema import Schema, SortedKeys, hash_rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import CalendarTime, EventTime, Feature, TextTokenizer, encode_columns, stored_features
from bigdssm.features.canonical import canonical
from bigdssm.features.columns import ids, relevances, strings
from bigdssm.features.event_time import END_SECOND, FIRST_SECOND
from bigdssm.features.times import TimeRule, Times, times
from bigdssm.ingest.cutting import CutPlan, EarlierEvents, ItemVersions, cut_sequences
from bigdssm.ingest.dataset_writer import ITEM_PARTITIONS, PARTITIONS, SPLIT
from bigdssm.ingest.documents import (
    DistinctDocuments,
    StoredDocuments,
    canonical_columns,
    document_rows,
    document_schema,
    first_rows,
    number_documents,
    number_versions,
    spool_columns,
    write_document_keys,
)
from bigdssm.ingest.engines import FirstRows, LocalEngine, RowFile, RowTable, read_facts, shuffled, write_facts
from bigdssm.ingest.fitting import FittedSide, document_sides, fit, of_tables, schema_to_fit
from bigdssm.ingest.job import (
    BLOCK_COLUMNS,
    CATALOGUE_COLUMNS,
    ORDINAL_BITS,
    SEQUENCE_COLUMNS,
    Ingestion,
    IngestReport,
    IngestTarget,
    TablePart,
    check_options,
    check_reserved_names,
    column_options,
    feature_columns,
    ingestion,
    read_part,
    row_ordinals,
)
from bigdssm.ingest.splits import SplitOptions, SplitTimes, check_fractions, recorded_split
from bigdssm.ingest.times import declared_rule, record_times, time_rule
from bigdssm.sources.base import Source
from bigdssm.sources.opening import SparkTable, open_table
from bigdssm.utils.hashing import hash_strings
from bigdssm.utils.log import Progress, no_progress

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

Split = Literal["leave-one-out", "time", "train"]


@dataclass(frozen=True)
class InteractionTables(SplitOptions):
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
    default_split: ClassVar[str] = "leave-one-out"
    split: Split | None = field(default=None, kw_only=True)


def make_interactions(
    config: DataConfig, tables: InteractionTables, target: IngestTarget, progress: Progress = no_progress
) -> IngestReport:
    """Build a dataset from interactions at `target.out`, or append to it.

    Raises DataError, ConfigError.
    """
    if config.siamese:
        raise ConfigError("data.siamese=true: events are not pairs of documents; use the sub-command `pairs`")
    _check(config, tables, append=target.append)
    items, events = open_table(tables.items), open_table(tables.interactions)
    users = None if tables.users is None else open_table(tables.users)
    sources = [source for source in (items, users, events) if source is not None]
    with ingestion(config, target, sources, tables, progress) as run:
        writer, engine = run.writer, run.engine
        # an append must have the schema and the kinds of columns of the dataset
        writer.record_id_sources(doc="column", query="column")
        base = schema_to_fit(config, writer.out if writer.append else None, target.like)
        user = stored_features(base.query)
        if user and users is None:
            raise ConfigError(f"the query features {', '.join(user)} need a users table; give --users")
        as_of = bool(user) and tables.users_time_column is not None
        writer.record_times("users", as_of)
        writer.record_times("items", tables.items_time_column is not None)
        with_events = [n for n in writer.content[PARTITIONS] if n not in writer.content.get(ITEM_PARTITIONS, [])]
        partitions = [read_partition(writer.out, name) for name in with_events]
        if of_pairs := [partition.name for partition in partitions if not partition.sequence_files]:
            raise DataError(f"{writer.out}: partition {of_pairs[0]!r} holds pairs, not interactions")
        earlier = EarlierEvents(tuple((tuple(p.sequence_files), p.folder / SEQUENCE_KEYS_FILE) for p in partitions))
        writer.record_times("times", tables.time_column is not None)
        rule = TimeRule() if tables.time_column is None else time_rule(writer, config, tables.time_unit)
        # items and users are read before the events, which refer to them
        existing_files = catalogue_files(writer.out, writer.content)
        schema_read = of_tables(base, config)
        documents, item_times = read_items(run, tables.item_column, tables.items_time_column, schema_read, items, rule)
        versions = ItemVersions.of(engine, existing_files, documents) if documents.versions is not None else None
        user_read = stored_features(schema_read.query)
        user_times = read_users(run, tables, user_read, users, rule) if user and users is not None else []
        other_times = {
            f"{tables.items}, column {tables.items_time_column!r}": item_times,
            f"{tables.users}, column {tables.users_time_column!r}": user_times,
        }
        event = stored_features(base.event)
        sequences, event_rows, rule = read_events(
            run, tables, user, event, documents, events, other_times, earlier, rule
        )
        if any(isinstance(feature, CalendarTime) for feature in base.event.values()):
            ((oldest, newest),) = engine.fetch("SELECT min(time), max(time) FROM read_events")
            if not FIRST_SECOND <= oldest / rule.per_second <= newest / rule.per_second < END_SECOND:
                raise DataError(
                    f"{tables.interactions}, column {tables.time_column!r}: got times from {oldest:.15g} to "
                    f"{newest:.15g}, needs dates of 1900 to 2100 for features of type calendar; give seconds, ms, "
                    "µs or ns since 1970"
                )
        writer.quarantine.check()
        # fit the schema, then cut the events into sequences and rows
        sides = document_sides(engine, base, documents)
        if user:
            fitted = "SELECT * FROM users" if as_of else "SELECT * FROM newest_users"
            sides.append(FittedSide("query", engine.select("fitted_users", fitted, order="place, user_id"), "u", user))
        if event:
            sides.append(FittedSide("event", event_rows, "e", event))
        schema, text = fit(
            engine, base, config, sides, folder=writer.tokenizer_dir, grow=writer.append, like=target.like
        )  # fmt: skip
        split, split_times = _split_of(run, tables, event_rows, rule)
        key_file = writer.partition_dir / SEQUENCE_KEYS_FILE
        write_document_keys(engine, "sequences", "user_id", 0, key_file)
        plan = CutPlan(
            user=stored_features(schema.query), event=stored_features(schema.event), text=text, earlier=earlier,
            versions=versions, has_times=tables.time_column is not None, split_kind=split,
            thresholds=(split_times.validation, split_times.test, split_times.train_from),
            targets_per_row=config.targets_per_row, min_history=0 if config.empty_histories else 1, seed=target.seed,
        )  # fmt: skip
        folders, cut = cut_sequences(run, event_rows, sequences, SortedKeys([key_file]), plan)
        splits = {name: RowTable.of(folder / f"{name}.parquet" for folder in folders) for name in SPLITS}
        if versions is not None:
            if documents.changed is not None and documents.changed.num_rows:
                run.notes.append(f"new versions of items in {tables.items}: {documents.changed.num_rows}")
            if num_early := sum(read_facts(folder)["num_early"] for folder in folders):
                run.notes.append(
                    f"{num_early} events are older than all rows of their items in {tables.items}: they use the oldest "
                    "version"
                )
        if not splits["train"].num_rows:
            before = "" if tables.split_times(rule) is None else f" before --validation-from {tables.validation_from}"
            if writer.append and split != "train":
                before += f" for --split {split}; with --split train all events of the partition are trained on"
            raise DataError(f"{tables.interactions}: no train rows remain; every user has too few events{before}")
        # rows get the features of their users as of their times; without times these are in the sequences
        if as_of:
            splits = join_users(engine, splits, len(user))
            run.note_count(
                "SELECT count(*) FROM joined_rows WHERE too_early = 1",
                f"rows are older than all rows of their users in {tables.users}: no user features",
            )
        row_features = plan.user if as_of else {}
        columns = ["sequence", "first", "end_", *(f"u{number}" for number in range(len(row_features)))]
        splits["train"] = shuffled(engine, "train", splits["train"], columns)
        entries = run.write_splits(splits, partial(_encoded, row_features, text))
        counted = engine.select(
            "positives", "SELECT doc, CAST(sum(count) AS BIGINT) AS n FROM cut_positives GROUP BY doc", order="doc"
        ).read()
        if not counted.num_rows:
            raise DataError("every relevance in the train split is 0: there are no positives to learn from")
        positives = (counted.column("doc").to_numpy(), counted.column("n").to_numpy())
        return run.finish(schema, text, documents, entries, positives, cut)


def _check(config: DataConfig, tables: InteractionTables, *, append: bool) -> None:
    """Validate the combination of options. Raises ConfigError."""
    items_have_times = tables.items_time_column is not None
    check_reserved_names(
        [*config.doc, *config.filter],
        [*CATALOGUE_COLUMNS, *([DOCUMENT_COLUMN, SINCE_COLUMN] if items_have_times else [])],
        "doc",
    )
    event_columns = [*([TIME_COLUMN] if tables.time_column else []), *([VERSION_COLUMN] if items_have_times else [])]
    check_reserved_names(config.query, [*BLOCK_COLUMNS, *SEQUENCE_COLUMNS, *event_columns], "query")
    check_history_lengths(config)
    check_fractions(*tables.fractions)
    if append:
        tables.check_recorded()
    tables.split_times(declared_rule(config, tables.time_unit))  # validates them
    no_times = tables.time_column is None
    ratings = {"--min-rating": tables.min_rating, "--positive-rating": tables.positive_rating}
    if tables.split == "time" and no_times:
        raise ConfigError("--split time needs a --time-column")
    is_spark = isinstance(open_table(tables.interactions), SparkTable)
    rules = [  # (whether it is violated, message)
        (
            no_times and is_spark,
            f"{tables.interactions}: rows from Spark have no order; name a --time-column",
        ),
        (
            tables.users_time_column is not None and tables.users is None,
            f"--users-time-column {tables.users_time_column} needs a users table; give --users",
        ),
        (
            no_times and tables.time_unit is not None,
            f"--time-unit {tables.time_unit} needs a --time-column",
        ),
        *(
            (no_times, f"data.event.{name}: type {feature.type} needs the times of events; name a --time-column")
            for name, feature in config.event.items()
            if isinstance(feature, EventTime)
        ),
        (
            no_times and bool(config.request),
            "data.request needs the times of events, which its history precedes; name a --time-column",
        ),
        *(
            (no_times and column is not None, f"--{side}-time-column {column} needs a --time-column of the events")
            for side, column in (("users", tables.users_time_column), ("items", tables.items_time_column))
        ),
        *(
            (
                rating is not None and (tables.rating_column is None or not np.isfinite(rating)),
                f"{option} {rating} needs a finite number, and a --rating-column",
            )
            for option, rating in ratings.items()
        ),
    ]
    check_options(rules)


def _split_of(run: Ingestion, tables: InteractionTables, events: RowTable, rule: TimeRule) -> tuple[str, SplitTimes]:
    """Return the kind of split, and its cut-off times (infinity unless by time).

    An append without --split uses the recorded split; a new dataset records its split.
    """
    recorded = recorded_split(run.writer, get_args(Split)) if tables.split is None else None
    kind = recorded["how"] if recorded else tables.split or tables.default_split
    split_times = SplitTimes(np.inf, np.inf, np.inf)
    if kind == "time":
        explicit = SplitTimes.of_dataset(recorded) if recorded else tables.split_times(rule)
        until_test = 1 - tables.test_fraction
        shares = (until_test - tables.validation_fraction, until_test)
        split_times = explicit or SplitTimes.of_shares(run.engine, events, shares)
    run.writer.cut_offs = split_times.starts
    if not run.writer.append:
        cut_offs = split_times.as_json(run.engine, "read_events") if kind == "time" else {}
        run.writer.content[SPLIT] = {"how": kind, **cut_offs}
    return kind, split_times


def _encoded(row_features: dict[str, Feature], text: TextTokenizer | None, rows: pa.Table) -> dict[str, pa.Array]:
    """Return the columns of a block."""
    names = {"sequence": "sequence", "first": "first", "end": "end_"}
    columns = {name: rows.column(column).combine_chunks() for name, column in names.items()}
    return columns | encode_columns(canonical_columns(rows, "u", row_features), row_features, text, large=False)


def read_items(
    run: Ingestion, key: str, time_column: str | None, base: Schema, items: Source, rule: TimeRule
) -> tuple[DistinctDocuments, list[Mapping[str, Any]]]:
    """Read items, with ids in column `key`, as documents; also return the facts of their times, if any.

    `time_column`: the start of validity of a row, read by `rule`; None: one row per item. Raises DataError: no usable
    items.
    """
    engine, writer = run.engine, run.writer
    title = base.title or key
    options = (key, "--item-column"), (time_column, "--items-time-column"), (title, "data.title")
    columns = column_options(*options, *feature_columns(base.doc, "doc"), *feature_columns(base.filter, "filter"))
    stored = StoredDocuments.of(writer)
    work = partial(_read_item_part, columns, key, time_column, title, base.documents, stored, rule)
    folders = run.read("items", [items], columns, work, base.doc.values())
    rows = engine.table("document_rows", [folder / "documents.parquet" for folder in folders])
    if time_column is not None:
        documents = number_versions(engine, writer, rows)
    else:
        documents = number_documents(engine, writer)
        _report_repeated(run, items, "first_documents", "doc_key", key)
    if not documents.total:
        raise DataError(f"{items.name} has no usable rows{writer.quarantine.summary()}")
    if documents.versions is None:
        return documents, []
    return documents, [read_facts(folder)["times"] for folder in folders]


def _read_item_part(
    columns: Mapping[str, str], key: str, time_column: str | None, title: str, features: dict[str, Feature],
    stored: StoredDocuments, rule: TimeRule, part: TablePart, folder: Path,
) -> None:  # fmt: skip
    schema = document_schema(features, has_times=time_column is not None)
    with RowFile(folder / "documents.parquet", schema) as file, read_part(part, columns, folder) as (batches, summary):
        for check in batches:
            keys, titles = ids(check, key), strings(check, title)
            since = None if time_column is None else times(check, time_column, rule)
            table = canonical(check, features)
            rows = document_rows(row_ordinals(part, check.batch), hash_rows(table), keys, titles, table)
            if since is not None:
                rows = rows.append_column(SINCE_COLUMN, pa.array(since.values))
                summary.add(check.batch, since, check.good)
            file.add(stored.compare(rows.filter(pa.array(check.good))))


def _report_repeated(run: Ingestion, source: Source, table: str, key: str, column: str) -> None:
    """Quarantine the rows of a table with a repeated key."""
    repeated = run.engine.select(
        f"{table}_again", f"SELECT place, {key} FROM {table} WHERE nth > 1", order=f"place, {key}"
    )
    for piece in repeated.batches():
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
    run: Ingestion, tables: InteractionTables, user: dict[str, Feature], users: Source, rule: TimeRule
) -> list[Mapping[str, Any]]:
    """Create the views `users` and `newest_users` (for serving).

    Return the facts of their times, if any.
    """
    engine, key, time_column = run.engine, tables.user_column, tables.users_time_column
    options = (key, "--user-column"), (time_column, "--users-time-column")
    columns = column_options(*options, *feature_columns(user, "query"))
    work = partial(_read_user_part, columns, key, time_column, user, rule)
    folders = run.read("users", [users], columns, work, user.values())
    engine.table("user_rows", [folder / "users.parquet" for folder in folders])
    if time_column is not None:
        # of rows with equal times, the later row in the table is newer
        engine.view(
            "users",
            "SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY time, place) AS nth, "
            "row_number() OVER (PARTITION BY user_id ORDER BY time DESC, place DESC) AS from_newest FROM user_rows",
        )
        engine.view("newest_users", "SELECT * FROM users WHERE from_newest = 1")
        return [read_facts(folder)["times"] for folder in folders]
    engine.view("users", first_rows("user_rows", "user_id"))
    engine.view("newest_users", "SELECT * FROM users WHERE nth = 1")
    _report_repeated(run, users, "users", "key", key)
    return []


def _read_user_part(
    columns: Mapping[str, str], key: str, time_column: str | None, features: dict[str, Feature], rule: TimeRule,
    part: TablePart, folder: Path,
) -> None:  # fmt: skip
    schema = pa.schema([*USER, ("time", pa.float64()), *spool_columns("u", features)])
    with RowFile(folder / "users.parquet", schema) as file, read_part(part, columns, folder) as (batches, summary):
        for check in batches:
            keys = ids(check, key)
            since = Times.zeros(len(keys)) if time_column is None else times(check, time_column, rule)
            table = canonical(check, features)
            ordinals = pa.array(row_ordinals(part, check.batch))
            numbers = [ordinals, pa.array(hash_strings(keys)), keys, pa.array(since.values)]
            rows = pa.Table.from_arrays([*numbers, *table.columns], names=schema.names)
            summary.add(check.batch, since, check.good)
            file.add(rows.filter(pa.array(check.good)))


def read_events(
    run: Ingestion, tables: InteractionTables, user: dict[str, Feature], event: dict[str, Feature],
    documents: DistinctDocuments, events: Source, other_times: Mapping[str, Sequence[Mapping[str, Any]]],
    earlier: EarlierEvents, rule: TimeRule,
) -> tuple[RowTable, RowTable, TimeRule]:  # fmt: skip
    """Read the events, with their features `event`; return the sequences, and the events in table order.

    A sequence has user_id, key, `length` (events), and its user's newest features. `other_times` are the facts of time
    columns in other tables, which are read by `rule`, too; also returns the rule with the unit of all of them. Raises
    DataError: no events remain, or times without a common unit.
    """
    engine, quarantine = run.engine, run.writer.quarantine
    split_times = tables.split_times(rule)
    until = None if split_times is None else split_times.until
    compared_with = earlier if earlier.parts and tables.time_column else None
    names = ("user_column", "item_column", "time_column", "rating_column")
    options = ((getattr(tables, name), f"--{name.replace('_', '-')}") for name in names)
    columns = column_options(*options, *feature_columns(event, "event"))
    work = partial(_read_event_part, columns, tables, event, documents.keys, until, compared_with, rule)
    folders = run.read("events", [events], columns, work, event.values())
    facts = [read_facts(folder) for folder in folders]
    if tables.time_column is not None:  # before other checks: in another unit all events are before --until, or none is
        where = f"{events.name}, column {tables.time_column!r}"
        times_of_events = {where: [part_facts["times"] for part_facts in facts]}
        rule = record_times(run.writer, rule, times_of_events | dict(other_times))
        if split_times is not None:
            split_times.check_unit(rule, where)
    event_rows = engine.table("read_events", [folder / "events.parquet" for folder in folders])
    num_repeated = sum(part_facts["num_repeated"] for part_facts in facts)
    num_left_out = sum(part_facts["num_good"] for part_facts in facts) - num_repeated - event_rows.num_rows
    engine.table("sequence_parts", [folder / "sequences.parquet" for folder in folders])
    repeated = f"{num_repeated} interactions are in {run.writer.out} already and are dropped"
    limits = {"rated below": tables.min_rating, "not before --until": tables.until}
    left_out = " or ".join(f"{limit} {value}" for limit, value in limits.items() if value is not None)
    if not event_rows.num_rows:
        causes = {repeated: num_repeated, f"{num_left_out} are {left_out}": num_left_out}
        reasons = "".join(f"; {cause}" for cause, number in causes.items() if number)
        raise DataError(f"{events.name}: no interactions remain to train on{reasons}{quarantine.summary()}")
    if num_repeated:
        run.notes.append(repeated)
    if num_left_out:
        run.notes.append(f"{num_left_out} interactions are {left_out} and dropped")
    engine.view(
        "merged_sequences",
        "SELECT min(place) AS place, user_id, min_by(key, place) AS key, CAST(sum(length) AS BIGINT) AS length "
        "FROM sequence_parts GROUP BY user_id",
    )
    features = "".join(f", users.u{number}" for number in range(len(user)))
    sequences = engine.select(
        "sequences",
        f"SELECT s.*{features} FROM merged_sequences s "
        + ("LEFT JOIN newest_users users ON s.user_id = users.user_id" if user else ""),
        order="place, user_id",
    )
    if user:
        run.note_count(
            "SELECT count(*) FROM sequences s WHERE NOT EXISTS (SELECT 1 FROM users u WHERE u.user_id = s.user_id)",
            "users are not in the users table: their features are missing",
        )
    return sequences, event_rows, rule


def _read_event_part(
    columns: Mapping[str, str], tables: InteractionTables, event: dict[str, Feature], known_items: SortedKeys,
    until: float | None, earlier: EarlierEvents | None, rule: TimeRule, part: TablePart, folder: Path,
) -> None:  # fmt: skip
    """Read a part of the events; those from `until` on, and those in `earlier` (for an append) are dropped."""
    num_repeated = 0
    schema = pa.schema([*EVENT, *spool_columns("e", event)])
    with (
        RowFile(folder / "events.parquet", schema) as event_file,
        RowFile(folder / "sequences.parquet", SEQUENCE) as sequence_file,
        FirstRows(sequence_file, "user_id", count="length") as first,
        read_part(part, columns, folder) as (batches, summary),
    ):
        for check in batches:
            users, items = ids(check, tables.user_column), ids(check, tables.item_column)
            item = known_items.find(hash_strings(items))
            check.fail(item < 0, f"{tables.item_column} {{}} is not in {tables.items}", items)
            of_rows = Times.zeros(len(item)) if tables.time_column is None else times(check, tables.time_column, rule)
            time = of_rows.values
            ratings = relevances(check, tables.rating_column) if tables.rating_column else np.ones(len(item))
            summary.add(check.batch, of_rows, check.good)  # also those that are dropped: they have the same unit
            ratings = ratings.astype(np.float32)  # tables may store float32, whose 4.1 is less than that of float64
            good = check.good
            if tables.min_rating is not None:
                good = good & (ratings >= np.float32(tables.min_rating))
            if until is not None:
                good = good & (time < until)
            relevance = ratings
            if tables.positive_rating is not None:
                relevance = (ratings >= np.float32(tables.positive_rating)).astype(np.float32)
            user_ids = hash_strings(users)
            features = canonical(check, event)
            good = good & check.good
            if earlier is not None:
                # events older than their user's newest existing event are marked bad
                repeated, newest = np.zeros(len(good), bool), np.full(len(good), -np.inf)
                encoded = encode_columns(features, event, None, large=True)
                of_event = {EVENT_PREFIX + name: np.asarray(column)[good] for name, column in encoded.items()}
                new = {"items": item[good], TIME_COLUMN: time[good], "relevance": relevance[good], **of_event}
                repeated[good], newest[good] = earlier.compare(user_ids[good], new)
                num_repeated += int(repeated.sum())
                older = ~repeated & (time < newest)
                described = {
                    row: f"{time[row]:.15g}, older than {newest[row]:.15g}" for row in np.flatnonzero(older).tolist()
                }
                reason = (
                    f"{tables.time_column} is {{}}, the newest event of its user in the dataset; an append adds newer "
                    "events only, so rebuild the dataset to insert older ones"
                )
                check.fail(older, reason, described)
                good = good & ~repeated & ~older
            ordinals = row_ordinals(part, check.batch)[good]
            added = [ordinals, user_ids[good], item[good], time[good], relevance[good]]
            added += [column.filter(pa.array(good)) for column in features.columns]
            event_file.add(pa.table(added, schema=schema))
            events_of_rows = [ordinals, user_ids[good], users.filter(pa.array(good)), np.ones(len(ordinals), np.int64)]
            first.add(pa.table(events_of_rows, schema=SEQUENCE))
    write_facts(folder, **read_facts(folder), num_repeated=num_repeated)


def join_users(engine: LocalEngine, splits: Mapping[str, RowTable], num_features: int) -> dict[str, RowTable]:
    """Join the splits' rows with user features as of their times (an as-of join).

    The order is unchanged. A row gets its user's newest row (`users`, from `user_rows`) up to the time of its first
    target, or nulls. `too_early` in `joined_rows` is 1 for rows older than all rows of their user.
    """
    engine.table("cut_rows", (Path(file) for table in splits.values() for file in table.files))
    columns = ", ".join(f"r.{name}" for name in CUT_COLUMNS)
    engine.view(
        "rows_and_versions",
        f"SELECT s.user_id, r.time, CAST(NULL AS INT) AS version, {columns} FROM cut_rows r "
        "JOIN sequences s ON r.sequence = s.number "
        "UNION ALL SELECT user_id, time, 1 AS version, -1 AS split, 0, 0, 0, 0 FROM user_rows",
    )
    # the default window frame includes all rows with the current row's time
    engine.view(
        "numbered_rows",
        "SELECT *, count(version) OVER (PARTITION BY user_id ORDER BY time) AS nth, "
        "count(version) OVER (PARTITION BY user_id) AS versions FROM rows_and_versions",
    )
    features = "".join(f", users.u{number}" for number in range(num_features))
    engine.select(
        "joined_rows",
        f"SELECT {columns}, CAST(r.nth = 0 AND r.versions > 0 AS INT) AS too_early{features} FROM numbered_rows r "
        "LEFT JOIN users ON r.user_id = users.user_id AND r.nth = users.nth WHERE r.split >= 0",
        order="split, sequence, first",
    )
    return {
        name: engine.select(
            f"joined_{name}", f"SELECT * FROM joined_rows WHERE split = {number}", order="sequence, first"
        )
        for number, name in enumerate(splits)
    }
