"""A size-limited folder of downloaded files, shared by the processes on a machine.

The name of an entry is a hash of its URL, its path (or byte range) and its checksum: different contents never share a
name. An entry is written under a temporary name, verified, and renamed: with its final name it is complete. Advisory
locks mark entries in use; the system releases them when the process exits, so `kill -9` leaves no stale locks.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from bigdssm.config import DEFAULT_CACHE_BYTES, DataConfig
from bigdssm.errors import DataError
from bigdssm.utils.atomic import UNFINISHED, new_folder, put_file, temporary_path
from bigdssm.utils.log import get_logger

KEEP_FRACTION = 0.9  # an eviction frees down to this fraction of the limit, so that evictions are rare
POLL_S = 0.05  # polling interval while another process fetches the same entry
log = get_logger(__name__)


@dataclass(frozen=True)
class FileCache:
    """A cache of files in `dir`, at most `max_bytes` in total."""

    dir: Path
    max_bytes: int

    @classmethod
    def from_config(cls, config: DataConfig | None = None) -> FileCache:
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

    def link(self, name: str, url: str, entries: dict[str, str]) -> Path:
        """Return a folder `name` of symbolic links to cache entries.

        `entries`: relative path → entry key. The caller must have acquired all entries.
        """
        folder = self.dir / "trees" / cache_key(url, json.dumps(entries, sort_keys=True)) / name
        with self._locked():
            if not folder.exists():
                with new_folder(folder.parent) as aside:
                    for target, key in entries.items():
                        path = aside / name / target
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
            for whole, _, entry_size, path in sorted(entries):
                if (total > goal or not whole) and _remove_unused(path):  # not whole: left by killed processes
                    total, removed = total - entry_size, True
            for tree in self.dir.glob("trees/*") if removed else ():
                if any(path.is_symlink() and not path.exists() for path in tree.rglob("*")):
                    shutil.rmtree(tree, ignore_errors=True)
        fits = total + size <= self.max_bytes
        os.pwrite(lock, b"%020d" % (total + size if fits else total), 0)
        return fits


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
