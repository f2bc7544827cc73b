"""Rows waiting on disk between two passes: in source order, or in buckets which, sorted one by one, are a shuffle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bigdssm.making.column_file import opened
from bigdssm.tables.batches import ROWS_PER_BATCH
from bigdssm.tables.files import split_suffix

KEY = "shuffle_key"
BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 512  # open files
COMPRESSION_RATIO = 6  # of text, about
_IPC = pa.ipc.IpcWriteOptions(compression="lz4")


def num_buckets(files: Sequence[Path]) -> int:
    """Return how many buckets hold the rows of `files` at about 64 MB each, a power of two."""
    plain = (path.stat().st_size * (1 if split_suffix(path) in _PLAIN else COMPRESSION_RATIO) for path in files)
    wanted = max(1, sum(plain) // BUCKET_BYTES)
    return int(min(MAX_BUCKETS, 1 << (wanted - 1).bit_length()))


_PLAIN = [(suffix, None) for suffix in (".csv", ".tsv", ".tab", ".inter", ".item", ".user", ".jsonl", ".ndjson")]


class RowSpool:
    """Rows in the order in which they came."""

    def __init__(self, path: Path, schema: pa.Schema, state: list[int] | None = None) -> None:
        """Begin a new file, or go on with the one of `state`, which another spool's `state` returned."""
        self.path, self._schema = path, schema
        self.num_rows, size = state or (0, 0)
        self._file = opened(path, size)
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self.num_rows += table.num_rows
        if self._stream is None:
            self._stream = pa.ipc.new_stream(self._file, self._schema, options=_IPC)
        self._stream.write_table(table)

    def state(self) -> list[int]:
        """Return what the constructor takes to go on from here; the file up to here will not change any more."""
        self._end_stream()
        self._file.flush()
        return [self.num_rows, self._file.tell()]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows in pieces; none can be added after this."""
        self.close()
        with pa.OSFile(str(self.path)) as file:
            while file.tell() < file.size():  # one stream behind the other
                yield from pa.ipc.open_stream(file)

    def tables(self) -> Iterator[pa.Table]:
        """Yield what `batches` does as tables."""
        return (pa.Table.from_batches([batch]) for batch in self.batches())

    def close(self) -> None:
        """Close the file."""
        self._end_stream()
        self._file.close()

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class ShuffleSpool:
    """Rows to be sorted by a uint64 key: the key's upper bits choose the bucket, so memory holds one bucket.

    The order that comes back is that of the keys, whatever the number of buckets.
    """

    def __init__(self, folder: Path, schema: pa.Schema, buckets: int, state: list[list[int]] | None = None) -> None:
        self._shift = np.uint64(64 - (buckets.bit_length() - 1))
        keyed = schema.append(pa.field(KEY, pa.uint64()))
        self._buckets = [
            RowSpool(folder / f"bucket-{i:03d}.arrows", keyed, state[i] if state else None) for i in range(buckets)
        ]

    @property
    def num_rows(self) -> int:
        """Return the rows added."""
        return sum(bucket.num_rows for bucket in self._buckets)

    def state(self) -> list[list[int]]:
        """Return what the constructor takes to go on from here."""
        return [bucket.state() for bucket in self._buckets]

    def add(self, table: pa.Table, keys: np.ndarray) -> None:
        """Append rows with their keys (uint64)."""
        if not len(keys):
            return
        bucket = (keys >> self._shift).astype(np.int64) if len(self._buckets) > 1 else np.zeros(len(keys), np.int64)
        order = np.argsort(bucket, kind="stable")
        sorted_table = table.append_column(KEY, pa.array(keys)).take(pa.array(order))
        found, starts = np.unique(bucket[order], return_index=True)
        ends = [*starts[1:].tolist(), len(order)]
        for number, start, end in zip(found.tolist(), starts.tolist(), ends, strict=True):
            self._buckets[number].add(sorted_table.slice(start, end - start))

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows sorted by key, in pieces; none can be added after this."""
        for bucket in self._buckets:
            pieces = list(bucket.tables())
            if not pieces:
                continue
            whole = pa.concat_tables(pieces)
            order = np.argsort(whole.column(KEY).to_numpy(), kind="stable")
            whole = whole.drop_columns([KEY])
            for start in range(0, len(order), ROWS_PER_BATCH):
                yield whole.take(pa.array(order[start : start + ROWS_PER_BATCH]))
            del whole, pieces, order  # before the next bucket is read, not after: memory holds one

    def unordered(self) -> Iterator[pa.Table]:
        """Yield the rows bucket by bucket, unsorted within; each bucket is a random sample of all rows."""
        for bucket in self._buckets:
            for table in bucket.tables():
                yield table.drop_columns([KEY])

    def close(self) -> None:
        """Close the files."""
        for bucket in self._buckets:
            bucket.close()
