"""The built-in engine: processes of this machine, and DuckDB."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor, as_completed

from bigdssm.making.database import Database
from bigdssm.making.engine import SMALL_WORK, Engine, Work
from bigdssm.making.steps import Table
from bigdssm.progress import Progress, no_progress


class LocalEngine(Engine):
    """Uses `processes` processes (0: one for each core)."""

    def __init__(self, spool: Path, progress: Progress = no_progress, *, processes: int = 0) -> None:
        super().__init__(spool, progress)
        self._processes = processes or cpu_count()
        self._database = Database(spool, self._processes)
        self._pool: ProcessPoolExecutor | None = None

    def view(self, name: str, query: str) -> None:
        """Have queries know the rows of `query` by `name`."""
        self._database.view(name, query)

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return the few rows of a query."""
        return self._database.fetch(query)

    def close(self) -> None:
        """Close the database, and end the processes, whatever they do."""
        self._database.close()
        if self._pool is not None:
            self._pool.shutdown(kill_workers=True)

    def _run(self, work: Work, jobs: Sequence[tuple[Any, Path]], rows: int) -> Iterable[Any]:
        if min(self._processes, len(jobs)) < 2 or rows < SMALL_WORK:
            return map(work, *zip(*jobs, strict=True)) if jobs else ()
        return self._spread(work, jobs)

    def _spread(self, work: Work, jobs: Sequence[tuple[Any, Path]]) -> Iterator[None]:
        """Yield as jobs are finished. Raises what the first job that failed raised."""
        if self._pool is None:
            # A pool of its own: joblib's, which others in this process may use, would stay for five minutes.
            self._pool = ProcessPoolExecutor(self._processes, env={"OMP_NUM_THREADS": "1"})
        left = [self._pool.submit(_with_parent, work, os.getpid(), job, folder) for job, folder in jobs]
        try:
            for done in as_completed(left):
                yield done.result()
        finally:
            for future in left:
                future.cancel()

    def _write(self, query: str, folder: Path) -> None:
        self._database.write(query, folder)

    def _name(self, name: str, table: Table, *, ordered: bool) -> None:
        self._database.table(name, table, ordered=ordered)


def _with_parent(work: Work, parent: int, job: Any, folder: Path) -> None:
    """Do a job of a process that is still there: one that was killed goes on by itself, maybe with something else."""
    if os.getppid() != parent:
        os._exit(0)
    work(job, folder)
