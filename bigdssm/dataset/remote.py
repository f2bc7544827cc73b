"""Datasets at a URL, through a disk cache: whole files, and range requests for blocks.

The cache is a size-limited folder of downloaded files, shared by the processes on a machine. The name of an entry is a
hash of its URL, its path (or byte range) and its checksum: different contents never share a name. An entry is written
under a temporary name, verified, and renamed: with its final name it is complete. Advisory locks mark entries in use;
the system releases them when the process exits, so `kill -9` leaves no stale locks.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bigdssm.config import DEFAULT_CACHE_BYTES, DataConfig
from bigdssm.dataset.schema import SCHEMA_FILE, VOCABULARIES
from bigdssm.dataset.stamps import STAMPS_FILE
from bigdssm.errors import DataError
from bigdssm.utils.atomic import UNFINISHED, new_folder, put_file, temporary_path
from bigdssm.utils.log import get_logger
from bigdssm.utils.urls import CHUNK_BYTES, MISMATCHES, fetch, join, redacted, size_of

COUNTS_FILE = "counts.arrow"  # per partition: train positives per document
KEYS_SUFFIX = ".keys.npy"  # files of sorted keys, see keys.py
SEQUENCE_KEYS_FILE = f"sequences{KEYS_SUFFIX}"
KEEP_FRACTION = 0.9  # an eviction frees down to this fraction of the limit, so that evictions are rare
POLL_S = 0.05  # polling interval while another process fetches the same entry
log = get_logger(__name__)


@dataclass(frozen=True)
class FileCache:
    """A cache of files in `dir`, at most `max_bytes` in total."""

    dir: Path
    max_bytes: int

    @classmethod
    def from_config(cls, config: DataConfig | None = None) -> "FileCache":
        """Return the cache configured by `data.cache_dir` and `data.cache_bytes`, or the default cache of the user."""
        named = config.cache_dir if config else None
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bigdssm"
        folder = Path(named or default).expanduser().absolute()
        return cls(folder, config.cache_bytes if config else DEFAULT_CACHE_BYTES)

    def path(self, key: str) -> Path:
        """Return the path of entry `key`, which may not exist."""
        return self.dir / key[:2] / key[2:]

    def get_block(self, key: str, checksum: int) -> bytes | None:
        """Return a cached block, or None if it is missing or its checksum differs."""
        path = self.path(key)
        try:
            content = path.read_bytes()
            os.utime(path)  # for the eviction of least recently used entries
        except OSError:
            return None
        return content if xxhash.xxh3_64_intdigest(content) == checksum else None

    def put_block(self, key: str, content: bytes) -> None:
        """Store a block if it fits in addition to the entries in use."""
        path = self.path(key)
        try:
            with self._locked() as lock:
                if self._reserve(lock, len(content)):
                    path.parent.mkdir(exist_ok=True)
                    temporary_path(path).write_bytes(content)
                    os.replace(temporary_path(path), path)  # not synced: blocks are verified at every read
        except OSError as error:  # for example a full disk: the cache is optional
            _warn_once(f"{self.dir}: blocks are not cached: {error.strerror}")

    def acquire(self, key: str) -> int | None:
        """Lock an entry against eviction until the returned descriptor is closed.

        Returns None if the entry does not exist.
        """
        path = self.path(key)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if _is_at(fd, path):
            os.utime(path)
            return fd
        os.close(fd)  # removed between open and lock
        return None

    def fill(self, key: str, size: int, write: Callable[[int], None]) -> int:
        """Acquire an entry; if it is missing, call `write` to download `size` bytes.

        `write` gets the descriptor of the file. One process downloads, the others wait for it. Raises DataError: the
        cache is full.
        """
        path = self.path(key)
        part = temporary_path(path)
        while (held := self.acquire(key)) is None:
            part.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _try_lock(fd) or not _is_at(fd, part):
                    time.sleep(POLL_S)
                    continue
                if path.exists():  # written by another process before this one got the lock
                    part.unlink()
                    continue
                try:
                    with self._locked() as lock:
                        os.ftruncate(fd, 0)  # discard bytes that a killed process has written
                        if not self._reserve(lock, size):
                            raise DataError(
                                f"data.cache_bytes={self.max_bytes} is too small for a file of {size} bytes in "
                                f"addition to the files in use in {self.dir}; raise it"
                            )
                        os.ftruncate(fd, size)  # reserve: other processes count the full size
                    write(fd)
                    put_file(part, path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
            finally:
                os.close(fd)
        return held

    def entries(self) -> list[Path]:
        """Return the files of all entries, finished or not, and the folders of links to them."""
        return [*sorted(self.dir.glob("??/*")), *sorted(self.dir.glob("trees/*"))]

    def clear(self) -> list[Path]:
        """Remove all entries; return those that other processes use, which stay."""
        with self._locked() as lock:
            in_use = [path for path in self.entries() if path.is_file() and not _remove_unused(path)]
            for tree in self.dir.glob("trees/*"):
                if any(link.is_symlink() and not link.exists() for link in tree.rglob("*")):
                    shutil.rmtree(tree)
            os.pwrite(lock, b"%020d" % sum(path.stat().st_size for path in in_use), 0)
        return in_use

    def link(self, name: str, url: str, entries: dict[str, str]) -> Path:
        """Return a folder `name` of symbolic links to cache entries.

        `entries`: relative path → entry key. The caller must have acquired all entries.
        """
        folder = self.dir / "trees" / cache_key(url, json.dumps(entries, sort_keys=True)) / name
        with self._locked():
            if not folder.exists():
                with new_folder(folder.parent) as temporary:
                    for target, key in entries.items():
                        path = temporary / name / target
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.symlink_to(self.path(key))
        return folder

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the global lock, whose file stores an upper bound on the bytes in the cache."""
        self.dir.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _reserve(self, lock: int, size: int) -> bool:
        """Evict least recently used entries until `size` more bytes fit; return whether they fit."""
        counted = os.pread(lock, 20, 0)
        # an unreadable count forces an eviction, which counts the bytes
        total = int(counted) if counted.isdigit() else self.max_bytes
        if total + size > self.max_bytes:
            goal = min(int(self.max_bytes * KEEP_FRACTION), self.max_bytes - size)
            entries: list[tuple[bool, int, int, Path]] = []
            for path in self.dir.glob("??/*"):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    entries.append((path.suffix != UNFINISHED, stat.st_mtime_ns, stat.st_size, path))
            total, removed = sum(entry[2] for entry in entries), False
            for complete, _, entry_size, path in sorted(entries):
                if (total > goal or not complete) and _remove_unused(path):  # not whole: left by killed processes
                    total, removed = total - entry_size, True
            for tree in self.dir.glob("trees/*") if removed else ():
                if any(path.is_symlink() and not path.exists() for path in tree.rglob("*")):
                    shutil.rmtree(tree, ignore_errors=True)
        is_free = total + size <= self.max_bytes
        os.pwrite(lock, b"%020d" % (total + size if is_free else total), 0)
        return is_free


def cache_key(*identity: object) -> str:
    """Return the entry name of an identity (URL, byte range, checksum, …)."""
    return hashlib.sha256("\n".join(map(str, identity)).encode()).hexdigest()[:40]


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unused(path: Path) -> bool:
    """Remove an entry unless a process uses or writes it."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(fd):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)


def catalogue_entries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all files of the catalogue in a dataset.json."""
    return [*content["catalogue"], *content.get("versions", []), *content.get("withdrawals", [])]


@dataclass(frozen=True)
class RemoteFile:
    """A shard at a URL."""

    url: str
    cache: FileCache

    def __str__(self) -> str:
        return redacted(self.url)

    @property
    def name(self) -> str:
        """The file name."""
        return redacted(self.url).rpartition("/")[2]

    def read(self, offset: int, size: int, checksum: int) -> bytes:
        """Read a block through the cache.

        Short or damaged content is returned unchanged, for the caller to report. Raises FileNotFoundError: no such
        shard; DataError: the server is unreachable, which is not damage.
        """
        key = cache_key(self.url, offset, size, checksum)
        content = self.cache.get_block(key, checksum)
        if content is None:
            content = fetch(self.url, offset, size, lambda got: xxhash.xxh3_64_intdigest(got) == checksum)
            if xxhash.xxh3_64_intdigest(content) == checksum:
                self.cache.put_block(key, content)
        return content


class RemoteFolder:
    """The files of a dataset at a URL.

    All but the shards stay in the cache while this object lives.
    """

    def __init__(
        self, url: str, cache: FileCache, partitions: Sequence[str] | None = None, first: str | None = None
    ) -> None:
        """Download missing files: of all partitions, the given ones, or those from `first` on.

        Raises DataError: not a dataset, damaged, unreachable, or too large for the cache; ConfigError: an unsupported
        kind of URL, or a missing package for it.
        """
        self.url, self.cache = url, cache
        self._held: list[int] = []
        self._entries: dict[str, str] = {}
        try:
            self._mirror(partitions, first)
        except BaseException as error:
            self._release()  # now: the traceback keeps this object alive
            if isinstance(error, OSError):
                raise DataError(f"data.cache_dir={cache.dir} cannot be used: {error}; choose another one") from None
            if isinstance(error, KeyError | TypeError | AttributeError):
                raise DataError(f"{redacted(url)} holds metadata of another format: {error!r}") from None
            raise

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def file(self, path: str) -> RemoteFile:
        """Return the remote file at a relative path."""
        return RemoteFile(join(self.url, path), self.cache)

    def _mirror(self, partitions: Sequence[str] | None, first: str | None) -> None:
        content = self._json("dataset.json", f"{redacted(self.url)} is not a dataset")
        names = [str(name) for name in content["partitions"]]
        files = catalogue_entries(content)
        for vocabularies in self._json(SCHEMA_FILE)[VOCABULARIES].values():
            files += [part for vocabulary in vocabularies.values() for part in vocabulary["files"]]
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            self._small(f"tokenizer/{file}", optional=True)
        self._small(STAMPS_FILE, optional=True)
        required = names[names.index(first) :] if first in names else names if partitions is None else partitions
        has_item_times = "items" in content  # then the events of all partitions decide when an item is available
        for name in names:
            path = f"partitions/{name}"
            partition = self._json(f"{path}/partition.json")
            parts = []
            if name in required:
                parts.append((COUNTS_FILE, partition["counts_checksum"]))
                parts += [(f"{split}.index.arrow", of["index_checksum"]) for split, of in partition["splits"].items()]
            if name in required or has_item_times:
                parts += [(part["file"], part["checksum"]) for part in partition.get("sequences", [])]
            files += [{"file": f"{path}/{file}", "checksum": checksum} for file, checksum in parts]
        for part in files:
            self._large(part["file"], part["checksum"])
        name = redacted(self.url).rstrip("/").rpartition("/")[2] or "dataset"
        self.dir = self.cache.link(name, self.url, self._entries)

    def _json(self, path: str, fix: str = "copy the dataset whole") -> dict[str, Any]:
        content = self._small(path, fix=fix)
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError) as error:
            raise DataError(f"{redacted(join(self.url, path))} is damaged: {error}") from None

    def _small(self, path: str, *, optional: bool = False, fix: str = "copy the dataset whole") -> bytes:
        """Download and return a file without a recorded checksum, at every opening."""
        url = _checked_join(self.url, path)
        try:
            content = fetch(url, None, None, _parses if path.endswith(".json") else lambda _: True)
        except FileNotFoundError:
            if optional:
                return b""
            raise DataError(f"{redacted(url)} does not exist; {fix}") from None
        key = cache_key(url, xxhash.xxh3_128_hexdigest(content))
        self._hold(path, key, self.cache.fill(key, len(content), lambda fd: _write(fd, 0, content)))
        return content

    def _large(self, path: str, checksum: str) -> None:
        """Download a file unless the cache has it with this checksum."""
        url = _checked_join(self.url, path)
        key = cache_key(url, checksum)
        held = self.cache.acquire(key)

        def download(fd: int) -> None:
            for _ in range(MISMATCHES):
                digest = xxhash.xxh3_64()
                for start in range(0, size, CHUNK_BYTES):
                    length = min(CHUNK_BYTES, size - start)
                    content = fetch(url, start, length, lambda got, length=length: len(got) == length)  # type: ignore[misc]
                    digest.update(content)
                    _write(fd, start, content)
                if digest.hexdigest() == checksum:
                    return
            raise DataError(
                f"{redacted(url)} is damaged: its checksum is not the recorded one; copy the dataset there again"
            )

        if held is None:
            try:
                size = size_of(url)
                held = self.cache.fill(key, size, download)
            except FileNotFoundError:
                raise DataError(f"{redacted(url)} does not exist; copy the dataset whole") from None
        self._hold(path, key, held)

    def _hold(self, path: str, key: str, held: int) -> None:
        self._entries[path] = key
        self._held.append(held)


def _checked_join(url: str, path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path:
        raise DataError(f"{redacted(url)}: its metadata names a file {path!r}, not a plain path inside it; rejected")
    return join(url, path)


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
