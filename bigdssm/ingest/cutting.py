"""Cutting of events into sequences, and of sequences into rows: one job per range of sequences.

A job reads the events of its range from a bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from bigdssm.features import Feature, TextTokenizer, encode_columns, ragged
from bigdssm.features.ragged import Ragged, offsets_of
from bigdssm.ingest.documents import DistinctDocuments, canonical_columns, spool_columns
from bigdssm.ingest.engines import (
    LocalEngine,
    RowFile,
    RowTable,
    finished_folder,
    ranges,
    read_bucket,
    read_facts,
    stable_order,
    write_buckets,
    write_facts,
)
from bigdssm.ingest.job import Ingestion, move_files, write_arrow

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


@dataclass(frozen=True)
class CutPlan:
    """How sequences are cut into files and rows."""

    user: dict[str, Feature]  # features of a sequence's user
    event: dict[str, Feature]  # features of an event
    text: TextTokenizer | None
    earlier: EarlierEvents
    versions: ItemVersions | None  # if items have times
    has_times: bool
    split_kind: str
    thresholds: tuple[float, float, float]  # start times of validation, test and train after it, of a split by time
    targets_per_row: int
    min_history: int  # least number of events before a target
    seed: int


def _cut_range(
    plan: CutPlan, buckets: Sequence[Path], sequences: RowTable, num_events: int, job: tuple[int, tuple[int, int]],
    folder: Path,
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
    if plan.has_times:
        lists[TIME_COLUMN] = time
    facts: dict[str, Any] = {}
    if plan.versions is not None:
        lists[VERSION_COLUMN], facts["num_early"] = plan.versions.find(item, time)
    encoded = encode_columns(canonical_columns(bucket, "e", plan.event), plan.event, None, large=True)
    lists |= {EVENT_PREFIX + name: np.asarray(column)[order] for name, column in encoded.items()}
    before = plan.earlier.take(user_ids, {name: values.dtype.type for name, values in lists.items()})
    columns = {
        "query_key": rows_of_users.column("key").combine_chunks().cast(pa.large_string()),
        "query_id": pa.array(user_ids),
    }
    for name, values in lists.items():
        rows = Ragged(values, offsets)
        if len(before[name].values):
            rows = ragged.joined(before[name], rows)
        columns[name] = pa.LargeListArray.from_arrays(pa.array(rows.offsets), pa.array(rows.values))
    columns |= encode_columns(canonical_columns(rows_of_users, "u", plan.user), plan.user, plan.text, large=True)
    facts["made"] = write_arrow(folder / f"sequences-{number:06d}.arrow", columns)
    # the split of every event, an index into SPLITS; −1: too few events before it
    split = np.zeros(len(item), np.int8)
    if plan.split_kind == "leave-one-out":
        from_last = lengths[sequence] - 1 - new_position
        split[from_last == 1], split[from_last == 0] = 1, 2
    elif plan.split_kind == "time":
        for which, threshold in zip((1, 2, 0), plan.thresholds, strict=True):
            split[time >= threshold] = which
    position = new_position + before["items"].lengths.astype(np.int32)[sequence]
    split = np.where(position >= plan.min_history, split, -1)
    # rows of at most targets_per_row consecutive targets of a sequence, cut from the newest
    bounds = offsets[[*range(0, last - first, SEQUENCES_AT_ONCE), last - first]]
    for which, name in enumerate(SPLITS):
        most = plan.targets_per_row if which == 0 else 1
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
                    shuffle_keys(ordinal[newest], plan.seed),
                    time[oldest],
                ]
                file.add(pa.table(columns_of_rows, schema=ROW))
    # train positives, facts and, for the estimate of leakage, times of sampled targets
    docs, counts = np.unique(item[(split == 0) & (relevance > 0)], return_counts=True)
    with RowFile(folder / "positives.parquet", POSITIVE) as file:
        file.add(pa.table([docs, counts], schema=POSITIVE))
    if plan.split_kind == "leave-one-out":
        sampled = (split >= 0) & (uniform(ordinal, "leak", 0) < MAX_SAMPLED_TIMES / max(1, num_events))
        with RowFile(folder / "times.parquet", TARGET_TIME) as file:
            file.add(pa.table([split[sampled].astype(np.int32), time[sampled]], schema=TARGET_TIME))
        # whether times are just event numbers of each sequence, from 0 or 1
        facts["counts_events"] = bool((time == new_position).all() or (time == new_position + 1).all())
    write_facts(folder, **facts)


def cut_sequences(
    run: Ingestion, events: RowTable, sequences: RowTable, keys: SortedKeys, plan: CutPlan
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Cut all sequences; create the table `cut_positives` of train positives.

    `events` are in the order of their table; `keys` finds sequences by user_id. Returns the folders of the splits'
    rows, sorted by sequence and position, and {"file", "rows", "checksum"} per sequence file.
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
    assign = partial(_by_range, keys, np.array([first for _, (first, _) in jobs]), spool_columns("e", plan.event))
    buckets = write_buckets(engine, "event_buckets", events, assign, len(jobs))
    work = partial(_cut_range, plan, buckets, sequences, events.num_rows)
    folders = engine.map("cut", jobs, work, rows=events.num_rows)
    engine.table("cut_positives", [folder / "positives.parquet" for folder in folders])
    may_leak = plan.split_kind == "leave-one-out" and plan.has_times
    if may_leak and not all(read_facts(folder)["counts_events"] for folder in folders):
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
