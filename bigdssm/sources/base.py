"""The source interface: a table that processes read in independent parts."""

from __future__ import annotations

import csv
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_128_hexdigest

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch, is_invalid_utf8
from bigdssm.sources.files import TableFile
from bigdssm.utils.components import add_named

# exceptions of readers for damaged files
READING_ERRORS = (pa.ArrowException, OSError, lzma.LZMAError, zlib.error, EOFError, csv.Error)
SOURCES: dict[str, type[FileSource]] = {}  # by suffix
ROWS_PER_BATCH = 16384
BYTES_PER_BATCH = 8 << 20
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a source; formats may add fields to locate them."""

    number: int  # part number, from 0
    first_row: int  # row number in the source, from 1
    num_rows: int | None  # None: unknown before reading


class Source(ABC):
    """A table that workers read in independent parts. Picklable, without open files."""

    name: str  # in messages and the quarantine

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that changes with the content."""

    @abstractmethod
    def size(self) -> int:
        """Return the approximate size in bytes."""

    @abstractmethod
    def split(self) -> Sequence[Part]:
        """Return the parts; called by `parts`, which converts errors of readers."""

    @abstractmethod
    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the rows of a part; called by `batches`, which converts errors of readers."""

    def parts(self) -> Sequence[Part]:
        """Return the parts in order, at least one if there are rows; deterministic.

        Raises DataError: damaged.
        """
        try:
            return self.split()
        except READING_ERRORS as error:
            raise reading_error(error, self.name, 0) from None

    def batches(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield a part's rows in order, with exactly `columns`, numbered within the source.

        Bad rows are passed to `report_bad`. Raises DataError: a missing column, or damage.
        """
        row = part.first_row - 1
        try:
            for batch in self.read(part, columns, report_bad):
                row += len(batch.rows)
                yield batch
        except READING_ERRORS as error:
            raise reading_error(error, self.name, row) from None


class FileSource(Source):
    """A source in one or several concatenated files; by default a single part.

    Subclasses are formats, registered with `register_source`.
    """

    suffixes: ClassVar[tuple[str, ...]]  # of file names, in lower case
    compressible: ClassVar[bool] = False  # also with .gz, .xz and .zst, decompressed by `TableFile.open` and `stream`

    def __init__(self, *files: TableFile, name: str = "") -> None:
        """`name` defaults to the first file's."""
        self.files, self.name = files, name or files[0].name

    @property
    def file(self) -> TableFile:
        """The file of a single-file source."""
        (file,) = self.files
        return file

    def fingerprint(self) -> str:
        """Hash the files' sizes and modification times, or ETags."""
        return xxh3_128_hexdigest("\n".join(file.version() for file in self.files).encode())

    def size(self) -> int:
        """Return the total size of the files, without decompression."""
        return sum(file.size() for file in self.files)

    def split(self) -> Sequence[Part]:
        """Return a single part: row boundaries of text files are unknown before reading."""
        return [Part(0, 1, None)]


Format = TypeVar("Format", bound=type[FileSource])


def register_source(cls: Format) -> Format:
    """Class decorator that registers a format by its suffixes.

    Raises ValueError: a suffix is registered already.
    """
    for suffix in cls.suffixes:
        add_named(SOURCES, suffix, cls, "a table source")
    return cls


def reading_error(error: Exception, name: str, row: int) -> Exception:
    """Convert a reader's error in table `name` after `row` to DataError.

    System errors are returned unchanged.
    """
    if isinstance(error, OSError) and error.errno:
        return error
    detail = " ".join(str(error).split())[:300]
    if "straddling object" in detail:
        detail = f"a row of more than {BYTES_PER_BATCH:,} bytes, or a quote that is never closed"
    return DataError(f"{name} is damaged or not of the format of its name, after row {row}: {detail}")


def as_utf8(batch: SourceBatch, report_bad: ReportBad) -> SourceBatch:
    """Cast byte columns to strings; rows with invalid UTF-8 are reported and dropped."""
    check = RowCheck(batch, report_bad)
    columns: dict[str, pa.ChunkedArray] = {}
    for name in batch.table.column_names:
        column = batch.table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        if any(is_text(column.type) for is_text in TEXT_TYPES):
            column = column.cast(pa.large_binary())  # casting back validates UTF-8; Parquet and JSON readers do not
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            try:
                column = column.cast(pa.large_string())
            except pa.ArrowInvalid:
                check.fail(
                    np.array(list(map(is_invalid_utf8, column.to_pylist()))), f"invalid UTF-8 in column {name!r}"
                )
                good = pc.if_else(pa.array(check.good), column, pa.scalar(b"", column.type))
                column = good.cast(pa.large_string())
        columns[name] = column
    whole = SourceBatch(batch.file, pa.table(columns), batch.rows)
    return whole if check.good.all() else whole.keep(check.good)
