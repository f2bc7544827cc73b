"""Resumable output folders and files that any number of ranks write in shards.

.NAME.unfinished/   the content of the future folder, job.json, lock, ranks, and done/<shard> per finished shard

Ranks need no process group, only this folder: rank k writes the unfinished shards s ≡ k mod world size, and the rank
that completes the last shard renames the folder.
"""

import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from bigdssm.cluster.launcher import rank_and_world_size
from bigdssm.errors import ConfigError, DataError
from bigdssm.utils.atomic import put_file, replace_folder, temporary_path
from bigdssm.utils.log import Progress, no_progress

JOB_FILE, LOCK_FILE, RANKS_FILE, DONE_DIR = "job.json", "lock", "ranks", "done"
ROWS_PER_SHARD = 4096


@dataclass(frozen=True)
class Share:
    """This rank's share of the work, and the size of its chunks, or of the shards of a folder."""

    rank: int = 0
    world_size: int = 1
    rows_per_chunk: int = 1024
    progress: Progress = no_progress

    @classmethod
    def from_launcher(cls, rows_per_shard: int, progress: Progress) -> "Share":
        """Read rank and world size from torchrun or deepspeed. Raises ConfigError: they are invalid."""
        if rows_per_shard < 1:
            raise ConfigError(f"--rows-per-shard {rows_per_shard}: needs at least 1")
        rank, world_size = rank_and_world_size()
        return cls(rank, world_size, rows_per_shard, progress)

    def bounds(self, num_rows: int) -> list[tuple[int, int]]:
        """Return [first, last) per rank, the shares of `Dataset.iterate`."""
        edges = [num_rows * k // self.world_size for k in range(self.world_size + 1)]
        return list(pairwise(edges))

    def of(self, num_rows: int) -> tuple[int, int]:
        """Return this rank's [first, last) of `num_rows`."""
        return self.bounds(num_rows)[self.rank]

    def num_chunks(self, num_rows: int, rows_per_chunk: int) -> int:
        """Return the number of chunks on the rank with the most rows."""
        return -(-max(last - first for first, last in self.bounds(num_rows)) // rows_per_chunk)


WHOLE, WHOLE_FOLDER = Share(), Share(rows_per_chunk=ROWS_PER_SHARD)  # of a single process


class ShardedFolder:
    """An output folder of rows 0 … num_rows − 1 that is being written."""

    def __init__(
        self, folder: Path, job: Mapping[str, Any], num_rows: int, work: Share,
        prepare: Callable[[Path], None] = lambda temporary: None, own: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        """Resume the unfinished folder of exactly this `job`, or start an empty one and call `prepare` on it.

        own: patterns of the files of an earlier version, see `atomic.replace_folder`.

        Raises DataError: another process is writing the folder for another job.
        """
        self._folder, self._num_rows, self._work, self._own = folder, num_rows, work, own
        self.num_shards = -(-num_rows // work.rows_per_chunk)
        self.aside = temporary_path(folder)
        self.aside.mkdir(parents=True, exist_ok=True)
        described = json.dumps({**job, "num_rows": num_rows, "rows_per_shard": work.rows_per_chunk}, indent=1)
        with _lock(self.aside):
            # Shared by the ranks of a job while they work. A record lock, which does not block the next job of this
            # process even if the traceback of an error keeps this object alive.
            self._ranks = (self.aside / RANKS_FILE).open("a+")
            path = self.aside / JOB_FILE
            if not path.is_file() or path.read_text(encoding="utf-8") != described:
                try:  # another job's rank would mark shards of this one as done
                    fcntl.lockf(self._ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    raise DataError(
                        f"another process is writing {folder} with other inputs or options; wait for it or choose "
                        "another --out"
                    ) from None
                self._empty()
                try:
                    prepare(self.aside)
                except BaseException:  # such as a full disk: release the reserved space
                    self._empty()
                    raise
                path.write_text(described, encoding="utf-8")
            fcntl.lockf(self._ranks, fcntl.LOCK_SH | fcntl.LOCK_NB)
        local = range(work.rank, self.num_shards, work.world_size)
        self._pending = [shard for shard in local if not self._done(shard).exists()]
        self.resumed = len(local) - len(self._pending)  # shards of this rank finished by an earlier run

    def pending(self, what: str) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first row, last row + 1) of unfinished shards; advancing marks one as done."""
        size = self._work.rows_per_chunk
        for number, shard in enumerate(self._pending, start=1):
            yield shard, shard * size, min((shard + 1) * size, self._num_rows)
            self._done(shard).touch()
            self._work.progress(what, number, len(self._pending))

    def finish(self, complete: Callable[[Path], None], file: str = "") -> bool:
        """If every shard is done, call `complete` on the folder, or its `file`, and rename it.

        Returns True on the one rank that did. A kill after the rename leaves files of this class in the folder.
        """
        try:
            lock = _lock(self.aside)  # keeps other ranks from finishing the folder meanwhile
        except FileNotFoundError:
            return False  # another rank was the last
        with lock:
            # missing if another rank finished it while this one waited for the lock
            if not (self.aside.exists() and all(self._done(shard).exists() for shard in range(self.num_shards))):
                return False
            complete(self.aside / file)
            if file:
                (self.aside / JOB_FILE).unlink()  # after a kill from here on, the job starts from the beginning
                put_file(self.aside / file, self._folder)
                shutil.rmtree(self.aside)
            else:
                replace_folder(self.aside, self._folder, self._own)
                shutil.rmtree(self._folder / DONE_DIR)
                for name in (JOB_FILE, LOCK_FILE, RANKS_FILE):
                    (self._folder / name).unlink()
        return True

    def _empty(self) -> None:
        """Remove the files of another job, except the locks."""
        shutil.rmtree(self.aside / DONE_DIR, ignore_errors=True)
        for path in self.aside.iterdir():
            if path.name not in (LOCK_FILE, RANKS_FILE):
                path.unlink()
        (self.aside / DONE_DIR).mkdir()

    def _done(self, shard: int) -> Path:
        return self.aside / DONE_DIR / f"{shard:07d}"


def _lock(temporary: Path) -> IO[str]:
    """Acquire the folder's lock; closing the file or the end of the process releases it."""
    file = (temporary / LOCK_FILE).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file
