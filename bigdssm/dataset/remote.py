"""Datasets at a URL: small and mapped files are fetched whole, blocks by range reads, all into the cache on disk.

A failure that may pass is waited out; one that does not ends the run, which goes on later where it was. Only what the
server steadily has (no shard, a shorter one, other bytes) counts as damage, as in a local folder.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import xxhash

from bigdssm.dataset.cache import Cache, key_of
from bigdssm.errors import ConfigError, DataError
from bigdssm.log import get_logger
from bigdssm.schema import SCHEMA_FILE, vocabulary_checksums

# About 24 s of waiting in all: longer than a server's restart, shorter than anybody's patience.
ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 8, 0.25, 8.0
MISMATCHES = 3  # times that a wrong content is fetched before it is taken for what the server has
TIMEOUT_S, SLOWEST_BYTES_PER_S = 30.0, 1 << 16  # of a request: the sum of the first and size over the second
CHUNK_BYTES = 1 << 22  # of a file fetched whole

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")
_count = itertools.count()
T = TypeVar("T")
log = get_logger(__name__)


def is_url(folder: str | Path) -> bool:
    """Return whether this is a URL (scheme://…) and no local path."""
    return isinstance(folder, str) and _URL.match(folder) is not None


def shown(url: str) -> str:
    """Return the URL without what may be secret in it: password and query."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


@dataclass(frozen=True)
class RemoteFile:
    """A shard at a URL."""

    url: str
    cache: Cache

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """Return the file's own name."""
        return shown(self.url).rpartition("/")[2]

    def read(self, offset: int, size: int, checksum: int) -> bytes:
        """Return the bytes of a block, from the cache where they are there.

        What the server has instead comes back as it is: shorter, or of another checksum. Raises FileNotFoundError: no
        such shard; DataError: the server cannot be read, which is no damage.
        """
        key = key_of(self.url, offset, size, checksum)
        content = self.cache.block(key, checksum)
        if content is None:
            content = _fetch(self.url, offset, size, lambda got: xxhash.xxh3_64_intdigest(got) == checksum)
            if xxhash.xxh3_64_intdigest(content) == checksum:
                self.cache.keep_block(key, content)
        return content


class RemoteFolder:
    """A dataset's files at a URL, all but the shards held in the cache as long as this object lives."""

    def __init__(
        self, url: str, cache: Cache, partitions: Sequence[str] | None = None, first: str | None = None
    ) -> None:
        """Fetch what is not there; of the partitions only the named ones, or those from `first` on.

        Raises DataError: no dataset there, damaged, unreachable, or too large for the cache; ConfigError: no such kind
        of URL, or a package is missing for it.
        """
        self.url, self.cache = url, cache
        self._held: list[int] = []
        self._entries: dict[str, str] = {}
        try:
            self.dir = self._mirror(partitions, first)
        except BaseException as error:
            self._release()  # now, not when the last traceback that leads here is collected
            if isinstance(error, OSError):
                raise DataError(f"data.cache_dir={cache.dir} cannot be used: {error}; choose another one") from None
            raise

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def file(self, place: str) -> RemoteFile:
        """Return the file that stands at `place` in the folder."""
        return RemoteFile(join(self.url, place), self.cache)

    def _mirror(self, partitions: Sequence[str] | None, first: str | None) -> Path:
        content = self._json("dataset.json", f"{shown(self.url)} is no dataset")
        try:
            names = [str(name) for name in content["partitions"]]
            described = self._json(SCHEMA_FILE, "copy the dataset whole")
            for file, checksum in vocabulary_checksums(described).items():
                self._large(file, checksum)
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
                self._small(f"tokenizer/{file}", optional=True)
            for part in content["catalogue"]:
                self._large(part["file"], part["checksum"])
            wanted = names[names.index(first) :] if first in names else names if partitions is None else partitions
            for name in names:
                self._partition(f"partitions/{name}", name in wanted)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{shown(self.url)} holds metadata of another format: {error!r}") from None
        return self.cache.link(shown(self.url).rstrip("/").rpartition("/")[2] or "dataset", self.url, self._entries)

    def _partition(self, place: str, wanted: bool) -> None:
        content = self._json(f"{place}/partition.json", "copy the dataset whole")
        if not wanted:
            return
        for split, described in content["splits"].items():
            self._large(f"{place}/{split}.index.arrow", described["index_checksum"])
        self._large(f"{place}/counts.npy", content["counts_checksum"])
        for part in content.get("sequences", []):
            self._large(f"{place}/{part['file']}", part["checksum"])

    def _json(self, place: str, fix: str) -> dict[str, Any]:
        content = self._small(place, fix=fix)
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError) as error:
            raise DataError(f"{shown(join(self.url, place))} is damaged: {error}") from None

    def _small(self, place: str, *, optional: bool = False, fix: str = "copy the dataset whole") -> bytes:
        """Fetch a file without a recorded checksum, at every opening, and return it."""
        url = _checked_join(self.url, place)
        try:
            content = _fetch(url, None, None, _parses if place.endswith(".json") else lambda _: True)
        except FileNotFoundError:
            if optional:
                return b""
            raise DataError(f"{shown(url)} does not exist; {fix}") from None
        key = key_of(url, xxhash.xxh3_128_hexdigest(content))
        self._hold(place, key, self.cache.fill(key, len(content), lambda fd: _write(fd, 0, content)))
        return content

    def _large(self, place: str, checksum: str) -> None:
        """Fetch a file, if the cache has not the one of this checksum."""
        url = _checked_join(self.url, place)
        key = key_of(url, checksum)
        held = self.cache.hold(key)
        if held is None:
            try:
                size = _retried(url, lambda: _size(url))
                held = self.cache.fill(key, size, lambda fd: _download(fd, url, size, checksum))
            except FileNotFoundError:
                raise DataError(f"{shown(url)} does not exist; copy the dataset whole") from None
        self._hold(place, key, held)

    def _hold(self, place: str, key: str, held: int) -> None:
        self._entries[place] = key
        self._held.append(held)


def join(url: str, place: str) -> str:
    """Return the URL of what stands at `place` under the folder `url`; a query stays behind the path."""
    path, mark, query = url.partition("?")
    is_http = urlsplit(url).scheme.lower() in ("http", "https")
    return f"{path.rstrip('/')}/{quote(place, safe='/=') if is_http else place}{mark}{query}"


def _checked_join(url: str, place: str) -> str:
    if any(part in ("", ".", "..") for part in place.split("/")) or "\\" in place:
        raise DataError(f"{shown(url)}: its metadata name a file {place!r}, not a plain path inside it; refused")
    return join(url, place)


def _download(fd: int, url: str, size: int, checksum: str) -> None:
    for _ in range(MISMATCHES):
        digest = xxhash.xxh3_64()
        for start in range(0, size, CHUNK_BYTES):
            wanted = min(CHUNK_BYTES, size - start)
            content = _fetch(url, start, wanted, lambda got, wanted=wanted: len(got) == wanted)  # type: ignore[misc]
            digest.update(content)
            _write(fd, start, content)
        if digest.hexdigest() == checksum:
            return
    raise DataError(f"{shown(url)} is damaged: its checksum is not the recorded one; copy the dataset there again")


def _write(fd: int, offset: int, content: bytes) -> None:
    while content:
        written = os.pwrite(fd, content, offset)
        offset, content = offset + written, content[written:]


def _parses(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _fetch(url: str, offset: int | None, size: int | None, is_right: Callable[[bytes], bool]) -> bytes:
    """Return a range of a file, or all of it: right, or what the server gave again and again."""
    content = b""
    end = None if offset is None or size is None else offset + size
    for _ in range(MISMATCHES):
        content = _retried(url, lambda: _request_all(url, offset, end))
        if size is not None and len(content) > size:
            raise DataError(f"{shown(url)}: the server ignores byte ranges; use one that does not, or copy the dataset")
        if is_right(content):
            break
    return content


def _retried(url: str, attempt: Callable[[], T]) -> T:
    """Return what `attempt` does, after as many failures as are forgiven. Raises FileNotFoundError or DataError."""
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except (ConfigError, DataError):
            raise
        except Exception as error:
            told, status = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", _status(error)
            error.__traceback__ = None  # fsspec's frames hold it, and through their callers all that is opened here
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, "no such file", shown(url))
        if 400 <= status < 500 and status not in (408, 425, 429):
            raise DataError(f"{shown(url)}: the server refuses it ({shown(told)}); check address and credentials")
        if number + 1 < ATTEMPTS:
            spread = xxhash.xxh3_64_intdigest(f"{os.getpid()} {next(_count)} {url}".encode()) / 2**64
            wait = min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) * (0.5 + spread / 2)  # not all ranks at once
            log.info("%s: %s; trying again in %.1f s", shown(url), shown(told), wait)
            time.sleep(wait)
    raise DataError(
        f"{shown(url)} cannot be read: {ATTEMPTS} attempts failed, the last with {shown(told)}; go on later"
    )


def _status(error: BaseException) -> int:
    """Return the HTTP status that an error amounts to, 0 for one that may pass."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__  # fsspec says so, too, of a size that a failing server did not tell
        return 404 if cause is None or not type(cause).__module__.startswith("aiohttp") else _status(cause)
    if isinstance(error, PermissionError):
        return 403
    response = getattr(error.__cause__, "response", None)  # botocore's, behind what s3fs makes of it
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    status = getattr(error, "status", 0)
    return status if isinstance(status, int) else 0


def _request_all(url: str, start: int | None, end: int | None) -> bytes:
    """Return a range, cut only where the file itself ends. Raises OSError: a proxy gave less than there is."""
    content = _request(url, start, end)
    if start is not None and end is not None and (reached := start + len(content)) < end and reached < _size(url):
        raise OSError(f"{len(content)} bytes came of {end - start} at {start}")
    return content


def _request(url: str, start: int | None, end: int | None) -> bytes:
    from fsspec.asyn import sync

    files, path = _filesystem(url, os.getpid())
    if not files.async_impl:
        return bytes(files.cat_file(path, start=start, end=end))
    limit = TIMEOUT_S + ((end or CHUNK_BYTES) - (start or 0)) / SLOWEST_BYTES_PER_S
    try:
        return bytes(sync(files.loop, files._cat_file, path, start=start, end=end, timeout=limit))
    except Exception as error:
        if start is not None and _status(error) == 416:  # the file ends before the range begins
            return b""
        raise


def _size(url: str) -> int:
    from fsspec.asyn import sync

    files, path = _filesystem(url, os.getpid())
    info = sync(files.loop, files._info, path, timeout=TIMEOUT_S) if files.async_impl else files.info(path)
    size = info["size"]
    if size is None:
        raise DataError(f"{shown(url)}: the server does not tell the file's size; use one that does")
    return int(size)


@functools.lru_cache(maxsize=1024)
def _filesystem(url: str, pid: int) -> tuple[Any, str]:
    """Return fsspec's file system, for this process alone (its connections do not survive a fork), and the path."""
    if "::" in url:
        raise ConfigError(f"{shown(url)}: chained URLs are not read; give the plain one, there is a cache already")
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{shown(url)} cannot be read without another package ({' '.join(str(error).split())}); for http(s) "
            f"pip install 'bigdssm[remote]', for s3:// s3fs, for gs:// gcsfs"
        ) from None
    return files, path
