"""Source: a table that is read in parts, each on its own, by any process, as Arrow batches."""

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
from bigdssm.ingest.sources.files import TableFile
from bigdssm.utils.components import add_named

# What readers raise where a file is not what it should be.
READING_ERRORS = (pa.ArrowException, OSError, lzma.LZMAError, zlib.error, EOFError, csv.Error)


@dataclass(frozen=True)
class Part:
    """Successive rows of a source; a format may add what it finds them by."""

    number: int  # among the source's parts, from 0
    first_row: int  # in the whole source, from 1
    num_rows: int | None  # None: not known before they are read


class Source(ABC):
    """A table that workers read in parts, each on its own. Picklable; holds no open file."""

    name: str  # what messages and the quarantine call it

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what is another one when the content is."""

    @abstractmethod
    def size(self) -> int:
        """Return its bytes, about."""

    @abstractmethod
    def split(self) -> Sequence[Part]:
        """Return the parts for `parts`, which makes sentences of what Arrow and others raise."""

    @abstractmethod
    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield a part's rows for `batches`, which makes such sentences, too."""

    def parts(self) -> Sequence[Part]:
        """Return its parts in order, at least one where it has rows: a function of the source alone.

        Raises DataError: damaged.
        """
        try:
            return self.split()
        except READING_ERRORS as error:
            raise reading_error(error, self.name, 0) from None

    def batches(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the rows of a part in order, with exactly `columns`, numbered in the whole source from 1.

        Bad rows go to `report_bad`. Raises DataError: missing column (naming the nearest), damaged.
        """
        seen = part.first_row - 1
        try:
            for batch in self.read(part, columns, report_bad):
                seen += len(batch.rows)
                yield batch
        except READING_ERRORS as error:
            raise reading_error(error, self.name, seen) from None


class FileSource(Source):
    """A source in one file, or in several that hold its rows one behind the other; by default one part.

    A format is a subclass that is registered with `register_source`.
    """

    suffixes: ClassVar[tuple[str, ...]]  # of the names of its files, in lower case
    compressible: ClassVar[bool] = False  # also with .gz, .xz and .zst, which `TableFile.open` and `stream` undo

    def __init__(self, *files: TableFile, name: str = "") -> None:
        """`name` is by default the file's."""
        self.files, self.name = files, name or files[0].name

    @property
    def file(self) -> TableFile:
        """Return the file, of a source in one."""
        (file,) = self.files
        return file

    def fingerprint(self) -> str:
        """Return a hash of the files' sizes and times, or etags."""
        return xxh3_128_hexdigest("\n".join(file.version() for file in self.files).encode())

    def size(self) -> int:
        """Return the files' bytes, compressed or not."""
        return sum(file.size() for file in self.files)

    def split(self) -> Sequence[Part]:
        """Return one: where rows of text begin is known when all before them are read."""
        return [Part(0, 1, None)]


SOURCES: dict[str, type[FileSource]] = {}  # by suffix
Format = TypeVar("Format", bound=type[FileSource])


def register_source(cls: Format) -> Format:
    """Have files of a format's suffixes read by its class; a class decorator. Raises ValueError: one is taken."""
    for suffix in cls.suffixes:
        add_named(SOURCES, suffix, cls, "a table source")
    return cls


def reading_error(error: Exception, name: str, row: int) -> Exception:
    """Return a reader's error as a sentence on the table `name`, read up to `row`; trouble of the machine as it is."""
    if isinstance(error, OSError) and error.errno:
        return error
    detail = " ".join(str(error).split())[:300]
    if "straddling object" in detail:
        detail = f"a row of more than {BYTES_PER_BATCH:,} bytes, or a quote that is never closed"
    return DataError(f"{name} is damaged or not what its name says, after row {row}: {detail}")


ROWS_PER_BATCH = 16384
BYTES_PER_BATCH = 8 << 20
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def as_utf8(batch: SourceBatch, report_bad: ReportBad) -> SourceBatch:
    """Return the batch with byte columns as strings, without the rows that are not UTF-8."""
    check = RowCheck(batch, report_bad)
    columns: dict[str, pa.ChunkedArray] = {}
    for name in batch.table.column_names:
        column = batch.table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        if any(is_text(column.type) for is_text in TEXT_TYPES):
            column = column.cast(pa.large_binary())  # casting back checks it; Parquet and JSON readers do not
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
