"""Build a dataset of (history → next item) rows from events, items and users.

Steps: read and number items; read users and events; sort events by user (in order of first occurrence), time and
ordinal; cut ranges of sequences into rows; sort train rows by a hash of their ordinal; write shards, sequences and
catalogue. See docs/ingestion.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig, check_history_lengths
from bigdssm.dataset.catalogue import DOCUMENT_COLUMN, SINCE_COLUMN, catalogue_files
from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.partition import read_partition
from bigdssm.dataset.remote import SEQUENCE_KEYS_FILE
from bigdssm.dataset.rows import TIME_COLUMN, VERSION_COLUMN
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, TextTokenizer, encode_columns, stored_features
from bigdssm.ingest.cutting import ItemVersions, SequenceCutter, cut_sequences
from bigdssm.ingest.dataset_writer import ITEM_PARTITIONS, PARTITIONS, SPLIT
from bigdssm.ingest.documents import (
    DistinctDocuments,
    canonical_columns,
    fitted_documents,
    write_document_keys,
)
from bigdssm.ingest.engines.tables import RowTable, read_facts
from bigdssm.ingest.existing_events import EarlierEvents
from bigdssm.ingest.fitting import FittedSide, fit, of_tables, schema_to_fit
from bigdssm.ingest.interaction_tables import InteractionTables, Split, join_users, read_events, read_items, read_users
from bigdssm.ingest.job import (
    BLOCK_COLUMNS,
    CATALOGUE_COLUMNS,
    SEQUENCE_COLUMNS,
    Ingestion,
    IngestReport,
    IngestTarget,
    check_reserved_names,
    ingestion,
)
from bigdssm.ingest.sorting import shuffled
from bigdssm.ingest.splits import SPLITS, SplitTimes, check_dataset_split, check_fractions, dataset_split, quantiles
from bigdssm.sources.opening import SparkTable, open_table
from bigdssm.utils.log import Progress, no_progress


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
        writer.record_id_sources(doc="column", query="column")
        base = schema_to_fit(config, writer.out if writer.append else None, target.like)
        user = stored_features(base.query)
        if user and users is None:
            raise ConfigError(f"the query features {', '.join(user)} need a users table; give --users")
        as_of = bool(user) and tables.users_time_column is not None
        writer.record_times("users", as_of)
        writer.record_times("items", tables.items_time_column is not None)
        earlier = _earlier(run)
        writer.record_event_times(tables.time_column is not None)
        known = catalogue_files(writer.out, writer.content)
        schema_read = of_tables(base, config)
        documents, item_times = read_items(run, tables, schema_read, items)
        versions = ItemVersions.of(engine, known, documents) if documents.dated else None
        user_read = stored_features(schema_read.query)
        user_times = read_users(run, tables, user_read, users) if user and users is not None else []
        other_times = {
            f"{tables.items}, column {tables.items_time_column!r}": item_times,
            f"{tables.users}, column {tables.users_time_column!r}": user_times,
        }
        sequences, event_rows = read_events(run, tables, user, documents, events, other_times, earlier)
        writer.quarantine.check()
        sides = [FittedSide("doc", fitted_documents(engine, documents), "d", base.doc)]
        if user:
            fitted = "SELECT * FROM users" if as_of else "SELECT * FROM newest_users"
            sides.append(FittedSide("query", engine.select("fitted_users", fitted, order="place, user_id"), "u", user))
        schema, text = fit(
            engine, base, config, sides, folder=writer.tokenizer_dir, grow=writer.append, like=target.like
        )  # fmt: skip
        split, split_times = _split_of(run, tables, event_rows)
        key_file = writer.partition_dir / SEQUENCE_KEYS_FILE
        write_document_keys(engine, "sequences", "user_id", 0, key_file)
        cutting = SequenceCutter(
            events=event_rows, sequences=sequences, keys=SortedKeys([key_file]),
            user=stored_features(schema.query), text=text, split=split,
            thresholds=(split_times.validation, split_times.test, split_times.train_from),
            targets_per_row=config.targets_per_row,
            seed=target.seed, earlier=earlier, has_times=tables.time_column is not None, versions=versions,
        )  # fmt: skip
        folders, cut = cut_sequences(run, cutting, has_times=tables.time_column is not None)
        splits = {name: RowTable.of(folder / f"{name}.parquet" for folder in folders) for name in SPLITS}
        if versions is not None:
            run.notes += _notes_of_versions(tables, documents, sum(read_facts(f)["num_early"] for f in folders))
        if not splits["train"].num_rows:
            before = "" if tables.split_times is None else f" before --validation-from {tables.validation_from}"
            if writer.append and split != "train":
                before += f" for --split {split}; with --split train all events of the partition are trained on"
            raise DataError(f"{tables.interactions}: no train rows remain; every user has too few events{before}")
        if as_of:
            splits, too_early = join_users(engine, splits, len(user))
            if too_early:
                run.notes.append(
                    f"{too_early} rows are older than all rows of their users in {tables.users}: no user features"
                )
        row_features = cutting.user if as_of else {}
        encode = partial(_encoded, row_features, text)
        columns = ["sequence", "first", "end_", *(f"u{number}" for number in range(len(row_features)))]
        splits["train"] = shuffled(engine, "train", splits["train"], columns)
        entries = run.write_splits(splits, encode)
        counted = engine.select(
            "positives", "SELECT doc, CAST(sum(count) AS BIGINT) AS n FROM cut_positives GROUP BY doc", order="doc"
        ).read()
        if not counted.num_rows:
            raise DataError("every relevance in the train split is 0: there are no positives to learn from")
        positives = (counted.column("doc").to_numpy(), counted.column("n").to_numpy())
        return run.finish(schema, text, documents, entries, positives, cut)


def _notes_of_versions(tables: InteractionTables, documents: DistinctDocuments, num_early: int) -> Iterator[str]:
    if documents.changed is not None and documents.changed.num_rows:
        yield f"new versions of items in {tables.items}: {documents.changed.num_rows}"
    if num_early:
        yield (
            f"{num_early} events are older than all rows of their items in {tables.items}: they use the oldest version"
        )


def _check(config: DataConfig, tables: InteractionTables, *, append: bool) -> None:
    """Validate the combination of options. Raises ConfigError."""
    dated = tables.items_time_column is not None
    check_reserved_names(config.doc, [*CATALOGUE_COLUMNS, *([DOCUMENT_COLUMN, SINCE_COLUMN] if dated else [])], "doc")
    of_events = [*([TIME_COLUMN] if tables.time_column else []), *([VERSION_COLUMN] if dated else [])]
    check_reserved_names(config.query, [*BLOCK_COLUMNS, *SEQUENCE_COLUMNS, *of_events], "query")
    check_history_lengths(config)
    check_fractions(tables.validation_fraction, tables.test_fraction)
    if append and tables.split is None:
        check_dataset_split(
            (tables.validation_fraction, tables.test_fraction), validation_from=tables.validation_from,
            test_from=tables.test_from, until=tables.until,
        )  # fmt: skip
    _ = tables.split_times  # validates them
    if tables.split == "time" and tables.time_column is None:
        raise ConfigError("--split time needs a --time-column")
    if isinstance(open_table(tables.interactions), SparkTable) and tables.time_column is None:
        raise ConfigError(f"{tables.interactions}: rows from Spark have no order; name a --time-column")
    if tables.users_time_column is not None and tables.users is None:
        raise ConfigError(f"--users-time-column {tables.users_time_column} needs a users table; give --users")
    for side, column in (("users", tables.users_time_column), ("items", tables.items_time_column)):
        if column is not None and tables.time_column is None:
            raise ConfigError(f"--{side}-time-column {column} needs a --time-column of the events")
    for option, rating in (("--min-rating", tables.min_rating), ("--positive-rating", tables.positive_rating)):
        if rating is not None and (tables.rating_column is None or not np.isfinite(rating)):
            raise ConfigError(f"{option} {rating} needs a finite number, and a --rating-column")


def _split_of(run: Ingestion, tables: InteractionTables, events: RowTable) -> tuple[str, SplitTimes]:
    """Return the kind of split, and its cut-off times (infinity unless by time).

    An append without --split uses the recorded split; a new dataset records its split.
    """
    engine, content = run.engine, run.writer.content
    never = SplitTimes(np.inf, np.inf, np.inf)
    recorded = dataset_split(run.writer, get_args(Split)) if tables.split is None else None
    how = recorded["how"] if recorded else tables.split or "leave-one-out"
    split_times = never
    if recorded and how == "time":
        split_times = SplitTimes.of_dataset(recorded)
    elif how == "time" and tables.split_times is not None:
        split_times = tables.split_times
    elif how == "time":
        until_test = 1 - tables.test_fraction
        first, second = quantiles(engine, events, (until_test - tables.validation_fraction, until_test))
        split_times = SplitTimes(first, second, np.inf)
    if not run.writer.append:
        content[SPLIT] = {"how": how}
        if how == "time":
            engine.table("read_events", map(Path, events.files))
            ((newest,),) = engine.fetch("SELECT max(time) FROM read_events")
            content[SPLIT] |= split_times.as_json(newest)
    return how, split_times


def _earlier(run: Ingestion) -> EarlierEvents:
    """Return the events of existing partitions. Raises DataError: one holds pairs."""
    content = run.writer.content
    with_events = [name for name in content[PARTITIONS] if name not in content.get(ITEM_PARTITIONS, [])]
    partitions = [read_partition(run.writer.out, name) for name in with_events]
    for partition in partitions:
        if not partition.sequence_files:
            raise DataError(f"{run.writer.out}: partition {partition.name!r} holds pairs, not interactions")
    return EarlierEvents.of(partitions)


def _encoded(row_features: dict[str, Feature], text: TextTokenizer | None, rows: pa.Table) -> dict[str, pa.Array]:
    """Return the columns of a block."""
    names = {"sequence": "sequence", "first": "first", "end": "end_"}
    columns = {name: rows.column(column).combine_chunks() for name, column in names.items()}
    return columns | encode_columns(canonical_columns(rows, "u", row_features), row_features, text, large=False)
