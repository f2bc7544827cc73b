"""Tables in chunks of known row counts: Parquet, Arrow IPC and datasets saved by Hugging Face `datasets`."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.ingest.sources.base import (
    BYTES_PER_BATCH,
    READING_ERRORS,
    ROWS_PER_BATCH,
    FileSource,
    Part,
    as_utf8,
    reading_error,
    register_source,
)
from bigdssm.ingest.sources.files import LocalFile, RemoteFile, TableFile
from bigdssm.ingest.sources.text import column_names, require_columns

ROWS_PER_PART = 1_000_000  # at most, unless a chunk has more


@dataclass(frozen=True)
class ChunkedPart(Part):
    """Some chunks of a file."""

    file: TableFile
    chunks: range


class ChunkedSource(FileSource):
    """Files of chunks, such as Parquet's row groups."""

    @abstractmethod
    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return how many rows each chunk of a file has."""

    @abstractmethod
    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield a part's rows in order, a batch at a time, the columns as `named_columns` finds them."""

    def split(self) -> Sequence[Part]:
        """Return runs of chunks of at most 1,000,000 rows together. Raises DataError: a file is damaged."""
        parts: list[ChunkedPart] = []
        first_row = 1
        for file in self.files:
            try:
                rows = self.chunk_rows(file)
            except READING_ERRORS as error:
                raise reading_error(error, file.name, 0) from None
            for chunks in _runs(rows):
                num_rows = sum(rows[chunk] for chunk in chunks)
                parts.append(ChunkedPart(len(parts), first_row, num_rows, file, chunks))
                first_row += num_rows
        return parts or [ChunkedPart(0, 1, 0, self.files[0], range(0))]

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield a part's rows; their numbers are known beforehand."""
        assert isinstance(part, ChunkedPart)
        first_row = part.first_row
        for table in self.chunk_tables(part, columns):
            rows = np.arange(first_row, first_row + table.num_rows, dtype=np.int64)
            first_row += table.num_rows
            yield as_utf8(SourceBatch(self.name, table.rename_columns(list(columns)), rows), report_bad)


def named_columns(file: TableFile, found: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the file's own names of `columns`. Raises DataError: one is missing, or there twice."""
    names = dict(zip(column_names(file.name, found), found, strict=True))
    require_columns(file.name, names, columns)
    return [names[name] for name in columns]


def _runs(rows: Sequence[int]) -> Iterator[range]:
    """Yield ranges of successive chunks that have at most ROWS_PER_PART rows together, or are one; none is empty."""
    start, together = 0, 0
    for chunk, count in enumerate(rows):
        if together and together + count > ROWS_PER_PART:
            yield range(start, chunk)
            start, together = chunk, 0
        together += count
    if together:
        yield range(start, len(rows))


PARQUET_SUFFIX = ".parquet"


@register_source
class ParquetSource(ChunkedSource):
    """Parquet files, read by row groups."""

    suffixes: ClassVar[tuple[str, ...]] = (PARQUET_SUFFIX,)

    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return how many rows each row group has."""
        with file.open_arrow() as opened, pq.ParquetFile(opened) as parquet:
            return [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]

    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of a part's row groups."""
        with part.file.open_arrow() as opened, pq.ParquetFile(opened) as parquet:
            names = named_columns(part.file, parquet.schema_arrow.names, columns)
            for batch in parquet.iter_batches(ROWS_PER_BATCH, list(part.chunks), list(dict.fromkeys(names))):
                yield pa.Table.from_batches([batch]).select(names)


def parquet_names(folder: str, names: Sequence[str]) -> list[str]:
    """Return which of the `names` in a folder are its files: all but hidden ones and marks such as _SUCCESS, sorted.

    Raises DataError: one is no Parquet file.
    """
    visible = sorted(name for name in names if not name.startswith((".", "_")))
    for name in visible:
        if not name.lower().endswith(PARQUET_SUFFIX):
            raise DataError(
                f"{folder} is read as a folder of {PARQUET_SUFFIX} files, but holds {name!r}; move that away, or give "
                f"the files or folders in it one by one"
            )
    return visible


FILE_MAGIC = b"ARROW1"


@register_source
class ArrowSource(ChunkedSource):
    """Arrow IPC files, read by record batches; in a stream those before a part's are passed over."""

    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather")

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


STATE_FILE, INFO_FILE, SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder holds a saved dataset, or several by split."""
    return (folder / SPLITS_FILE).is_file() or all((folder / name).is_file() for name in (STATE_FILE, INFO_FILE))


def saved_dataset(folder: Path) -> ArrowSource:
    """Return a folder's dataset as a source.

    Raises DataError: several splits, damaged, a file missing, or rows chosen by an index beside the files.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = ", ".join(str(folder / str(split)) for split in _json(folder / SPLITS_FILE).get("splits", []))
        raise DataError(f"{folder} holds several splits of a dataset; give one of them: {splits}")
    state = _json(folder / STATE_FILE)
    if any(value for key, value in state.items() if "indices" in key):
        raise DataError(
            f"{folder} holds rows that an index beside its files chooses; write them out: in Python, "
            f"datasets.load_from_disk(…).flatten_indices().save_to_disk(…)"
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / STATE_FILE} is of another format: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{folder / STATE_FILE} names a file {name!r}, not one of its folder; refused")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} does not exist, but {STATE_FILE} names it; copy the dataset whole")
    if not names:
        raise DataError(f"{folder} has no rows: its {STATE_FILE} names no file")
    return ArrowSource(*(LocalFile(folder / name) for name in names), name=str(folder))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
