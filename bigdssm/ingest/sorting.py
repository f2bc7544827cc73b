"""Sorting by jobs instead of SQL: rows are partitioned into buckets, and each bucket is sorted.

Buckets are in sort order; within a bucket, rows are in the order of their table.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from bigdssm.ingest.engines.local import LocalEngine, RowFile, RowTable, ranges

ROWS_PER_BUCKET_JOB = 1 << 20
ROWS_PER_BUCKET = 1 << 21  # approximate; sorted in memory
BUCKETS, SORTED = "rows.arrow", "rows.parquet"
MAX_INT64 = (1 << 63) - 1
_IPC = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)

Assign = Callable[[pa.Table], tuple[pa.Table, np.ndarray]]
"""From rows to (the columns to keep, the bucket number of each row, from 0); picklable."""


def write_buckets(
    engine: LocalEngine,
    step: str,
    table: RowTable,
    assign: Assign,
    num_buckets: int,
    columns: Sequence[str] | None = None,
) -> list[Path]:
    """Partition a table's rows into buckets, for `read_bucket`; `assign` gets the given columns.

    Returns a folder per range of the table, each with a file of one batch per bucket.
    """
    work = partial(_write_buckets, table, columns, assign, num_buckets)
    return engine.map(step, ranges(table, ROWS_PER_BUCKET_JOB), work, rows=table.num_rows)


def _write_buckets(
    table: RowTable, columns: Sequence[str] | None, assign: Assign, num_buckets: int, job: tuple[int, int], folder: Path
) -> None:
    rows, bucket = assign(table.read(*job, columns))
    order = np.argsort(
        bucket.astype(np.min_scalar_type(num_buckets)), kind="stable"
    )  # a radix sort if the type is small
    (batch,) = rows.take(pa.array(order)).combine_chunks().to_batches()
    ends = np.cumsum(np.bincount(bucket, minlength=num_buckets))
    with pa.OSFile(str(folder / BUCKETS), "wb") as sink, pa.ipc.new_file(sink, batch.schema, options=_IPC) as writer:
        for first, end in pairwise([0, *ends.tolist()]):
            writer.write_batch(batch.slice(first, end - first))


def read_bucket(folders: Sequence[Path], bucket: int) -> pa.Table:
    """Read all rows of a bucket."""
    pieces = []
    for folder in folders:
        with pa.memory_map(str(folder / BUCKETS)) as source:
            pieces.append(pa.ipc.open_file(source).get_batch(bucket))
    return pa.Table.from_batches(pieces).combine_chunks()


def float_sort_keys(numbers: np.ndarray) -> np.ndarray:
    """Map float64 to int64 in order, adjacent floats to adjacent integers."""
    bits = (numbers + 0.0).view(np.int64)  # −0.0 becomes 0.0
    return np.where(bits >= 0, bits, bits ^ MAX_INT64)


def sort_key_to_float(key: int) -> float:
    """Invert `float_sort_keys` for one value."""
    return float(np.int64(key if key >= 0 else key ^ MAX_INT64).view(np.float64))


def stable_order(numbers: np.ndarray) -> np.ndarray:
    """Return the stable sorting order of float64 [n], int64.

    By 16-bit radix, twice as fast as np.argsort.
    """
    keys = float_sort_keys(numbers)
    left = (keys - keys.min(initial=0)).view(np.uint64)
    order = np.arange(len(numbers))
    for shift in range(0, 64, 16):
        digit = (left >> np.uint64(shift)).astype(np.uint16)
        if digit.any():
            order = order[np.argsort(digit[order], kind="stable")]
    return order


def shuffled(engine: LocalEngine, name: str, table: RowTable, columns: Sequence[str]) -> RowTable:
    """Return the given columns with rows sorted by `shuffle`, a column of distinct int64 hashes."""
    bits = max(0, int(np.ceil(np.log2(max(1, table.num_rows) / ROWS_PER_BUCKET))))
    buckets = write_buckets(
        engine, f"buckets_{name}", table, partial(_by_first_bits, bits), 1 << bits, [*columns, "shuffle"]
    )
    folders = engine.map(name, range(1 << bits), partial(_sort_by_shuffle, buckets), rows=table.num_rows)
    return RowTable.of(folder / SORTED for folder in folders)


def _by_first_bits(bits: int, rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    hashes = rows.column("shuffle").to_numpy().view(np.uint64) ^ np.uint64(
        1 << 63
    )  # in the order of the signed numbers
    return rows, (hashes >> np.uint64(64 - bits) if bits else np.zeros_like(hashes)).astype(np.int64)


def _sort_by_shuffle(folders: Sequence[Path], bucket: int, folder: Path) -> None:
    rows = read_bucket(folders, bucket)
    order = np.argsort(rows.column("shuffle").to_numpy())
    rows = rows.drop_columns("shuffle")
    with RowFile(folder / SORTED, rows.schema) as file:
        file.add(rows.take(pa.array(order)))
