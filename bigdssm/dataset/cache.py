"""A folder of fetched files under a cap, shared by any number of processes of one machine.

An entry's name is a hash of the full URL it came from, its place there and its checksum, so that nothing can be taken
for anything else. It is written under another name, checked, and renamed: what has its final name is whole. Advisory
locks, which end with their process, say what is in use; `kill -9` leaves nothing that blocks or misleads.
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
from bigdssm.utils.atomic import UNFINISHED, aside_of, new_folder, put_file
from bigdssm.utils.log import get_logger

KEEP_FRACTION = 0.9  # of the cap, when the cache is full: making room is then rare
POLL_S = 0.05  # while another process fetches the same
log = get_logger(__name__)


@dataclass(frozen=True)
class FileCache:
    """The files in `dir`, at most `max_bytes` of them; see the module."""

    dir: Path
    max_bytes: int

    @classmethod
    def of(cls, config: DataConfig | None = None) -> FileCache:
        """Return the cache that `data.cache_dir` and `data.cache_bytes` name, or the user's default one."""
        named = config.cache_dir if config else None
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bigdssm"
        folder = Path(named or default).expanduser().absolute()
        return cls(folder, config.cache_bytes if config else DEFAULT_CACHE_BYTES)

    def path(self, key: str) -> Path:
        """Return where the entry `key` stands, whether it is there or not."""
        return self.dir / key[:2] / key[2:]

    def block(self, key: str, checksum: int) -> bytes | None:
        """Return a kept block, or None where it is not there, or not as it was written."""
        path = self.path(key)
        try:
            content = path.read_bytes()
            os.utime(path)  # the least recently used go first
        except OSError:
            return None
        return content if xxhash.xxh3_64_intdigest(content) == checksum else None

    def keep_block(self, key: str, content: bytes) -> None:
        """Keep a block, if there is room beside what is in use."""
        path = self.path(key)
        try:
            with self._locked() as lock:
                if self._reserve(lock, len(content)):
                    path.parent.mkdir(exist_ok=True)
                    aside_of(path).write_bytes(content)
                    os.replace(aside_of(path), path)  # not synced: a block is checked whenever it is read
        except OSError as error:  # a full disk, say: the cache is only there to save time
            _warn_once(f"{self.dir}: blocks are not cached: {error.strerror}")

    def hold(self, key: str) -> int | None:
        """Return an open descriptor, until whose closing the entry stays, or None where there is no such entry."""
        path = self.path(key)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if _is_at(fd, path):
            os.utime(path)
            return fd
        os.close(fd)  # removed while it was being opened
        return None

    def fill(self, key: str, size: int, write: Callable[[int], None]) -> int:
        """Return what `hold` does, after `write` has put the entry's `size` bytes into a descriptor, here or elsewhere.

        Of several processes one fetches and the others wait. Raises DataError: no room.
        """
        path = self.path(key)
        part = aside_of(path)
        while (held := self.hold(key)) is None:
            part.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _try_lock(fd) or not _is_at(fd, part):
                    time.sleep(POLL_S)
                    continue
                if path.exists():  # by a process that was done before this one had the lock
                    part.unlink()
                    continue
                try:
                    self._allot(fd, size)
                    write(fd)
                    put_file(part, path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
            finally:
                os.close(fd)
        return held

    def link(self, name: str, url: str, entries: dict[str, str]) -> Path:
        """Return a folder in which every path of `entries` leads to the entry of that key; all must be held."""
        folder = self.dir / "trees" / key_of(url, json.dumps(entries, sort_keys=True)) / name
        with self._locked():
            if not folder.exists():
                with new_folder(folder.parent) as aside:
                    for place, key in entries.items():
                        path = aside / name / place
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.symlink_to(self.path(key))
        return folder

    def _allot(self, fd: int, size: int) -> None:
        with self._locked() as lock:
            os.ftruncate(fd, 0)  # of what a killed process left
            if not self._reserve(lock, size):
                raise DataError(
                    f"data.cache_bytes={self.max_bytes} has no room for a file of {size} bytes beside those in use in "
                    f"{self.dir}; allow more"
                )
            os.ftruncate(fd, size)  # so that whoever counts counts all of it

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the cache's one lock; its file has the number of bytes in the cache, never less than there are."""
        self.dir.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _reserve(self, lock: int, size: int) -> bool:
        """Return whether `size` more bytes may be written, having removed what was used least recently."""
        counted = os.pread(lock, 20, 0)
        total = int(counted) if counted.isdigit() else self.max_bytes  # unknown: count
        if total + size > self.max_bytes:
            total = self._evict(min(int(self.max_bytes * KEEP_FRACTION), self.max_bytes - size))
        fits = total + size <= self.max_bytes
        os.pwrite(lock, b"%020d" % (total + size if fits else total), 0)
        return fits

    def _evict(self, goal: int) -> int:
        """Return the bytes left after removing unused entries, oldest first, down to `goal`."""
        entries: list[tuple[bool, int, int, Path]] = []
        for path in self.dir.glob("??/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                entries.append((path.suffix != UNFINISHED, stat.st_mtime_ns, stat.st_size, path))
        total, before = sum(entry[2] for entry in entries), len(entries)
        for whole, _, size, path in sorted(entries):
            if (total > goal or not whole) and _remove_unused(path):  # parts: what killed processes left
                total -= size
                before -= 1
        if before < len(entries):
            for tree in self.dir.glob("trees/*"):
                if any(path.is_symlink() and not path.exists() for path in tree.rglob("*")):
                    shutil.rmtree(tree, ignore_errors=True)
        return total


def key_of(*identity: object) -> str:
    """Return the name in the cache of what `identity` (URL, place, checksum, …) tells apart from all else."""
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
    """Remove an entry unless a process holds or fills it."""
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
