"""Makes a dataset of (history → next item) rows from user–item–time events, an items table and a users table.

The items table is streamed, and what was read of the others waits on disk. To be sorted, the events' ids and times
stand in memory (about 60 bytes an event). A run that was killed is taken up where its journals say, see passes.py; only
sorting is done again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig, check_pieces
from bigdssm.dataset.dataset import read_partition
from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.sequences import ROWS_PER_FILE
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import TextTokenizer, encode_columns, stored, texts_of
from bigdssm.features.columns import RowCheck, SourceBatch, check_one_unit, is_empty, relevances, strings, times
from bigdssm.features.fitting import canonical
from bigdssm.features.ragged import Ragged, gather_ranges, offsets_of
from bigdssm.making.catalogue_writer import KEY_COLUMNS, CatalogueWriter, check_names
from bigdssm.making.column_file import ColumnFile
from bigdssm.making.dataset_writer import PARTITIONS, DatasetWriter
from bigdssm.making.journal import State
from bigdssm.making.leak import counts_events, younger_share
from bigdssm.making.making import (
    BLOCK_COLUMNS,
    SEQUENCE_COLUMNS,
    Fitting,
    Report,
    Target,
    commit,
)
from bigdssm.making.passes import Reading, SplitRows, fit, write_splits
from bigdssm.making.row_spool import RowSpool
from bigdssm.progress import Progress, no_progress
from bigdssm.schema import Schema
from bigdssm.string_hashes import hash_strings
from bigdssm.tables.hashing import KeyIndex, shuffle_keys
from bigdssm.tables.pair_splits import check_fractions
from bigdssm.tables.sources import ROWS_PER_BATCH, check_table, read_table

Split = Literal["leave-one-out", "time", "train"]
SPLITS = ("train", "validation", "test")
_EVENT_TYPES = {"items": pa.int32(), "relevance": pa.float32()}
_FIRST_EVENT, _LAST_EVENT = "first event", "last event"  # of a row; not written
EVENT_SCHEMA = pa.schema(
    [("sequence", pa.int64()), ("item", pa.int64()), ("time", pa.float64()), ("relevance", pa.float32())]
)


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
class _Events:
    """Events sorted by sequence, then time, then place in the file."""

    keys: pa.Array  # large_string [sequences]
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
    check_pieces(config)
    check_fractions(tables.validation_fraction, tables.test_fraction)
    if tables.split == "time" and tables.time_column is None:
        raise ConfigError("--split time needs a --time-column")
    if tables.min_rating is not None and (tables.rating_column is None or not np.isfinite(tables.min_rating)):
        raise ConfigError(f"--min-rating {tables.min_rating} needs a finite number, and a --rating-column")
    files = [path for path in (tables.interactions, tables.items, tables.users) if path is not None]
    for path in files:
        check_table(path)
    with target.open(config, files, tables) as writer:
        writer.identify(doc="column", query="column")
        making = _InteractionMaking(config, tables, target, writer, progress)
        if not making.reading.whole:
            making.read()
        writer.quarantine.check()
        events, notes, num_docs = making.events(), making.notes, making.catalogue.num_docs
        schema, text = fit(writer, making.fitting, making.texts)
        prior = _prior_events(writer, hash_strings(events.keys))
        if not writer.written.get("sequences"):
            making.write_sequences(events, prior, schema, text)
            writer.note(sequences=True)
        rows = _rows(tables, target, events, prior, config.targets_per_row, notes)
        splits, counts = write_splits(
            writer, rows, _block_columns, partial(_positives, events), num_docs, notes, progress
        )  # fmt: skip
        return commit(writer, making.catalogue, schema, text, splits, counts, started, notes)


class _InteractionMaking:
    """What reading the tables leads to."""

    def __init__(
        self, config: DataConfig, tables: InteractionTables, target: Target, writer: DatasetWriter, progress: Progress
    ) -> None:
        self.tables, self.writer, self.progress = tables, writer, progress
        self.fitting = Fitting(config, writer, target.like)
        self.doc, self.user = self.fitting.base.doc, stored(self.fitting.base.query)
        self.shown = config.display or tables.item_column
        self.notes: list[str] = []
        if self.user and tables.users is None:
            raise ConfigError(f"the query features {', '.join(self.user)} need a users table; give --users")
        self.reading = Reading(writer, self._state)
        done = self.reading.begun
        begun = done["catalogue"] if done else None
        self.catalogue = CatalogueWriter(writer.spool, self.doc, writer.catalogue_parts, begun)
        self.users, self.sequences, self.num_low = KeyIndex(), KeyIndex(), 0
        if done:
            self.fitting.restore(done["fitting"])
            self.users.restore(done["users"])
            self.sequences.restore(done["sequences"])
            self.num_low = done["num_low"]
        spooled = {
            "users": pa.schema([(name, feature.canonical_type) for name, feature in self.user.items()]),
            "keys": pa.schema([("key", pa.string())]),
            "events": EVENT_SCHEMA,
        }
        self.spools = {
            name: RowSpool(writer.spool / f"{name}.arrows", schema, done["spools"][name] if done else None)
            for name, schema in spooled.items()
        }

    def _state(self) -> State:
        """Return all that the rows so far have led to."""
        return {
            "fitting": self.fitting.state(),
            "catalogue": self.catalogue.state(),
            "users": self.users.state(),
            "sequences": self.sequences.state(),
            "num_low": self.num_low,
            "spools": {name: spool.state() for name, spool in self.spools.items()},
        }

    def read(self) -> None:
        """Pass 1: items, then users, then events are checked, numbered, counted for the fit, and spooled."""
        self._read_items()
        if self.user:
            self._read_users()
        self._read_events()
        self.reading.finish()

    def _batches(self, name: str, path: Path, columns: Iterable[str | None]) -> Iterator[SourceBatch]:
        wanted = list(dict.fromkeys(column for column in columns if column))
        return self.reading.batches(name, lambda report_bad: read_table(path, wanted, report_bad))

    def _read_items(self) -> None:
        key, quarantine, catalogue = self.tables.item_column, self.writer.quarantine, self.catalogue
        columns = [key, self.shown, *(c for feature in self.doc.values() for c in feature.source_columns)]
        for batch in self._batches("items", self.tables.items, columns):
            check = RowCheck(batch, quarantine.report)
            keys, display = strings(check, key), strings(check, self.shown)
            check.fail(is_empty(keys), f"{key} is empty")
            table, good = canonical(check, self.doc), pa.array(check.good)
            kept, keys, table = batch.keep(check.good), keys.filter(good), table.filter(good)
            rows, first = catalogue.add(keys, display.filter(good), table)
            self.fitting.doc.update(table.take(pa.array(first)))
            twice = rows >= catalogue.first_new
            twice[first] = False
            RowCheck(kept, quarantine.report).fail(twice, f"{key} {{}} stands in the table already", keys)
            quarantine.num_good += int((~twice).sum())
            self.progress("items", catalogue.num_docs, None)
        if not catalogue.num_docs:
            raise DataError(f"{self.tables.items} has no usable rows{quarantine.told()}")

    def _read_users(self) -> None:
        assert self.tables.users is not None
        key, quarantine = self.tables.user_column, self.writer.quarantine
        columns = [key, *(c for feature in self.user.values() for c in feature.source_columns)]
        for batch in self._batches("users", self.tables.users, columns):
            check = RowCheck(batch, quarantine.report)
            keys = strings(check, key)
            check.fail(is_empty(keys), f"{key} is empty")
            table, good = canonical(check, self.user), pa.array(check.good)
            kept, keys = batch.keep(check.good), keys.filter(good)
            _, first = self.users.add(hash_strings(keys))
            twice = np.ones(len(keys), bool)
            twice[first] = False
            RowCheck(kept, quarantine.report).fail(twice, f"{key} {{}} stands in the table already", keys)
            new = table.filter(good).take(pa.array(first))
            self.spools["users"].add(new)
            self.fitting.query.update(new)
            quarantine.num_good += len(first)

    def _read_events(self) -> None:
        tables, quarantine = self.tables, self.writer.quarantine
        asked = (tables.user_column, tables.item_column, tables.time_column, tables.rating_column)
        for batch in self._batches("interactions", tables.interactions, asked):
            check = RowCheck(batch, quarantine.report)
            users, items = strings(check, tables.user_column), strings(check, tables.item_column)
            for name, column in ((tables.user_column, users), (tables.item_column, items)):
                check.fail(is_empty(column), f"{name} is empty")
            item = self.catalogue.find(hash_strings(items))
            check.fail(item < 0, f"{tables.item_column} {{}} is not in {tables.items}", items)
            moment = times(check, tables.time_column) if tables.time_column else np.zeros(len(item))
            relevance = np.ones(len(item))
            if tables.rating_column:
                relevance = relevances(check, tables.rating_column)
            good = check.good
            quarantine.num_good += int(good.sum())
            if tables.min_rating is not None:
                self.num_low += int((good & (relevance < tables.min_rating)).sum())
                good = good & (relevance >= tables.min_rating)
            kept = users.filter(pa.array(good))
            sequence, first = self.sequences.add(hash_strings(kept))
            self.spools["keys"].add(pa.table({"key": kept.take(pa.array(first)).cast(pa.string())}))
            columns = (sequence, item[good], moment[good], relevance[good].astype(np.float32))
            self.spools["events"].add(pa.table([pa.array(column) for column in columns], schema=EVENT_SCHEMA))
            self.progress("interactions", quarantine.num_good, None)
        if not self.spools["events"].num_rows:
            low = f"; {self.num_low} are rated below {tables.min_rating}" if self.num_low else ""
            raise DataError(f"{tables.interactions}: no interaction is left to train on{low}{quarantine.told()}")

    def events(self) -> _Events:
        """Return the events sorted; none can be added after this."""
        table = pa.concat_tables(self.spools["events"].tables())
        arrays = {name: table.column(name).to_numpy() for name in EVENT_SCHEMA.names}
        keys = pa.concat_tables(self.spools["keys"].tables()).column("key").cast(pa.large_string()).combine_chunks()
        if self.num_low:
            self.notes.append(f"{self.num_low} interactions are rated below {self.tables.min_rating} and left out")
        if self.user and (unknown := int((self.users.find(hash_strings(keys)) < 0).sum())):
            self.notes.append(f"{unknown} users are not in the users table: their features are missing")
        check_one_unit(arrays["time"], f"{self.tables.interactions}, column {self.tables.time_column!r}")
        order = np.lexsort((arrays["time"], arrays["sequence"]))  # stable: ties stay in file order
        offsets = offsets_of(np.bincount(arrays["sequence"], minlength=len(self.sequences)))
        return _Events(keys, place=order, offsets=offsets, **{name: values[order] for name, values in arrays.items()})

    def texts(self) -> Iterator[list[str]]:
        """Yield the texts of documents and users, for the tokenizer."""
        for table in self.catalogue.new_documents():
            for name in texts_of(self.doc):
                yield table.column(name).to_pylist()
        for table in self.spools["users"].tables():
            for name in texts_of(self.user):
                yield table.column(name).to_pylist()

    def _features_of(self, query_ids: np.ndarray) -> pa.Table:
        """Return the users' canonical features; those of users who are not in their table are missing."""
        spool = self.spools["users"]
        nothing = [pa.array([feature.missing], feature.canonical_type) for feature in self.user.values()]
        table = pa.concat_tables([*spool.tables(), pa.table(nothing, names=list(self.user))])
        user = self.users.find(query_ids)
        return table.take(pa.array(np.where(user < 0, spool.num_rows, user)))

    def write_sequences(
        self, events: _Events, prior: dict[str, Ragged], schema: Schema, text: TextTokenizer | None
    ) -> None:
        """Write every sequence's events, earlier partitions' before its own, and its user's features."""
        query_ids, features = hash_strings(events.keys), stored(schema.query)
        both = {
            "items": _joined(prior["items"], Ragged(events.item.astype(np.int32), events.offsets)),
            "relevance": _joined(prior["relevance"], Ragged(events.relevance, events.offsets)),
        }
        types = {"query_key": pa.string(), "query_id": pa.int64()}
        types |= {name: pa.large_list(_EVENT_TYPES[name]) for name in both}
        types |= {name: feature.arrow_type(large=True) for name, feature in features.items()}
        for number, first in enumerate(range(0, len(events.keys), ROWS_PER_FILE)):
            some = slice(first, first + ROWS_PER_FILE)
            columns = {"query_key": events.keys[some], "query_id": pa.array(query_ids[some])}
            for name, lists in both.items():
                offsets = lists.offsets[first : first + ROWS_PER_FILE + 1]
                values = pa.array(lists.values[offsets[0] : offsets[-1]])
                columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0]), values)
            if features:
                columns |= encode_columns(self._features_of(query_ids[some]), features, text, large=True)
            path = self.writer.partition_dir / f"sequences-{number:06d}.arrow"
            file = ColumnFile(path, pa.schema(list(types.items())), self.writer.spool)
            file.append(columns)
            file.finish()


def _joined(prior: Ragged, own: Ragged) -> Ragged:
    """Return each sequence's prior values and its own behind them."""
    both = np.concatenate([prior.values, own.values])
    starts = np.stack([prior.offsets[:-1], own.offsets[:-1] + len(prior.values)], 1).ravel()
    ends = np.stack([prior.offsets[1:], own.offsets[1:] + len(prior.values)], 1).ravel()
    joined = gather_ranges(both, starts, ends)
    return Ragged(joined.values, joined.offsets[::2])


def _prior_events(writer: DatasetWriter, query_ids: np.ndarray) -> dict[str, Ragged]:
    """Return each sequence's events up to the partitions that are there already: the newest that knows it has all."""
    none = np.zeros(len(query_ids) + 1, np.int64)
    prior = {name: Ragged(np.empty(0, kind.to_pandas_dtype()), none) for name, kind in _EVENT_TYPES.items()}
    for partition in writer.content[PARTITIONS]:
        files = read_partition(writer.out, partition).sequence_files
        if not files:
            raise DataError(f"{writer.out}: partition {partition!r} holds pairs, not interactions")
        table = MappedTable(files)
        known = table.whole("query_id")
        order = np.argsort(known)
        at = order[np.minimum(np.searchsorted(known, query_ids, sorter=order), len(known) - 1)]
        hit = np.flatnonzero(known[at] == query_ids)
        for name, before in prior.items():
            found = table.take(name, at[hit])
            assert isinstance(found, Ragged)
            starts, ends = before.offsets[:-1].copy(), before.offsets[1:].copy()
            starts[hit] = found.offsets[:-1] + len(before.values)
            ends[hit] = found.offsets[1:] + len(before.values)
            prior[name] = gather_ranges(np.concatenate([before.values, found.values]), starts, ends)
    return prior


@dataclass(frozen=True)
class _Pieces:
    """The rows of one split, pieces of the sorted events; see SplitRows. All arrays are [rows]."""

    events: _Events
    place: np.ndarray  # int64 [events]: in the whole sequence
    first: np.ndarray  # int64: the first target, an event
    last: np.ndarray  # int64: the last

    @property
    def num_rows(self) -> int:
        return len(self.first)

    def tables(self) -> Iterator[pa.Table]:
        for start in range(0, len(self.first), ROWS_PER_BATCH):
            first, last = (events[start : start + ROWS_PER_BATCH] for events in (self.first, self.last))
            yield pa.table(
                {
                    "sequence": self.events.sequence[first],
                    "first": self.place[first].astype(np.int32),
                    "end": (self.place[last] + 1).astype(np.int32),
                    _FIRST_EVENT: first,
                    _LAST_EVENT: last,
                }
            )

    def close(self) -> None:
        """Do nothing: no file is open."""

    @classmethod
    def of(cls, events: _Events, place: np.ndarray, targets: np.ndarray, targets_per_row: int) -> _Pieces:
        """Return the rows of `targets` (events, ascending), cut from each sequence's newest on."""
        follows = np.zeros(len(targets), bool)
        follows[1:] = (np.diff(targets) == 1) & (np.diff(events.sequence[targets]) == 0)
        run_starts = np.flatnonzero(~follows)
        run = np.cumsum(~follows) - 1
        run_ends = np.append(run_starts[1:], len(targets))
        from_end = run_ends[run] - 1 - np.arange(len(targets)) if len(targets) else np.empty(0, np.int64)
        begins = ~follows | (from_end % targets_per_row == targets_per_row - 1)
        starts = np.flatnonzero(begins)
        last = np.append(starts[1:], len(targets))[: len(starts)] - 1
        return cls(events, place, targets[starts], targets[last])

    def shuffled(self, seed: int) -> _Pieces:
        """Return the rows in the order of a hash of their last event's place in the table."""
        order = np.argsort(shuffle_keys(self.events.place[self.last], seed))
        return replace(self, first=self.first[order], last=self.last[order])


def _block_columns(table: pa.Table) -> dict[str, pa.Array]:
    return {name: table.column(name).combine_chunks() for name in ("sequence", "first", "end")}


def _positives(events: _Events, table: pa.Table) -> np.ndarray:
    first, last = (table.column(name).to_numpy() for name in (_FIRST_EVENT, _LAST_EVENT))
    items, relevance = (gather_ranges(values, first, last + 1).values for values in (events.item, events.relevance))
    positives: np.ndarray = items[relevance > 0]
    return positives


def _rows(
    tables: InteractionTables,
    target: Target,
    events: _Events,
    prior: dict[str, Ragged],
    targets_per_row: int,
    notes: list[str],
) -> dict[str, SplitRows]:
    """Return every split's rows, those of train shuffled; elsewhere a row has one target.

    Raises DataError where train has none.
    """
    position = np.arange(len(events.item)) - events.offsets[events.sequence]
    place = position + prior["items"].lengths[events.sequence]
    split = np.where(place > 0, _split_of(tables, events, position), -1)  # the first event has no history
    if tables.split == "leave-one-out" and tables.time_column and not counts_events(events.time, position):
        younger = younger_share(events.time, split == 0, split == 2)
        notes.append(
            f"leave-one-out leaks: on average {younger:.1%} of the train targets are younger than a test target; "
            f"with --split time none is"
        )
    rows: dict[str, SplitRows] = {}
    for number, name in enumerate(SPLITS):
        targets = np.flatnonzero(split == number)
        if name == "train":
            if not len(targets):
                raise DataError(f"{tables.interactions}: no training row is left; every user has too few events")
            rows[name] = _Pieces.of(events, place, targets, targets_per_row).shuffled(target.seed)
        else:
            rows[name] = _Pieces.of(events, place, targets, 1)
    return rows


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
