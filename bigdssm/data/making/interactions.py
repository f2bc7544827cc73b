"""Makes a dataset of (history → next item) rows from user–item–time events, an items table and a users table.

The items table is streamed; of the events, ids and times stay in memory (about 60 bytes an event while sorting).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig
from bigdssm.data.making.block_writer import SplitWriter, block_rows
from bigdssm.data.making.catalogue_writer import KEY_COLUMNS, CatalogueWriter, check_names
from bigdssm.data.making.column_file import ColumnFile
from bigdssm.data.making.dataset_writer import PARTITIONS, DatasetWriter
from bigdssm.data.making.making import (
    BLOCK_COLUMNS,
    SEQUENCE_COLUMNS,
    Fitting,
    Progress,
    Report,
    Target,
    commit,
    no_progress,
    stored,
    text_columns,
)
from bigdssm.data.mapped import MappedTable
from bigdssm.data.ragged import Ragged, gather_ranges, offsets_of
from bigdssm.data.tables.columns import RowCheck, canonical, is_empty, relevances, strings, times
from bigdssm.data.tables.fit import encode_columns, encoded_type
from bigdssm.data.tables.hashing import KeyIndex, hash_strings, mix
from bigdssm.data.tables.sources import read_table
from bigdssm.data.tokenizer import TextEncoder
from bigdssm.errors import ConfigError, DataError
from bigdssm.schema import Feature, Schema

Split = Literal["leave-one-out", "time", "train"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class InteractionTables:
    """The source tables and what their columns are."""

    interactions: Path
    items: Path
    users: Path | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = "timestamp"  # none: events are in order of time already
    rating_column: str | None = None  # becomes the relevance; without one it is 1
    min_rating: float | None = None  # events rated lower are no events
    split: Split = "leave-one-out"
    validation_fraction: float = 0.05  # split=time: the newest rows but the test's
    test_fraction: float = 0.05  # split=time: the newest rows


@dataclass(frozen=True)
class _Users:
    index: KeyIndex
    table: pa.Table  # canonical features, one row per user, and a last row where everything is missing


@dataclass(frozen=True)
class _Events:
    """Events sorted by sequence, then time, then place in the file."""

    keys: pa.Array  # string [sequences]
    sequence: np.ndarray  # int64 [events]
    item: np.ndarray  # int64: catalogue row
    time: np.ndarray  # float64
    relevance: np.ndarray  # float32
    place: np.ndarray  # int64: number of the event in file order
    offsets: np.ndarray  # int64 [sequences + 1]


def make_interactions(
    config: DataConfig, tables: InteractionTables, target: Target, progress: Progress = no_progress
) -> Report:
    """Make (or append to) the dataset at `target.out` and return what was made.

    Raises DataError or ConfigError with nothing left half-written.
    """
    started = time.monotonic()
    check_names(config.doc, [name for name, _ in KEY_COLUMNS], "doc")
    check_names(config.query, [*BLOCK_COLUMNS, *SEQUENCE_COLUMNS], "query")
    with target.open(config) as writer:
        fitting = Fitting(config, writer, target.like)
        catalogue = CatalogueWriter(writer.spool, fitting.base.doc, writer.catalogue_parts)
        _read_items(config, tables, catalogue, fitting, writer, progress)
        users = _read_users(tables, stored(fitting.base.query), fitting, writer)
        notes: list[str] = []
        events = _read_events(tables, catalogue, writer, notes, progress)
        writer.quarantine.check()
        schema, text = fitting.finish(lambda: _texts(catalogue, users, fitting.base))
        prior = _prior_items(writer, hash_strings(events.keys))
        _write_sequences(writer, events, prior, users, schema, text, notes)
        splits, counts = _write_rows(tables, target, writer, events, prior, catalogue.num_docs, notes)
        return commit(writer, catalogue, schema, text, splits, counts, started, notes)


def _read_items(
    config: DataConfig,
    tables: InteractionTables,
    catalogue: CatalogueWriter,
    fitting: Fitting,
    writer: DatasetWriter,
    progress: Progress,
) -> None:
    features, key = fitting.base.doc, tables.item_column
    shown = config.display or key
    columns = dict.fromkeys([key, shown, *(feature.column for feature in features.values())])
    bad = writer.quarantine.report
    for batch in read_table(tables.items, list(columns), bad):
        check = RowCheck(batch, bad)
        keys, display = strings(check, key), strings(check, shown)
        check.fail(is_empty(keys), f"{key} is empty")
        table, good = canonical(check, features), pa.array(check.good)
        kept, keys, table = batch.keep(check.good), keys.filter(good), table.filter(good)
        rows, first = catalogue.add(keys, display.filter(good), table)
        fitting.doc.update(table.take(pa.array(first)))
        twice = rows >= catalogue.first_new
        twice[first] = False
        RowCheck(kept, bad).fail(twice, f"{key} {{}} stands in the table already", keys)
        writer.quarantine.num_good += int((~twice).sum())
        progress("items", catalogue.num_docs, None)
    if not catalogue.num_docs:
        raise DataError(f"{tables.items} has no usable rows; see the reasons in {writer.quarantine.path.name}")


def _read_users(
    tables: InteractionTables, features: dict[str, Feature], fitting: Fitting, writer: DatasetWriter
) -> _Users:
    index, parts = KeyIndex(), []
    if features and tables.users is None:
        raise ConfigError(f"the query features {', '.join(features)} need a users table; give --users")
    if features and tables.users is not None:
        key, bad = tables.user_column, writer.quarantine.report
        columns = dict.fromkeys([key, *(feature.column for feature in features.values())])
        for batch in read_table(tables.users, list(columns), bad):
            check = RowCheck(batch, bad)
            keys = strings(check, key)
            check.fail(is_empty(keys), f"{key} is empty")
            table, good = canonical(check, features), pa.array(check.good)
            kept, keys = batch.keep(check.good), keys.filter(good)
            _, first = index.add(hash_strings(keys))
            twice = np.ones(len(keys), bool)
            twice[first] = False
            RowCheck(kept, bad).fail(twice, f"{key} {{}} stands in the table already", keys)
            parts.append(table.filter(good).take(pa.array(first)))
            fitting.query.update(parts[-1])
            writer.quarantine.num_good += len(first)
    empty: dict[str, Any] = {"text": "", "categorical": "", "numeric": float("nan")}
    nothing = {name: [[] if feature.multi else empty[feature.type]] for name, feature in features.items()}
    last = pa.table({name: pa.array(nothing[name], parts[0].schema.field(name).type) for name in features})
    return _Users(index, pa.concat_tables([*parts, last]))


def _read_events(
    tables: InteractionTables, catalogue: CatalogueWriter, writer: DatasetWriter, notes: list[str], progress: Progress
) -> _Events:
    asked = (tables.user_column, tables.item_column, tables.time_column, tables.rating_column)
    columns = list(dict.fromkeys(name for name in asked if name))
    index, bad, low = KeyIndex(), writer.quarantine.report, 0
    keys: list[pa.Array] = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("sequence", "item", "time", "relevance")}
    for batch in read_table(tables.interactions, columns, bad):
        check = RowCheck(batch, bad)
        users, items = strings(check, tables.user_column), strings(check, tables.item_column)
        for name, column in ((tables.user_column, users), (tables.item_column, items)):
            check.fail(is_empty(column), f"{name} is empty")
        item = catalogue.find(hash_strings(items))
        check.fail(item < 0, f"{tables.item_column} {{}} is not in {tables.items}", items)
        moment = times(check, tables.time_column) if tables.time_column else np.zeros(len(item))
        relevance = np.ones(len(item))
        if tables.rating_column:
            relevance = relevances(check, tables.rating_column)
        good = check.good
        writer.quarantine.num_good += int(good.sum())
        if tables.min_rating is not None:
            low += int((good & (relevance < tables.min_rating)).sum())
            good = good & (relevance >= tables.min_rating)
        kept = users.filter(pa.array(good))
        sequence, first = index.add(hash_strings(kept))
        keys.append(kept.take(pa.array(first)).cast(pa.string()))
        for name, values in (("sequence", sequence), ("item", item[good]), ("time", moment[good])):
            parts[name].append(values)
        parts["relevance"].append(relevance[good].astype(np.float32))
        progress("interactions", writer.quarantine.num_good, None)
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    if low:
        notes.append(f"{low} interactions are rated below {tables.min_rating} and left out")
    if not len(arrays["item"]):
        raise DataError(f"{tables.interactions}: no interaction is left to train on")
    order = np.lexsort((arrays["time"], arrays["sequence"]))  # stable: ties stay in file order
    offsets = offsets_of(np.bincount(arrays["sequence"], minlength=len(index)))
    return _Events(
        keys=pa.concat_arrays(keys), place=order, offsets=offsets, **{n: values[order] for n, values in arrays.items()}
    )


def _texts(catalogue: CatalogueWriter, users: _Users, schema: Schema) -> Iterator[list[str]]:
    for table in catalogue.new_documents():
        for name in text_columns(schema.doc):
            yield table.column(name).to_pylist()
    for name in text_columns(schema.query):
        yield users.table.column(name).to_pylist()


def _prior_items(writer: DatasetWriter, query_ids: np.ndarray) -> Ragged:
    """Return each sequence's items up to the partitions that are there already: the newest that knows it has all."""
    prior = Ragged(np.empty(0, np.int64), np.zeros(len(query_ids) + 1, np.int64))
    for name in writer.content[PARTITIONS]:
        path = writer.out / PARTITIONS / name / "sequences.arrow"
        if not path.exists():
            raise DataError(f"{path} does not exist: partition {name!r} holds pairs, not interactions")
        table = MappedTable([path])
        known = table.whole("query_id")
        order = np.argsort(known)
        at = order[np.minimum(np.searchsorted(known, query_ids, sorter=order), len(known) - 1)]
        hit = np.flatnonzero(known[at] == query_ids)
        found = table.take("items", at[hit])
        assert isinstance(found, Ragged)
        values = np.concatenate([prior.values, found.values])
        starts, ends = prior.offsets[:-1].copy(), prior.offsets[1:].copy()
        starts[hit] = found.offsets[:-1] + len(prior.values)
        ends[hit] = found.offsets[1:] + len(prior.values)
        prior = gather_ranges(values, starts, ends)
    return prior


def _write_sequences(
    writer: DatasetWriter,
    events: _Events,
    prior: Ragged,
    users: _Users,
    schema: Schema,
    text: TextEncoder | None,
    notes: list[str],
) -> None:
    query_ids = hash_strings(events.keys)
    features = stored(schema.query)
    user = users.index.find(query_ids)
    if features and (unknown := int((user < 0).sum())):
        notes.append(f"{unknown} users are not in the users table: their features are missing")
    table = users.table.take(pa.array(np.where(user < 0, len(users.index), user))) if features else pa.table({})
    own = Ragged(events.item, events.offsets)
    both = np.concatenate([prior.values, own.values])
    starts = np.stack([prior.offsets[:-1], own.offsets[:-1] + len(prior.values)], 1).ravel()
    ends = np.stack([prior.offsets[1:], own.offsets[1:] + len(prior.values)], 1).ravel()
    items = gather_ranges(both, starts, ends)  # prior and own items of each sequence in turn
    columns = {
        "query_key": events.keys,
        "query_id": pa.array(query_ids),
        "items": pa.LargeListArray.from_arrays(pa.array(items.offsets[::2]), pa.array(items.values)),
    }
    columns |= encode_columns(table, features, text, large=True)
    types = {"query_key": pa.string(), "query_id": pa.int64(), "items": pa.large_list(pa.int64())}
    types |= {name: encoded_type(feature, large=True) for name, feature in features.items()}
    file = ColumnFile(writer.partition_dir / "sequences.arrow", pa.schema(list(types.items())), writer.spool)
    file.append(columns)
    file.finish()


def _write_rows(
    tables: InteractionTables,
    target: Target,
    writer: DatasetWriter,
    events: _Events,
    prior: Ragged,
    num_docs: int,
    notes: list[str],
) -> tuple[dict[str, Any], np.ndarray]:
    """Write every split; return their entries and the train positives of each document, int64 [num_docs]."""
    position = np.arange(len(events.item)) - events.offsets[events.sequence]
    end = position + prior.lengths[events.sequence]
    split = np.where(end > 0, _split_of(tables, events, position), -1)  # the first event has no history
    query_ids = hash_strings(events.keys)
    entries = {}
    for number, name in enumerate(SPLITS):
        chosen = np.flatnonzero(split == number)
        if not len(chosen):
            notes.append(f"the split {name} is empty")
            continue
        if name == "train":
            chosen = chosen[np.argsort(mix(events.place[chosen], "shuffle", target.seed))]
        rows = SplitWriter(writer.partition_dir, name, block_rows(len(chosen)))
        rows.write(
            {
                "query_id": pa.array(query_ids[events.sequence[chosen]]),
                "doc": pa.array(events.item[chosen]),
                "relevance": pa.array(events.relevance[chosen]),
                "sequence": pa.array(events.sequence[chosen]),
                "end": pa.array(end[chosen].astype(np.int32)),
            }
        )
        entries[name] = rows.close()
    if "train" not in entries:
        raise DataError(f"{tables.interactions}: no training row is left; every user has too few events")
    positive = (split == 0) & (events.relevance > 0)
    return entries, np.bincount(events.item[positive], minlength=num_docs)


def _split_of(tables: InteractionTables, events: _Events, position: np.ndarray) -> np.ndarray:
    """Return every event's split, a number in SPLITS, int64 [events]."""
    split = np.zeros(len(events.item), np.int64)
    if tables.split == "leave-one-out":
        from_last = np.diff(events.offsets)[events.sequence] - 1 - position
        split[from_last == 1], split[from_last == 0] = 1, 2
    elif tables.split == "time":
        ordered = np.sort(events.time)
        test_from = ordered[min(int(len(ordered) * (1 - tables.test_fraction)), len(ordered) - 1)]
        kept = len(ordered) * (1 - tables.test_fraction - tables.validation_fraction)
        split[events.time >= ordered[min(int(kept), len(ordered) - 1)]] = 1
        split[events.time >= test_from] = 2
    return split
