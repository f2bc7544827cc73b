"""A folder, or a file, that any number of ranks fill, a shard at a time, and go on filling where they were killed.

.NAME.unfinished/   what the folder will hold, with job.json, lock, ranks, and done/<shard> for every finished shard

Ranks need no process group, only this folder: rank k makes the shards s ≡ k mod world size that are not done, and
whoever finds all of them done puts the folder in place.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bigdssm.cluster.launcher import rank_and_world_size
from bigdssm.errors import ConfigError, DataError
from bigdssm.utils.atomic import put_file, replace_folder, temporary_path
from bigdssm.utils.log import Progress, no_progress

JOB_FILE, LOCK_FILE, RANKS_FILE, DONE_DIR = "job.json", "lock", "ranks", "done"
ROWS_PER_SHARD = 4096


@dataclass(frozen=True)
class ShardWork:
    """Which of the ranks this is, and how much is done between two records of it."""

    rank: int = 0
    world_size: int = 1
    rows_per_shard: int = ROWS_PER_SHARD
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ConfigError(f"--rows-per-shard {self.rows_per_shard}: needs at least 1")

    @classmethod
    def of_launcher(cls, rows_per_shard: int, progress: Progress) -> ShardWork:
        """Return the work of the process that torchrun or deepspeed started. Raises ConfigError: its ranks are none."""
        rank, world_size = rank_and_world_size()
        return cls(rank, world_size, rows_per_shard, progress)


class ShardedFolder:
    """A folder that is being filled with rows 0 … num_rows − 1."""

    def __init__(
        self, folder: Path, job: Mapping[str, Any], num_rows: int, work: ShardWork,
        prepare: Callable[[Path], None] = lambda aside: None,
    ) -> None:  # fmt: skip
        """Go on with the unfinished folder of exactly this `job`, or begin it anew, which `prepare` then gets empty.

        Raises DataError where another process is filling the folder for another job.
        """
        self._folder, self._num_rows, self._work = folder, num_rows, work
        self.num_shards = -(-num_rows // work.rows_per_shard)
        self.aside = temporary_path(folder)
        self.aside.mkdir(parents=True, exist_ok=True)
        described = json.dumps({**job, "num_rows": num_rows, "rows_per_shard": work.rows_per_shard}, indent=1)
        with _lock(self.aside):
            # Shared by the ranks of a job while they work. A record lock: an error's traceback keeps this object, and
            # must not refuse the next job of this process.
            self._ranks = (self.aside / RANKS_FILE).open("a+")
            path = self.aside / JOB_FILE
            if not path.is_file() or path.read_text(encoding="utf-8") != described:
                self._claim()
                self._empty()
                try:
                    prepare(self.aside)
                except BaseException:  # such as a full disk: what was reserved is given back
                    self._empty()
                    raise
                path.write_text(described, encoding="utf-8")
            fcntl.lockf(self._ranks, fcntl.LOCK_SH | fcntl.LOCK_NB)
        own = range(work.rank, self.num_shards, work.world_size)
        self._pending = [shard for shard in own if not self._done(shard).exists()]
        self.found = len(own) - len(self._pending)  # finished before

    def pending(self, what: str) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first row, last row + 1) of this rank's that are not done; asking for the next says one is."""
        size = self._work.rows_per_shard
        for place, shard in enumerate(self._pending, start=1):
            yield shard, shard * size, min((shard + 1) * size, self._num_rows)
            self._done(shard).touch()
            self._work.progress(what, place, len(self._pending))

    def finish(self, complete: Callable[[Path], None]) -> bool:
        """Put the folder in place if every shard is done, `complete` having had it; True on the one rank that did."""
        with self._all_done() as done:
            if done:
                complete(self.aside)
                replace_folder(self.aside, self._folder)
                shutil.rmtree(self._folder / DONE_DIR)
                (self._folder / JOB_FILE).unlink()
                (self._folder / LOCK_FILE).unlink()
                (self._folder / RANKS_FILE).unlink()
        return done

    def finish_file(self, name: str, complete: Callable[[Path], None]) -> bool:
        """Put the file `name` in the folder's place, as `finish` does."""
        with self._all_done() as done:
            if done:
                complete(self.aside / name)
                put_file(self.aside / name, self._folder)
                shutil.rmtree(self.aside)
        return done

    @contextmanager
    def _all_done(self) -> Iterator[bool]:
        """Give whether every shard is done and no other rank has finished the folder, nor can meanwhile."""
        try:
            lock = _lock(self.aside)
        except FileNotFoundError:
            yield False  # another rank was the last
            return
        with lock:
            # it is not there if another was while this one waited for the lock
            yield self.aside.exists() and all(self._done(shard).exists() for shard in range(self.num_shards))

    def _claim(self) -> None:
        """Raise DataError where a rank of another job is at work: it would mark shards of this job as done."""
        try:
            fcntl.lockf(self._ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise DataError(
                f"another process is writing {self._folder} with other inputs or options; wait for it or choose "
                "another --out"
            ) from None

    def _empty(self) -> None:
        """Remove what another job left; the locks stay."""
        shutil.rmtree(self.aside / DONE_DIR, ignore_errors=True)
        for path in self.aside.iterdir():
            if path.name not in (LOCK_FILE, RANKS_FILE):
                path.unlink()
        (self.aside / DONE_DIR).mkdir()

    def _done(self, shard: int) -> Path:
        return self.aside / DONE_DIR / f"{shard:07d}"


def _lock(aside: Path) -> IO[str]:
    """Return the folder's lock, held until it is closed, or until the process ends, however it does."""
    file = (aside / LOCK_FILE).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file
