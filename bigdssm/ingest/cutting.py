"""Cut sorted events into sequences and their rows, one worker per range of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.sequences import TIME_COLUMN, VERSION_COLUMN
from bigdssm.dataset.versions import DOCUMENT_COLUMN, SINCE_COLUMN, CatalogueFile, Versions, distinct_documents
from bigdssm.features import Feature, TextTokenizer, encode_columns
from bigdssm.features.ragged import Ragged, offsets_of
from bigdssm.ingest.documents import DistinctDocuments, canonical_of
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import RowFile, RowTable, finished_folder, ranges, read_facts, write_facts
from bigdssm.ingest.existing_events import EarlierEvents
from bigdssm.ingest.job import Ingestion
from bigdssm.ingest.row_keys import shuffle_keys, uniform
from bigdssm.ingest.sorting import deal, order_of, read_bucket
from bigdssm.ingest.splits import SPLITS
from bigdssm.ingest.writing import placed_files, write_arrow

ARRAYS = ("times", "begin", "at")


@dataclass(frozen=True)
class ItemVersions:
    """Finds versions by item and time; picklable as its files, which workers map."""

    folder: Path
    num_docs: int

    @classmethod
    def of(cls, engine: LocalEngine, known: Sequence[CatalogueFile], documents: DistinctDocuments) -> ItemVersions:
        """Return those of the dataset that grows, of which `known` are the catalogue's files, and of `documents`."""
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
        """Return which version of each item held at a time, int32, as `Versions.version_rows` takes them."""
        if not len(self._versions.begin):
            return np.full(len(items), -1, np.int32)
        place = self._versions.file_rows_at(items.astype(np.int64), times)
        return np.where(place < self.num_docs, -1, place - self.num_docs).astype(np.int32)

    def num_early(self, items: np.ndarray, times: np.ndarray) -> int:
        """Return how many events are older than all versions of their items."""
        return int((times < self._oldest[items]).sum())


def _versions(known: Sequence[CatalogueFile], documents: DistinctDocuments) -> tuple[Versions, np.ndarray]:
    """Return all versions, and from when on the oldest of each document holds, float64 [documents]."""
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


SEQUENCES_PER_FILE = 1 << 16
SEQUENCES_AT_ONCE = 1 << 12  # whose rows are cut: what a core's cache holds
EVENTS_PER_FILE = 1 << 22  # at most, which is what memory holds
MOST_TIMES = 1 << 21  # of targets, which are compared to tell the leak
ROW = pa.schema(
    [
        ("split", pa.int32()),
        ("sequence", pa.int64()),
        ("first", pa.int32()),
        ("end_", pa.int32()),  # `end` is a word of SQL
        ("shuffle", pa.int64()),  # a hash of the last event's place
        ("time", pa.float64()),  # of the first target
    ]
)
DEALT = pa.schema(
    [
        ("place", pa.int64()),
        ("item", pa.int32()),
        ("time", pa.float64()),
        ("relevance", pa.float32()),
        ("sequence", pa.uint16()),  # in its file, which has at most SEQUENCES_PER_FILE
    ]
)
POSITIVE = pa.schema([("doc", pa.int64()), ("count", pa.int64())])
TARGET_TIME = pa.schema([("split", pa.int32()), ("time", pa.float64())])


@dataclass(frozen=True)
class Events:
    """The events of some sequences, one behind the other; arrays are [events]."""

    item: np.ndarray  # int32: catalogue row
    time: np.ndarray  # float64
    relevance: np.ndarray  # float32
    place: np.ndarray  # int64: in their table
    sequence: np.ndarray  # int32: from 0 on in this range
    position: np.ndarray  # int32: in the sequence, among these
    offsets: np.ndarray  # int64 [sequences + 1]

    @classmethod
    def of(cls, rows: pa.Table, lengths: np.ndarray) -> Events:
        """Return rows of DEALT, in the order of their table, as the events of sequences with these lengths."""
        by_time = order_of(rows.column("time").to_numpy())
        order = by_time[np.argsort(rows.column("sequence").to_numpy()[by_time], kind="stable")]
        item, time, relevance, place = (
            rows.column(name).to_numpy()[order] for name in ("item", "time", "relevance", "place")
        )
        offsets = offsets_of(lengths)
        sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position = np.arange(len(item), dtype=np.int32) - offsets.astype(np.int32)[sequence]
        return cls(item, time, relevance, place, sequence, position, offsets)


@dataclass(frozen=True)
class SequenceCutter:
    """What a worker needs to cut a range of sequences."""

    events: RowTable  # in the order of their source
    sequences: RowTable
    keys: SortedKeys  # of the sequences, by user_id
    user: dict[str, Feature]  # features of a sequence's user
    text: TextTokenizer | None
    split: str
    thresholds: tuple[float, float, float]  # the times from which on events are of validation, test and train again
    targets_per_row: int
    seed: int
    earlier: EarlierEvents
    has_times: bool
    versions: ItemVersions | None = None  # of items with times

    def __call__(self, dealt: Sequence[Path], job: tuple[int, tuple[int, int]], folder: Path) -> None:
        """Cut a range of sequences, whose events are the bucket of its number, into a file of sequences, and rows."""
        number, (first, last) = job
        own = self.sequences.read(first, last)
        events = Events.of(read_bucket(dealt, number), own.column("length").to_numpy())
        user_ids = own.column("user_id").to_numpy()
        before = self.earlier.take(user_ids, self._event_columns)
        path = folder / f"sequences-{number:06d}.arrow"
        made = write_arrow(path, self._sequence_columns(own, user_ids, events, before))
        place = events.position + before["items"].lengths.astype(np.int32)[events.sequence]
        split = np.where(place > 0, self._split_of(events), -1)  # the first event has no history
        bounds = events.offsets[[*range(0, last - first, SEQUENCES_AT_ONCE), last - first]]
        for which, name in enumerate(SPLITS):
            with RowFile(folder / f"{name}.parquet", ROW) as file:
                for begin, end in pairwise(bounds):
                    targets = begin + np.flatnonzero(split[begin:end] == which)
                    file.add(self._rows(which, first, events, place, targets))
        self._note(folder, made, events, split)

    def _sequence_columns(
        self, own: pa.Table, user_ids: np.ndarray, events: Events, before: dict[str, Ragged]
    ) -> dict[str, pa.Array]:
        """Return every sequence's events, earlier partitions' before its own, and its user's features."""
        lists = {"items": events.item, "relevance": events.relevance}
        if self.has_times:
            lists[TIME_COLUMN] = events.time
        if self.versions is not None:
            lists[VERSION_COLUMN] = self.versions.find(events.item, events.time)
        columns = {
            "query_key": own.column("key").combine_chunks().cast(pa.large_string()),
            "query_id": pa.array(user_ids),
        }
        for name, values in lists.items():
            rows = _joined(before[name], Ragged(values, events.offsets))
            columns[name] = pa.LargeListArray.from_arrays(pa.array(rows.offsets), pa.array(rows.values))
        return columns | encode_columns(canonical_of(own, "u", self.user), self.user, self.text, large=True)

    @property
    def _event_columns(self) -> dict[str, type]:
        """Return the columns of sequences that have a value per event, with their types."""
        columns: dict[str, type] = {"items": np.int32, "relevance": np.float32}
        if self.has_times:
            columns[TIME_COLUMN] = np.float64
        if self.versions is not None:
            columns[VERSION_COLUMN] = np.int32
        return columns

    def _split_of(self, events: Events) -> np.ndarray:
        """Return every event's split, a number in SPLITS, int8 [events]."""
        split = np.zeros(len(events.item), np.int8)
        if self.split == "leave-one-out":
            from_last = np.diff(events.offsets)[events.sequence] - 1 - events.position
            split[from_last == 1], split[from_last == 0] = 1, 2
        elif self.split == "time":
            for number, threshold in zip((1, 2, 0), self.thresholds, strict=True):
                split[events.time >= threshold] = number
        return split

    def _rows(self, split: int, first: int, events: Events, place: np.ndarray, targets: np.ndarray) -> pa.Table:
        """Return the rows of `targets` (events, ascending); one of train has several, cut from the newest on."""
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
            place[oldest],
            place[newest] + 1,
            shuffle_keys(events.place[newest], self.seed),
            events.time[oldest],
        )
        return pa.table(list(columns), schema=ROW)

    def _note(self, folder: Path, made: dict[str, Any], events: Events, split: np.ndarray) -> None:
        """Leave the documents' train positives and, for what may leak, times of targets, and facts."""
        items = events.item[(split == 0) & (events.relevance > 0)]
        docs, counts = np.unique(items, return_counts=True)
        with RowFile(folder / "positives.parquet", POSITIVE) as file:
            file.add(pa.table([docs, counts], schema=POSITIVE))
        facts: dict[str, Any] = {"made": made}
        if self.versions is not None:
            facts["num_early"] = self.versions.num_early(events.item, events.time)
        if self.split == "leave-one-out":
            sampled = (split >= 0) & (uniform(events.place, "leak", 0) < MOST_TIMES / max(1, self.events.num_rows))
            with RowFile(folder / "times.parquet", TARGET_TIME) as file:
                file.add(pa.table([split[sampled].astype(np.int32), events.time[sampled]], schema=TARGET_TIME))
            facts["counts_events"] = _counts_events(events.time, events.position)
        write_facts(folder, **facts)


def cut_sequences(
    run: Ingestion, cutting: SequenceCutter, *, has_times: bool
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Cut all sequences; the engine knows train positives as `cut_positives`.

    Returns the folders where the rows of each split are, sorted by sequence and place, and {"file", "rows", "checksum"}
    of each sequence file.
    """
    engine = run.engine
    jobs = list(enumerate(_ranges(cutting.sequences)))
    deal_out = partial(_by_range, cutting.keys, np.array([first for _, (first, _) in jobs]))
    dealt = deal(engine, "dealt_events", cutting.events, deal_out, len(jobs))
    folders = engine.map("cut", jobs, partial(cutting, dealt), rows=cutting.events.num_rows)
    engine.table("cut_positives", [folder / "positives.parquet" for folder in folders])
    if cutting.split == "leave-one-out" and has_times and not all(read_facts(f)["counts_events"] for f in folders):
        times = RowTable.of(folder / "times.parquet" for folder in folders).read()
        split = times.column("split").to_numpy()
        younger = _younger_share(times.column("time").to_numpy(), split == 0, split == 2)
        run.notes.append(
            f"leave-one-out leaks: on average {younger:.1%} of the train targets are younger than a test target; "
            f"with --split time none is"
        )
    return folders, placed_files(folders, run.writer.partition_dir)


def _by_range(keys: SortedKeys, firsts: np.ndarray, events: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Assign events to ranges of sequences, of which the first ones are given."""
    sequence = keys.find(events.column("user_id").to_numpy())
    file = np.searchsorted(firsts, sequence, "right") - 1
    columns = [events.column(name) for name in ("place", "item", "time", "relevance")]
    return pa.table([*columns, sequence - firsts[file]], names=DEALT.names).cast(DEALT), file


def _ranges(sequences: RowTable) -> Iterator[tuple[int, int]]:
    """Yield the range of sequences of each file.

    A file ends before its events are more than EVENTS_PER_FILE, with one sequence at least.
    """
    for first, last in ranges(sequences, SEQUENCES_PER_FILE):
        ends = np.cumsum(sequences.read(first, last, ["length"]).column("length").to_numpy())
        start, before = 0, 0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, before + EVENTS_PER_FILE, "right")))
            yield first + start, first + stop
            start, before = stop, int(ends[stop - 1])


def _joined(prior: Ragged, own: Ragged) -> Ragged:
    """Return each sequence's prior values and its own behind them."""
    if not len(prior.values):
        return own
    rows = np.arange(2 * len(own)).reshape(2, -1).T.ravel()
    joined = Ragged.concat([prior, own]).take(rows)
    return Ragged(joined.values, joined.offsets[::2])


def _younger_share(time: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Return the mean over the test targets of the share of train targets that are younger; 0 without either.

    time float64 [events]; train, test bool [events].
    """
    known, asked = np.sort(time[train]), time[test]
    if not len(known) or not len(asked):
        return 0.0
    return float(1 - np.searchsorted(known, asked, side="right").mean() / len(known))


def _counts_events(time: np.ndarray, position: np.ndarray) -> bool:
    """Return whether times are no moments but number each sequence's events, from 0 or 1 on.

    time float64 [events], position int64 [events] in their sequence.
    """
    return bool((time == position).all() or (time == position + 1).all())
