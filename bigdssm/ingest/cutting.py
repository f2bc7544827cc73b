"""Cutting sorted events into sequences and rows, with one job per range of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.dataset.catalogue import (
    DOCUMENT_COLUMN,
    SINCE_COLUMN,
    CatalogueFile,
    MappedTable,
    Versions,
    distinct_documents,
)
from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.row_keys import shuffle_keys, uniform
from bigdssm.dataset.rows import TIME_COLUMN, VERSION_COLUMN
from bigdssm.features import Feature, TextTokenizer, encode_columns
from bigdssm.features.ragged import Ragged, offsets_of
from bigdssm.ingest.documents import DistinctDocuments, canonical_columns
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import RowFile, RowTable, finished_folder, ranges, read_facts, write_facts
from bigdssm.ingest.existing_events import EarlierEvents
from bigdssm.ingest.job import Ingestion
from bigdssm.ingest.sorting import read_bucket, stable_order, write_buckets
from bigdssm.ingest.splits import SPLITS
from bigdssm.ingest.writing import move_files, write_arrow

ARRAYS = ("times", "begin", "file_row")
SEQUENCES_PER_FILE = 1 << 16
SEQUENCES_AT_ONCE = 1 << 12  # per call of `_rows`: fits a core's cache
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
class ItemVersions:
    """A lookup of versions by item and time; pickled as its files, which workers map."""

    folder: Path
    num_docs: int

    @classmethod
    def of(cls, engine: LocalEngine, known: Sequence[CatalogueFile], documents: DistinctDocuments) -> ItemVersions:
        """Index the versions in existing catalogue files (`known`) and in new `documents`."""
        folder = engine.spool / "item_versions"
        if not folder.exists():
            versions, oldest = _versions(known, documents)
            with finished_folder(folder) as aside:
                np.save(aside / "oldest.npy", oldest)
                for name in ARRAYS:
                    np.save(aside / f"{name}.npy", getattr(versions, name))
        return cls(folder, documents.total)

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def _versions(self) -> Versions:
        return Versions(self.num_docs, *map(self._array, ARRAYS))

    @cached_property
    def _oldest(self) -> np.ndarray:
        return self._array("oldest")

    def find(self, items: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return the version numbers of items at times, int32, see `Versions.version_rows`."""
        if not len(self._versions.begin):
            return np.full(len(items), -1, np.int32)
        file_rows = self._versions.file_rows_at(items.astype(np.int64), times)
        return np.where(file_rows < self.num_docs, -1, file_rows - self.num_docs).astype(np.int32)

    def num_early(self, items: np.ndarray, times: np.ndarray) -> int:
        """Return the number of events older than all versions of their items."""
        return int((times < self._oldest[items]).sum())


def _versions(known: Sequence[CatalogueFile], documents: DistinctDocuments) -> tuple[Versions, np.ndarray]:
    """Return all versions, and the start of every document's oldest, float64 [documents]."""
    assert documents.changed is not None
    rows = documents.changed.read(columns=[DOCUMENT_COLUMN, SINCE_COLUMN])
    document, since = (rows.column(name).to_numpy() for name in (DOCUMENT_COLUMN, SINCE_COLUMN))
    first = documents.table.read(columns=[SINCE_COLUMN]).column(SINCE_COLUMN).to_numpy()
    if known:
        table = MappedTable([file.path for file in known if file.since is None])
        first = np.concatenate([table.column(SINCE_COLUMN), first])
    if earlier := [file.path for file in known if file.since is not None]:
        table = MappedTable(earlier)
        document = np.concatenate([table.column(DOCUMENT_COLUMN), document])
        since = np.concatenate([table.column(SINCE_COLUMN), since])
    versions = Versions.of(documents.total, document, since, first[distinct_documents(document)])
    oldest = first.copy()
    np.minimum.at(oldest, document, since)
    return versions, oldest


@dataclass(frozen=True)
class Events:
    """The concatenated events of a range of sequences; arrays are [events]."""

    item: np.ndarray  # int32: catalogue row
    time: np.ndarray  # float64
    relevance: np.ndarray  # float32
    ordinal: np.ndarray  # int64: source row ordinal
    sequence: np.ndarray  # int32: within this range, from 0
    position: np.ndarray  # int32: within the new events of the sequence
    offsets: np.ndarray  # int64 [sequences + 1]

    @classmethod
    def of(cls, rows: pa.Table, lengths: np.ndarray) -> Events:
        """Group rows of BUCKET, in table order, into the events of sequences with these lengths."""
        by_time = stable_order(rows.column("time").to_numpy())
        order = by_time[np.argsort(rows.column("sequence").to_numpy()[by_time], kind="stable")]
        item, time, relevance, ordinal = (
            rows.column(name).to_numpy()[order] for name in ("item", "time", "relevance", "place")
        )
        offsets = offsets_of(lengths)
        sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position = np.arange(len(item), dtype=np.int32) - offsets.astype(np.int32)[sequence]
        return cls(item, time, relevance, ordinal, sequence, position, offsets)


@dataclass(frozen=True)
class SequenceCutter:
    """Cuts ranges of sequences, in workers."""

    events: RowTable  # in source order
    sequences: RowTable
    keys: SortedKeys  # of the sequences, by user_id
    user: dict[str, Feature]  # features of a sequence's user
    text: TextTokenizer | None
    split: str
    thresholds: tuple[float, float, float]  # start times of validation, test and train after it
    targets_per_row: int
    seed: int
    earlier: EarlierEvents
    has_times: bool
    versions: ItemVersions | None = None  # if items have times

    def __call__(self, buckets: Sequence[Path], job: tuple[int, tuple[int, int]], folder: Path) -> None:
        """Cut a range of sequences, with its bucket of events, into a sequence file and rows."""
        number, (first, last) = job
        sequences = self.sequences.read(first, last)
        events = Events.of(read_bucket(buckets, number), sequences.column("length").to_numpy())
        user_ids = sequences.column("user_id").to_numpy()
        before = self.earlier.take(user_ids, self._event_columns)
        path = folder / f"sequences-{number:06d}.arrow"
        written = write_arrow(path, self._sequence_columns(sequences, user_ids, events, before))
        position = events.position + before["items"].lengths.astype(np.int32)[events.sequence]
        split = np.where(position > 0, self._split_of(events), -1)  # the first event has no history
        bounds = events.offsets[[*range(0, last - first, SEQUENCES_AT_ONCE), last - first]]
        for which, name in enumerate(SPLITS):
            with RowFile(folder / f"{name}.parquet", ROW) as file:
                for begin, end in pairwise(bounds):
                    targets = begin + np.flatnonzero(split[begin:end] == which)
                    file.add(self._rows(which, first, events, position, targets))
        self._write_statistics(folder, written, events, split)

    def _sequence_columns(
        self, sequences: pa.Table, user_ids: np.ndarray, events: Events, before: dict[str, Ragged]
    ) -> dict[str, pa.Array]:
        """Return the columns of sequences: existing events followed by new ones, and user features."""
        lists = {"items": events.item, "relevance": events.relevance}
        if self.has_times:
            lists[TIME_COLUMN] = events.time
        if self.versions is not None:
            lists[VERSION_COLUMN] = self.versions.find(events.item, events.time)
        columns = {
            "query_key": sequences.column("key").combine_chunks().cast(pa.large_string()),
            "query_id": pa.array(user_ids),
        }
        for name, values in lists.items():
            rows = _joined(before[name], Ragged(values, events.offsets))
            columns[name] = pa.LargeListArray.from_arrays(pa.array(rows.offsets), pa.array(rows.values))
        return columns | encode_columns(canonical_columns(sequences, "u", self.user), self.user, self.text, large=True)

    @property
    def _event_columns(self) -> dict[str, type]:
        """The list columns with a value per event, and their types."""
        columns: dict[str, type] = {"items": np.int32, "relevance": np.float32}
        if self.has_times:
            columns[TIME_COLUMN] = np.float64
        if self.versions is not None:
            columns[VERSION_COLUMN] = np.int32
        return columns

    def _split_of(self, events: Events) -> np.ndarray:
        """Return the split of every event, an index into SPLITS, int8 [events]."""
        split = np.zeros(len(events.item), np.int8)
        if self.split == "leave-one-out":
            from_last = np.diff(events.offsets)[events.sequence] - 1 - events.position
            split[from_last == 1], split[from_last == 0] = 1, 2
        elif self.split == "time":
            for number, threshold in zip((1, 2, 0), self.thresholds, strict=True):
                split[events.time >= threshold] = number
        return split

    def _rows(self, split: int, first: int, events: Events, position: np.ndarray, targets: np.ndarray) -> pa.Table:
        """Return the rows of `targets` (ascending event numbers).

        Train rows have several, cut from the newest.
        """
        follows = np.zeros(len(targets), bool)
        follows[1:] = (np.diff(targets) == 1) & (np.diff(events.sequence[targets]) == 0)
        run_starts = np.flatnonzero(~follows)
        run_ends = np.append(run_starts[1:], len(targets))
        from_end = run_ends[np.cumsum(~follows) - 1] - 1 - np.arange(len(targets))
        most = self.targets_per_row if split == 0 else 1
        starts = np.flatnonzero(~follows | (from_end % most == most - 1))
        newest = targets[np.append(starts[1:], len(targets))[: len(starts)] - 1]
        oldest = targets[starts]
        columns = (
            np.full(len(starts), split, np.int32),
            events.sequence[oldest].astype(np.int64) + first,
            position[oldest],
            position[newest] + 1,
            shuffle_keys(events.ordinal[newest], self.seed),
            events.time[oldest],
        )
        return pa.table(list(columns), schema=ROW)

    def _write_statistics(self, folder: Path, written: dict[str, Any], events: Events, split: np.ndarray) -> None:
        """Write train positives, facts and, for the estimate of leakage, times of sampled targets."""
        items = events.item[(split == 0) & (events.relevance > 0)]
        docs, counts = np.unique(items, return_counts=True)
        with RowFile(folder / "positives.parquet", POSITIVE) as file:
            file.add(pa.table([docs, counts], schema=POSITIVE))
        facts: dict[str, Any] = {"made": written}
        if self.versions is not None:
            facts["num_early"] = self.versions.num_early(events.item, events.time)
        if self.split == "leave-one-out":
            sampled = (split >= 0) & (
                uniform(events.ordinal, "leak", 0) < MAX_SAMPLED_TIMES / max(1, self.events.num_rows)
            )
            with RowFile(folder / "times.parquet", TARGET_TIME) as file:
                file.add(pa.table([split[sampled].astype(np.int32), events.time[sampled]], schema=TARGET_TIME))
            facts["counts_events"] = _counts_events(events.time, events.position)
        write_facts(folder, **facts)


def cut_sequences(
    run: Ingestion, cutting: SequenceCutter, *, has_times: bool
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Cut all sequences; create the table `cut_positives` of train positives.

    Returns the folders of the splits' rows, sorted by sequence and position, and {"file", "rows", "checksum"} per
    sequence file.
    """
    engine = run.engine
    jobs = list(enumerate(_ranges(cutting.sequences)))
    assign = partial(_by_range, cutting.keys, np.array([first for _, (first, _) in jobs]))
    buckets = write_buckets(engine, "dealt_events", cutting.events, assign, len(jobs))
    folders = engine.map("cut", jobs, partial(cutting, buckets), rows=cutting.events.num_rows)
    engine.table("cut_positives", [folder / "positives.parquet" for folder in folders])
    if cutting.split == "leave-one-out" and has_times and not all(read_facts(f)["counts_events"] for f in folders):
        times = RowTable.of(folder / "times.parquet" for folder in folders).read()
        split = times.column("split").to_numpy()
        younger = _younger_share(times.column("time").to_numpy(), split == 0, split == 2)
        run.notes.append(
            f"leave-one-out leaks: on average {younger:.1%} of the train targets are newer than a test target; "
            f"with --split time none is"
        )
    return folders, move_files(folders, run.writer.partition_dir)


def _by_range(keys: SortedKeys, firsts: np.ndarray, events: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Assign events to ranges of sequences, given by their first sequences."""
    sequence = keys.find(events.column("user_id").to_numpy())
    file = np.searchsorted(firsts, sequence, "right") - 1
    columns = [events.column(name) for name in ("place", "item", "time", "relevance")]
    return pa.table([*columns, sequence - firsts[file]], names=BUCKET.names).cast(BUCKET), file


def _ranges(sequences: RowTable) -> Iterator[tuple[int, int]]:
    """Yield each file's range of sequences: at most EVENTS_PER_FILE events, or one sequence."""
    for first, last in ranges(sequences, SEQUENCES_PER_FILE):
        ends = np.cumsum(sequences.read(first, last, ["length"]).column("length").to_numpy())
        start, before = 0, 0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, before + EVENTS_PER_FILE, "right")))
            yield first + start, first + stop
            start, before = stop, int(ends[stop - 1])


def _joined(prior: Ragged, new: Ragged) -> Ragged:
    """Concatenate prior and new values per sequence."""
    if not len(prior.values):
        return new
    rows = np.arange(2 * len(new)).reshape(2, -1).T.ravel()
    joined = Ragged.concat([prior, new]).take(rows)
    return Ragged(joined.values, joined.offsets[::2])


def _younger_share(time: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Return the share of newer train targets, averaged over the test targets.

    0 if either is empty. time float64 [events]; train, test bool [events].
    """
    train_times, test_times = np.sort(time[train]), time[test]
    if not len(train_times) or not len(test_times):
        return 0.0
    return float(1 - np.searchsorted(train_times, test_times, side="right").mean() / len(train_times))


def _counts_events(time: np.ndarray, position: np.ndarray) -> bool:
    """Return True if times are just event numbers of each sequence, from 0 or 1.

    time float64 [events], position int64 [events] within the sequence.
    """
    return bool((time == position).all() or (time == position + 1).all())
