"""Arrow IPC files (.arrow, .feather), in the file and in the stream format. A chunk is a record batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import pyarrow as pa

from bigdssm.errors import DataError
from bigdssm.tables.batches import BYTES_PER_BATCH, ROWS_PER_BATCH
from bigdssm.tables.chunked import ChunkedPart, ChunkedSource, named_columns
from bigdssm.tables.files import RemoteFile, TableFile

ARROW_SUFFIXES = (".arrow", ".feather")
FILE_MAGIC = b"ARROW1"


class ArrowSource(ChunkedSource):
    """Arrow IPC files, read by record batches; in a stream those before a part's are passed over."""

    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return how many rows each record batch has. Raises DataError: a stream at a URL."""
        with file.open_arrow(mapped=True) as opened:
            if isinstance(file, RemoteFile) and not _has_index(opened):
                raise DataError(
                    f"{file.name} is an Arrow stream, which has no index for reading by ranges; write an Arrow file "
                    f"(pyarrow.ipc.new_file), or copy it to a disk"
                )
            return [batch.num_rows for batch in _batches(opened, [0])]

    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of a part's record batches, small ones together, large ones cut."""
        with part.file.open_arrow(mapped=True) as opened:
            found = _schema(opened).names
            names = named_columns(part.file, found, columns)
            fields = sorted({found.index(name) for name in names})
            batches = _batches(opened, fields, part.chunks.start, part.chunks.stop)
            for table in _even(map(_sound, batches)):
                yield table.select(names)


def _has_index(opened: pa.NativeFile) -> bool:
    magic = opened.read_at(len(FILE_MAGIC), 0)
    opened.seek(0)
    return bool(magic == FILE_MAGIC)


def _schema(opened: pa.NativeFile) -> pa.Schema:
    return (pa.ipc.open_file if _has_index(opened) else pa.ipc.open_stream)(opened).schema


def _batches(
    opened: pa.NativeFile, fields: list[int], first: int = 0, end: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the record batches [first, end), all by default, with these fields alone."""
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    if _has_index(opened):
        reader = pa.ipc.open_file(opened, options=options)
        yield from map(reader.get_batch, range(reader.num_record_batches)[first:end])
    else:
        yield from islice(pa.ipc.open_stream(opened, options=options), first, end)


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch, its strings as bytes. Raises ArrowInvalid: its content would lead outside it, if trusted."""
    plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    columns = [column.view(plain[column.type]) if column.type in plain else column for column in batch.columns]
    batch = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    batch.validate(full=True)
    return batch


def _even(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the rows in tables of about ROWS_PER_BATCH rows, or BYTES_PER_BATCH bytes where that is less."""
    taken: list[pa.RecordBatch] = []
    num_rows, num_bytes = 0, 0
    for batch in batches:
        step = min(ROWS_PER_BATCH, max(1, batch.num_rows * BYTES_PER_BATCH // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, step):
            taken.append(batch.slice(start, step))
            num_rows, num_bytes = num_rows + taken[-1].num_rows, num_bytes + taken[-1].nbytes
            if num_rows >= ROWS_PER_BATCH or num_bytes >= BYTES_PER_BATCH:
                yield pa.Table.from_batches(taken)
                taken, num_rows, num_bytes = [], 0, 0
    if taken:
        yield pa.Table.from_batches(taken)
