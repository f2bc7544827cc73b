"""Tables in chunks of known sizes: Parquet, Arrow IPC, saved Hugging Face datasets."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.sources.base import (
    BYTES_PER_BATCH,
    READING_ERRORS,
    ROWS_PER_BATCH,
    FileSource,
    Part,
    TableFile,
    as_utf8,
    reading_error,
    register_source,
)
from bigdssm.sources.text import column_names, require_columns

ROWS_PER_PART = 1_000_000  # at most, unless a single chunk has more
PARQUET_SUFFIX = ".parquet"
FILE_MAGIC = b"ARROW1"
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
BYTES_OF = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
STATE_FILE, INFO_FILE, SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class ChunkedPart(Part):
    """A range of chunks of a file."""

    file: TableFile
    chunks: range


class ChunkedSource(FileSource):
    """A source whose files have chunks, such as Parquet row groups."""

    @abstractmethod
    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return the number of rows per chunk of a file."""

    @abstractmethod
    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of a part in order, in batches, with the columns of `stored_names`."""

    def split(self) -> Sequence[Part]:
        """Return runs of chunks with at most ROWS_PER_PART rows in total, or a single chunk.

        Raises DataError: a file is damaged.
        """
        parts: list[ChunkedPart] = []
        first_row = 1
        for file in self.files:
            try:
                rows = self.chunk_rows(file)
            except READING_ERRORS as error:
                raise reading_error(error, file.name, 0) from None
            starts, rows_of_run = [0], 0
            for chunk, count in enumerate(rows):
                if rows_of_run and rows_of_run + count > ROWS_PER_PART:
                    starts.append(chunk)
                    rows_of_run = 0
                rows_of_run += count
            for start, end in pairwise([*starts, len(rows)]):
                if num_rows := sum(rows[start:end]):
                    parts.append(ChunkedPart(len(parts), first_row, num_rows, file, range(start, end)))
                    first_row += num_rows
        return parts or [ChunkedPart(0, 1, 0, self.files[0], range(0))]

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the rows of a part."""
        assert isinstance(part, ChunkedPart)
        first_row = part.first_row
        for table in self.chunk_tables(part, columns):
            rows = np.arange(first_row, first_row + table.num_rows, dtype=np.int64)
            first_row += table.num_rows
            yield as_utf8(SourceBatch(self.name, table.rename_columns(list(columns)), rows), report_bad)


def stored_names(file: TableFile, stored: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the names of `columns` as stored in the file.

    Raises DataError: a missing or duplicate column.
    """
    names = dict(zip(column_names(file.name, stored), stored, strict=True))
    require_columns(file.name, names, columns)
    return [names[name] for name in columns]


@register_source
class ParquetSource(ChunkedSource):
    """Parquet files, read by row groups."""

    suffixes: ClassVar[tuple[str, ...]] = (PARQUET_SUFFIX,)

    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return the number of rows per row group."""
        with file.open_arrow() as opened, pq.ParquetFile(opened) as parquet:
            return [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]

    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of a part's row groups."""
        with part.file.open_arrow() as opened, pq.ParquetFile(opened) as parquet:
            names = stored_names(part.file, parquet.schema_arrow.names, columns)
            for batch in parquet.iter_batches(ROWS_PER_BATCH, list(part.chunks), list(dict.fromkeys(names))):
                yield pa.Table.from_batches([batch]).select(names)


@register_source
class ArrowSource(ChunkedSource):
    """Arrow IPC files or streams, read by record batches.

    A stream has no index: reading a part decodes and discards the batches before it.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather")

    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return the number of rows per record batch. Raises DataError: a stream at a URL, or one without its end."""
        with file.open_arrow(mapped=True) as opened:
            is_stream = not _has_index(opened)
            if file.is_remote and is_stream:
                raise DataError(
                    f"{file.name} is an Arrow stream, which has no index for reading by ranges; write an Arrow file "
                    f"(pyarrow.ipc.new_file), or copy it to a disk"
                )
            if is_stream and opened.read_at(len(STREAM_END), max(0, file.size() - len(STREAM_END))) != STREAM_END:
                raise DataError(
                    f"{file.name} is damaged or not of the format of its name: neither an Arrow file nor a stream with "
                    "an end marker, so that batches may be missing; get or write it again"
                )
            return [batch.num_rows for batch in _batches(opened, [0])]

    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of a part's record batches, merged or split to an even size."""
        with part.file.open_arrow(mapped=True) as opened:
            reader = pa.ipc.open_file(opened) if _has_index(opened) else pa.ipc.open_stream(opened)
            stored = reader.schema.names
            names = stored_names(part.file, stored, columns)
            fields = sorted({stored.index(name) for name in names})
            taken: list[pa.RecordBatch] = []
            num_rows, num_bytes = 0, 0
            for batch in _batches(opened, fields, part.chunks.start, part.chunks.stop):
                # strings are read as bytes, whose UTF-8 is validated later; invalid offsets raise ArrowInvalid here
                columns_of_bytes = [c.view(BYTES_OF[c.type]) if c.type in BYTES_OF else c for c in batch.columns]
                valid = pa.RecordBatch.from_arrays(columns_of_bytes, names=batch.schema.names)
                valid.validate(full=True)
                # tables of about ROWS_PER_BATCH rows or BYTES_PER_BATCH bytes
                step = min(ROWS_PER_BATCH, max(1, valid.num_rows * BYTES_PER_BATCH // max(1, valid.nbytes)))
                for start in range(0, valid.num_rows, step):
                    taken.append(valid.slice(start, step))
                    num_rows, num_bytes = num_rows + taken[-1].num_rows, num_bytes + taken[-1].nbytes
                    if num_rows >= ROWS_PER_BATCH or num_bytes >= BYTES_PER_BATCH:
                        yield pa.Table.from_batches(taken).select(names)
                        taken, num_rows, num_bytes = [], 0, 0
            if taken:
                yield pa.Table.from_batches(taken).select(names)


def _has_index(opened: pa.NativeFile) -> bool:
    magic = opened.read_at(len(FILE_MAGIC), 0)
    opened.seek(0)
    return bool(magic == FILE_MAGIC)


def _batches(
    opened: pa.NativeFile, fields: list[int], first: int = 0, end: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the record batches [first, end), by default all, with only these fields."""
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    if _has_index(opened):
        reader = pa.ipc.open_file(opened, options=options)
        yield from map(reader.get_batch, range(reader.num_record_batches)[first:end])
    else:
        yield from islice(pa.ipc.open_stream(opened, options=options), first, end)


def saved_dataset(folder: Path) -> ArrowSource | None:
    """Open a saved dataset; None: the folder holds none.

    Raises DataError: several splits, damaged, a missing file, or an indices mapping.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = ", ".join(str(folder / str(split)) for split in _json(folder / SPLITS_FILE).get("splits", []))
        raise DataError(f"{folder} has several splits of a dataset; give one of them: {splits}")
    if not all((folder / name).is_file() for name in (STATE_FILE, INFO_FILE)):
        return None
    state = _json(folder / STATE_FILE)
    if any(value for key, value in state.items() if "indices" in key):
        raise DataError(
            f"{folder} selects rows by an indices mapping; write them out: in Python, "
            f"datasets.load_from_disk(…).flatten_indices().save_to_disk(…)"
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / STATE_FILE} is of another format: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{folder / STATE_FILE} names a file {name!r}, not one in its folder; rejected")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} does not exist, but {STATE_FILE} names it; copy the dataset whole")
    if not names:
        raise DataError(f"{folder} has no rows: its {STATE_FILE} names no file")
    return ArrowSource(*(TableFile(folder / name) for name in names), name=str(folder))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
