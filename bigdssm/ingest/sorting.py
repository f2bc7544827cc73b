"""Sorts rows without a query, in two steps of jobs: ranges of rows are dealt out to buckets, and each bucket is sorted.

Buckets follow each other in the order wanted, and a bucket's rows come in the order of their table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import RowFile, RowTable, ranges

ROWS_PER_DEAL = 1 << 20
ROWS_PER_BUCKET = 1 << 21  # about; what is sorted at once
DEALT, SORTED = "rows.arrow", "rows.parquet"
MOST = (1 << 63) - 1
_IPC = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)

Assign = Callable[[pa.Table], tuple[pa.Table, np.ndarray]]
"""Returns what is to be kept of rows, and the bucket of each, whole numbers from 0 on; picklable."""


def deal(
    engine: LocalEngine,
    step: str,
    table: RowTable,
    assign: Assign,
    num_buckets: int,
    columns: Sequence[str] | None = None,
) -> list[Path]:
    """Deal out a table's rows, of which `assign` needs these columns, to so many buckets, for `read_bucket`.

    Returns a folder for each range of the table, which has a file with a batch for each bucket.
    """
    work = partial(_deal, table, columns, assign, num_buckets)
    return engine.map(step, ranges(table, ROWS_PER_DEAL), work, rows=table.num_rows)


def _deal(
    table: RowTable, columns: Sequence[str] | None, assign: Assign, num_buckets: int, job: tuple[int, int], folder: Path
) -> None:
    rows, bucket = assign(table.read(*job, columns))
    order = np.argsort(bucket.astype(np.min_scalar_type(num_buckets)), kind="stable")  # by radix where they are few
    (batch,) = rows.take(pa.array(order)).combine_chunks().to_batches()
    ends = np.cumsum(np.bincount(bucket, minlength=num_buckets))
    with pa.OSFile(str(folder / DEALT), "wb") as sink, pa.ipc.new_file(sink, batch.schema, options=_IPC) as writer:
        for first, end in pairwise([0, *ends.tolist()]):
            writer.write_batch(batch.slice(first, end - first))


def read_bucket(dealt: Sequence[Path], bucket: int) -> pa.Table:
    """Return the rows of a bucket."""
    pieces = []
    for folder in dealt:
        with pa.memory_map(str(folder / DEALT)) as source:
            pieces.append(pa.ipc.open_file(source).get_batch(bucket))
    return pa.Table.from_batches(pieces).combine_chunks()


def ordinals_of(numbers: np.ndarray) -> np.ndarray:
    """Return whole numbers, int64, in the order of float64 ones, neighbours for neighbours."""
    bits = (numbers + 0.0).view(np.int64)  # there is one zero
    return np.where(bits >= 0, bits, bits ^ MOST)


def of_ordinal(ordinal: int) -> float:
    """Return the float64 of this ordinal."""
    return float(np.int64(ordinal if ordinal >= 0 else ordinal ^ MOST).view(np.float64))


def order_of(numbers: np.ndarray) -> np.ndarray:
    """Return the stable order of float64 [n], int64: sorted 16 bits at a time, by radix, twice as fast as at once."""
    ordinals = ordinals_of(numbers)
    left = (ordinals - ordinals.min(initial=0)).view(np.uint64)
    order = np.arange(len(numbers))
    for shift in range(0, 64, 16):
        digit = (left >> np.uint64(shift)).astype(np.uint16)
        if digit.any():
            order = order[np.argsort(digit[order], kind="stable")]
    return order


def shuffled(engine: LocalEngine, name: str, table: RowTable, columns: Sequence[str]) -> RowTable:
    """Return some columns of a table sorted by its `shuffle`, int64 hashes of which no two are equal."""
    bits = max(0, int(np.ceil(np.log2(max(1, table.num_rows) / ROWS_PER_BUCKET))))
    deal_out = partial(_by_first_bits, bits)
    dealt = deal(engine, f"dealt_{name}", table, deal_out, 1 << bits, [*columns, "shuffle"])
    work = partial(_sort_by_shuffle, dealt)
    return RowTable.of(folder / SORTED for folder in engine.map(name, range(1 << bits), work, rows=table.num_rows))


def _by_first_bits(bits: int, rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    hashes = rows.column("shuffle").to_numpy().view(np.uint64) ^ np.uint64(1 << 63)  # that sort as the numbers do
    return rows, (hashes >> np.uint64(64 - bits) if bits else np.zeros_like(hashes)).astype(np.int64)


def _sort_by_shuffle(dealt: Sequence[Path], bucket: int, folder: Path) -> None:
    rows = read_bucket(dealt, bucket)
    order = np.argsort(rows.column("shuffle").to_numpy())
    rows = rows.drop_columns("shuffle")
    with RowFile(folder / SORTED, rows.schema) as file:
        file.add(rows.take(pa.array(order)))
