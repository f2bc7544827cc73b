"""Files of tables, on disk or at a URL, with transparent decompression (.gz, .xz, .zst)."""

from __future__ import annotations

import gzip
import io
import lzma
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from bigdssm.errors import DataError
from bigdssm.utils.urls import CHUNK_BYTES, fetch, redacted, size_of, version_of

READ_AHEAD_BYTES = 1 << 20


def _open_zstd(raw: Path | BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))


COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zstd}


class TableFile(ABC):
    """A file of a table. Picklable, without open handles."""

    name: str  # for messages

    @property
    def suffix(self) -> str:
        """The suffix of the format, in lower case, without that of the compression."""
        return Path(self.name.lower().removesuffix(self.compression)).suffix

    @property
    def compression(self) -> str:
        """The suffix of the compression, '' without one."""
        suffix = Path(self.name).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @abstractmethod
    def size(self) -> int:
        """Return the size in bytes, without decompression."""

    @abstractmethod
    def version(self) -> str:
        """Return a string that changes with the content."""

    @abstractmethod
    def open_arrow(self, *, mapped: bool = False) -> pa.NativeFile:
        """Open the raw bytes for Arrow's readers; `mapped`: memory-mapped if possible."""

    @abstractmethod
    def _raw(self) -> Path | BinaryIO:
        """Return the path or raw stream for Python's decompressors."""

    def open(self) -> BinaryIO:
        """Open the decompressed content for reading and seeking."""
        raw = self._raw()
        if self.compression:
            return cast(BinaryIO, COMPRESSIONS[self.compression](raw))
        return raw.open("rb") if isinstance(raw, Path) else raw

    def stream(self) -> BinaryIO:
        """Open the decompressed content for one sequential read, with read-ahead in another thread."""
        return cast(BinaryIO, io.BufferedReader(ReadAhead(self.open()), READ_AHEAD_BYTES))


class LocalFile(TableFile):
    """A file on disk."""

    def __init__(self, path: Path, name: str = "") -> None:
        """`name` defaults to the path."""
        self.path, self.name = path, name or str(path)

    def size(self) -> int:
        """Return the size in bytes."""
        return self.path.stat().st_size

    def version(self) -> str:
        """Return the size and modification time."""
        stat = self.path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def open_arrow(self, *, mapped: bool = False) -> pa.NativeFile:
        """Open or memory-map the file."""
        return pa.memory_map(str(self.path)) if mapped else pa.OSFile(str(self.path))

    def stream(self) -> BinaryIO:
        """Open for one sequential read; decompression runs in another thread."""
        return super().stream() if self.compression else self.open()

    def _raw(self) -> Path:
        return self.path


class RemoteFile(TableFile):
    """A file at a URL, read by range requests."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, redacted(url)

    def size(self) -> int:
        """Return the size in bytes. Raises FileNotFoundError."""
        return size_of(self.url)

    def version(self) -> str:
        """Return the size, and the ETag or modification time if the server sends one."""
        return version_of(self.url)

    def open_arrow(self, *, mapped: bool = False) -> pa.NativeFile:
        """Open with one request per read: Arrow reads only the required column chunks."""
        return pa.PythonFile(RangeReader(self), mode="r")

    def _raw(self) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(RangeReader(self), CHUNK_BYTES))


class RangeReader(io.RawIOBase):
    """A seekable file at a URL, with one request per read."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._size, self._position = file, file.size(), 0

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
            content = fetch(self._file.url, self._position, size, lambda got: len(got) == size)
            if len(content) < size:
                raise DataError(f"{self._file.name} became shorter during reading; start again, without changing it")
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
