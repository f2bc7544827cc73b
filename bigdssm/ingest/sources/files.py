"""Where a table's bytes stand, on disk or at a URL, and how they are opened, compressed (.gz, .xz, .zst) or not."""

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
    """A file of a table. Picklable; holds nothing open."""

    name: str  # for messages

    @property
    def suffix(self) -> str:
        """Return what the format is told by, in lower case and without the compression's suffix."""
        return Path(self.name.lower().removesuffix(self.compression)).suffix

    @property
    def compression(self) -> str:
        """Return the compression's suffix, '' where there is none."""
        suffix = Path(self.name).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @abstractmethod
    def size(self) -> int:
        """Return its bytes as they stand, compressed or not."""

    @abstractmethod
    def version(self) -> str:
        """Return what is another one when the content is."""

    @abstractmethod
    def open_arrow(self, *, mapped: bool = False) -> pa.NativeFile:
        """Return the bytes as they stand, opened for Arrow's readers, which seek; mapped: where that is possible."""

    @abstractmethod
    def _raw(self) -> Path | BinaryIO:
        """Return what Python's readers of compressed files open."""

    def open(self) -> BinaryIO:
        """Return the content opened for reading and seeking, its compression undone."""
        raw = self._raw()
        if self.compression:
            return cast(BinaryIO, COMPRESSIONS[self.compression](raw))
        return raw.open("rb") if isinstance(raw, Path) else raw

    def stream(self) -> BinaryIO:
        """Return what `open` does, to be read once from the beginning; another thread reads it."""
        return cast(BinaryIO, io.BufferedReader(ReadAhead(self.open()), READ_AHEAD_BYTES))


class LocalFile(TableFile):
    """A file on disk."""

    def __init__(self, path: Path, name: str = "") -> None:
        """`name` is by default the path."""
        self.path, self.name = path, name or str(path)

    def size(self) -> int:
        """Return its bytes."""
        return self.path.stat().st_size

    def version(self) -> str:
        """Return its size and when it was written."""
        stat = self.path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def open_arrow(self, *, mapped: bool = False) -> pa.NativeFile:
        """Return it opened, or mapped into memory."""
        return pa.memory_map(str(self.path)) if mapped else pa.OSFile(str(self.path))

    def stream(self) -> BinaryIO:
        """Return it to be read once from the beginning; a compression is undone in another thread."""
        return super().stream() if self.compression else self.open()

    def _raw(self) -> Path:
        return self.path


class RemoteFile(TableFile):
    """A file at a URL, read by ranges."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, redacted(url)

    def size(self) -> int:
        """Return its bytes. Raises FileNotFoundError."""
        return size_of(self.url)

    def version(self) -> str:
        """Return its size and its etag, or when it was written, where the server tells that."""
        return version_of(self.url)

    def open_arrow(self, *, mapped: bool = False) -> pa.NativeFile:
        """Return it with a request for each read: Arrow's readers ask for what they need, a column of a row group."""
        return pa.PythonFile(RangeReader(self), mode="r")

    def _raw(self) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(RangeReader(self), CHUNK_BYTES))


class RangeReader(io.RawIOBase):
    """A file at a URL, a request for each read."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._size, self._place = file, file.size(), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the file and return it."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, target: Any) -> int:
        """Fill `target` as far as the file goes; 0 at its end. Raises DataError: the file is shorter than it was."""
        size = max(0, min(len(target), self._size - self._place))
        if size:
            content = fetch(self._file.url, self._place, size, lambda got: len(got) == size)
            if len(content) < size:
                raise DataError(f"{self._file.name} became shorter while it was read; leave it as it is, begin again")
            target[:size] = content
            self._place += size
        return size


class ReadAhead(io.RawIOBase):
    """The bytes of a stream, which another thread reads: undoing a compression takes a core, a request takes time."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._pool, self._chunk = stream, ThreadPoolExecutor(1), memoryview(b"")
        self._coming = deque(self._pool.submit(stream.read, READ_AHEAD_BYTES) for _ in range(2))

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill `target` as far as there is something; 0 at the end. Raises what reading the stream raised."""
        if not self._chunk:
            self._chunk = memoryview(self._coming.popleft().result())
            self._coming.append(self._pool.submit(self._stream.read, READ_AHEAD_BYTES))
        size = min(len(target), len(self._chunk))
        target[:size], self._chunk = self._chunk[:size], self._chunk[size:]
        return size

    def close(self) -> None:
        """Close the stream, too."""
        if not self.closed:
            self._pool.shutdown(cancel_futures=True)
            self._stream.close()
        super().close()
