"""The built-in engine: runs jobs in local processes, and SQL queries in DuckDB."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import duckdb
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor, as_completed

from bigdssm.ingest.engines.tables import FIRST_ROW_DIGITS, ROWS_PER_READ, RowTable, finished_folder
from bigdssm.sources.base import Source
from bigdssm.utils.log import Progress, no_progress

StepFunction = Callable[[Any, Path], None]
"""Runs a job and writes its output to a folder; picklable, deterministic in the job."""
SMALL_WORK = 200_000  # rows; fewer run in this process, because starting others takes a second
MEMORY = "1500MB"  # for queries; larger sorts spill to disk
MAX_THREADS = 12  # supported by this memory limit


class LocalEngine:
    """Runs the steps of an ingestion in a spool folder, by local processes and DuckDB.

    Finished steps in the spool are reused. Queries use the common subset of DuckDB's and Spark's SQL, over tables and
    views of earlier steps. The view of an ordered table has the additional column `number`: the row number from 0.
    """

    def __init__(self, spool: Path, progress: Progress = no_progress, *, processes: int = 0) -> None:
        """Use `processes` processes (0: one per core)."""
        self.spool, self.progress = spool, progress
        spool.mkdir(parents=True, exist_ok=True)
        self._processes = processes or cpu_count()
        self._pool: ProcessPoolExecutor | None = None
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": str(spool / "sorting"),
            "threads": min(self._processes, MAX_THREADS),
        }
        self._database = duckdb.connect(config=settings)
        with suppress(duckdb.InvalidInputException):  # raised in Jupyter without widgets
            self._database.execute("SET enable_progress_bar = false")  # it would interfere with the ingestion's own bar

    def map(self, step: str, jobs: Sequence[Any], work: StepFunction, *, rows: int) -> list[Path]:
        """Run `work` on all jobs (about `rows` rows in total), and return their folders in order."""
        (self.spool / step).mkdir(exist_ok=True)
        folders = [self.spool / step / f"{number:06d}" for number in range(len(jobs))]
        left = [(job, folder) for job, folder in zip(jobs, folders, strict=True) if not folder.exists()]
        done = len(jobs) - len(left)
        alone = min(self._processes, len(left)) < 2 or rows < SMALL_WORK
        finish = partial(_finish, work)
        for _ in starmap(finish, left) if alone else self._spread(finish, left):
            done += 1
            self.progress(step, done, len(jobs))
        return folders

    def table(self, name: str, files: Iterable[Path]) -> RowTable:
        """Register finished files as a table for queries."""
        table = RowTable.of(files)
        self._register(name, table, ordered=False)
        return table

    def select(self, name: str, query: str, *, order: str) -> RowTable:
        """Materialize a query, sorted by `order` (unique for distinct rows), as table `name`."""
        folder = self.spool / name
        if not folder.exists():
            self.progress(f"sorting {name}", 0, None)
            with finished_folder(folder) as aside:
                self._write(f"{query} ORDER BY {order}", aside)
        table = RowTable.of(sorted(folder.glob("*.parquet")))
        self._register(name, table, ordered=True)
        return table

    def source(self, name: str, source: Source, columns: Sequence[str]) -> Source:
        """Convert a source, of which `columns` are required, to one that workers can read.

        `name` is the step's.
        """
        return source

    def view(self, name: str, query: str) -> None:
        """Create or replace a view for queries."""
        self._database.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return all rows of a query with a small result."""
        with disk_full_errors(self.spool):
            return self._database.execute(query).fetchall()

    def close(self) -> None:
        """Close the in-memory database and kill the processes; the spool remains."""
        self._database.close()
        if self._pool is not None:
            self._pool.shutdown(kill_workers=True)

    def _spread(self, work: StepFunction, jobs: Sequence[tuple[Any, Path]]) -> Iterator[Any]:
        """Run the jobs in any order, yielding as they finish.

        Raises the error of the first failed job.
        """
        if self._pool is None:
            # not joblib's shared pool, which would stay alive for five minutes
            self._pool = ProcessPoolExecutor(self._processes, env={"OMP_NUM_THREADS": "1"})
        left = [self._pool.submit(_with_parent, work, os.getpid(), job, folder) for job, folder in jobs]
        try:
            for done in as_completed(left):
                yield done.result()
        finally:
            for future in left:
                future.cancel()

    def _write(self, query: str, folder: Path) -> None:
        """Write the rows of an ordered query to Parquet files named by their first row."""
        # V2 without dictionaries: delta encodings, faster and smaller
        options = "FORMAT parquet, PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT 1, COMPRESSION lz4_raw"
        options += f", ROW_GROUP_SIZE {ROWS_PER_READ}"
        file = folder / f"{0:0{FIRST_ROW_DIGITS}d}.parquet"
        with disk_full_errors(folder):
            self._database.execute(f"COPY ({query}) TO {_quoted(str(file))} ({options})")

    def _register(self, name: str, table: RowTable, *, ordered: bool) -> None:
        """Register a table as view `name`.

        An ordered one, with files named by first row, gets the column `number`.
        """
        files = f"[{', '.join(map(_quoted, table.files))}]"
        query = f"SELECT * FROM read_parquet({files})"
        if ordered:
            number = f"CAST(left(parse_filename(filename), {FIRST_ROW_DIGITS}) AS BIGINT) + file_row_number"
            source = f"read_parquet({files}, file_row_number = true, filename = true)"
            query = f"SELECT * EXCLUDE (file_row_number, filename), {number} AS number FROM {source}"
        self._database.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")


def _finish(work: StepFunction, job: Any, folder: Path) -> None:
    """Run a job; its folder appears when it has finished."""
    with finished_folder(folder) as aside:
        work(job, aside)


def _with_parent(work: StepFunction, parent: int, job: Any, folder: Path) -> None:
    """Run a job unless the parent is gone: workers of a killed ingestion must not write."""
    if os.getppid() != parent:
        os._exit(0)
    work(job, folder)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def disk_full_errors(folder: Path) -> Iterator[None]:
    """Convert a library's disk-full errors to OSError(ENOSPC) with the folder."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise
