"""The source interface: a table that processes read in independent parts, and the files of tables.

Files are on disk or at a URL, with transparent decompression (.gz, .xz, .zst).
"""

import csv
import gzip
import io
import lzma
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_128_hexdigest

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch, is_invalid_utf8
from bigdssm.utils.components import add_named
from bigdssm.utils.urls import CHUNK_BYTES, fetch, redacted, size_of, version_of

# exceptions of readers for damaged files
READING_ERRORS = (pa.ArrowException, OSError, lzma.LZMAError, zlib.error, EOFError, csv.Error)
SOURCES: "dict[str, type[FileSource]]" = {}  # by suffix
ROWS_PER_BATCH = 16384
BYTES_PER_BATCH = 8 << 20
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
READ_AHEAD_BYTES = 1 << 20


COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(pa.CompressedInputStream(raw, "zstd")),
}


class TableFile:
    """A file of a table, on disk or, read by range requests, at a URL. Picklable, without open handles."""

    def __init__(self, location: Path | str, name: str = "") -> None:
        """`location`: a path, or a URL as a string, which is also the default `name`, without credentials."""
        self._location = location
        self.is_remote = isinstance(location, str)
        self.name = name or (redacted(location) if isinstance(location, str) else str(location))

    @property
    def suffix(self) -> str:
        """The suffix of the format, in lower case, without that of the compression."""
        return Path(self.name.lower().removesuffix(self.compression)).suffix

    @property
    def compression(self) -> str:
        """The suffix of the compression, '' without one."""
        suffix = Path(self.name).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    def size(self) -> int:
        """Return the size in bytes, without decompression. Raises FileNotFoundError."""
        return size_of(self._location) if isinstance(self._location, str) else self._location.stat().st_size

    def version(self) -> str:
        """Return a string that changes with the content: size and modification time, of a URL also the ETag."""
        if isinstance(self._location, str):
            return version_of(self._location)
        stat = self._location.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def open_arrow(self, *, mapped: bool = False) -> pa.NativeFile:
        """Open the raw bytes for Arrow's readers; `mapped`: memory-mapped if possible.

        At a URL there is one request per read: Arrow reads only the required column chunks.
        """
        if isinstance(self._location, str):
            return pa.PythonFile(RangeReader(self._location), mode="r")
        return (pa.memory_map if mapped else pa.OSFile)(str(self._location))

    def open(self) -> BinaryIO:
        """Open the decompressed content for reading and seeking."""
        raw: Any = self._location
        if isinstance(raw, str):
            raw = io.BufferedReader(RangeReader(raw), CHUNK_BYTES)
        if self.compression:
            raw = COMPRESSIONS[self.compression](raw)
        return cast(BinaryIO, raw.open("rb") if isinstance(raw, Path) else raw)

    def stream(self) -> BinaryIO:
        """Open the decompressed content for one sequential read; requests and decompression run in another thread."""
        if not (self.is_remote or self.compression):
            return self.open()
        return cast(BinaryIO, io.BufferedReader(ReadAhead(self.open()), READ_AHEAD_BYTES))


class RangeReader(io.RawIOBase):
    """A seekable file at a URL, with one request per read."""

    def __init__(self, url: str) -> None:
        self._url, self._size, self._position = url, size_of(url), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position and return it."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, target: Any) -> int:
        """Read into `target`; 0 at the end of the file.

        Raises DataError: the file was truncated meanwhile.
        """
        size = max(0, min(len(target), self._size - self._position))
        if size:
            content = fetch(self._url, self._position, size, lambda got: len(got) == size)
            if len(content) < size:
                raise DataError(
                    f"{redacted(self._url)} became shorter during reading; start again, without changing it"
                )
            target[:size] = content
            self._position += size
        return size


class ReadAhead(io.RawIOBase):
    """A stream with read-ahead in another thread, hiding decompression and requests."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._pool, self._chunk = stream, ThreadPoolExecutor(1), memoryview(b"")
        self._coming = deque(self._pool.submit(stream.read, READ_AHEAD_BYTES) for _ in range(2))

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, target: Any) -> int:
        """Read into `target`; 0 at the end. Raises the errors of the stream."""
        if not self._chunk:
            self._chunk = memoryview(self._coming.popleft().result())
            self._coming.append(self._pool.submit(self._stream.read, READ_AHEAD_BYTES))
        size = min(len(target), len(self._chunk))
        target[:size], self._chunk = self._chunk[:size], self._chunk[size:]
        return size

    def close(self) -> None:
        """Stop the thread, and close the stream."""
        if not self.closed:
            self._pool.shutdown(cancel_futures=True)
            self._stream.close()
        super().close()


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
    for name, column in zip(batch.table.column_names, batch.table.columns, strict=True):
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
    decoded = SourceBatch(batch.file, pa.table(columns), batch.rows)
    return decoded if check.good.all() else decoded.keep(check.good)
