"""Who runs the steps of a making: functions over parts of the work, and queries over whole tables."""

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
from bigdssm.ingest.sources.base import Source
from bigdssm.utils.log import Progress, no_progress

StepFunction = Callable[[Any, Path], None]
"""Does a job, and leaves what comes of it in a folder; picklable, and a function of the job alone."""
SMALL_WORK = 200_000  # rows: fewer are done in this process, others take a second to start
MEMORY = "1500MB"  # of queries; more is sorted on disk
MOST_THREADS = 12  # that so much memory is enough for


class LocalEngine:
    """The built-in engine: runs a making's steps in a spool folder, by processes of this machine and by DuckDB.

    A step that is finished there is taken as it is. Queries are of the SQL that DuckDB and Spark share, over tables and
    views of earlier steps. An ordered table's view has the column `number` beside its own: the row's place in it, from
    0.
    """

    def __init__(self, spool: Path, progress: Progress = no_progress, *, processes: int = 0) -> None:
        """Uses `processes` processes (0: one for each core)."""
        self.spool, self.progress = spool, progress
        spool.mkdir(parents=True, exist_ok=True)
        self._processes = processes or cpu_count()
        self._pool: ProcessPoolExecutor | None = None
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": str(spool / "sorting"),
            "threads": min(self._processes, MOST_THREADS),
        }
        self._database = duckdb.connect(config=settings)
        with suppress(duckdb.InvalidInputException):  # in Jupyter without widgets, where it has no bar
            self._database.execute("SET enable_progress_bar = false")  # it would stand in the making's own

    def map(self, step: str, jobs: Sequence[Any], work: StepFunction, *, rows: int) -> list[Path]:
        """Have `work` do the jobs, about so many `rows` in all, and return their folders in the order of the jobs."""
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
        """Return finished files as a table that queries know by `name`."""
        table = RowTable.of(files)
        self._name(name, table, ordered=False)
        return table

    def select(self, name: str, query: str, *, order: str) -> RowTable:
        """Return a query's rows sorted by `order`, which no two different rows share; queries know it by `name`."""
        folder = self.spool / name
        if not folder.exists():
            self.progress(f"sorting {name}", 0, None)
            with finished_folder(folder) as aside:
                self._write(f"{query} ORDER BY {order}", aside)
        table = RowTable.of(sorted(folder.glob("*.parquet")))
        self._name(name, table, ordered=True)
        return table

    def source(self, name: str, source: Source, columns: Sequence[str]) -> Source:
        """Return a source that workers read for `source`, of which they need `columns`; `name` is that of a step."""
        return source

    def view(self, name: str, query: str) -> None:
        """Have queries know the rows of `query` by `name`."""
        self._database.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return the few rows of a query."""
        with naming_a_full_disk(self.spool):
            return self._database.execute(query).fetchall()

    def close(self) -> None:
        """Close the database, which is in memory, and end the processes, whatever they do; the spool stays."""
        self._database.close()
        if self._pool is not None:
            self._pool.shutdown(kill_workers=True)

    def _spread(self, work: StepFunction, jobs: Sequence[tuple[Any, Path]]) -> Iterator[Any]:
        """Do the jobs in any order, yielding as they are finished. Raises what the first job that failed raised."""
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
        """Write the rows of a query that has an order into Parquet files, which are named by their first rows."""
        # V2 without dictionaries: columns are written as differences, in less time and room.
        options = "FORMAT parquet, PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT 1, COMPRESSION lz4_raw"
        options += f", ROW_GROUP_SIZE {ROWS_PER_READ}"
        file = folder / f"{0:0{FIRST_ROW_DIGITS}d}.parquet"
        with naming_a_full_disk(folder):
            self._database.execute(f"COPY ({query}) TO {_quoted(str(file))} ({options})")

    def _name(self, name: str, table: RowTable, *, ordered: bool) -> None:
        """Have queries know `table` by `name`; one that is ordered, whose files are so named, with `number`."""
        files = f"[{', '.join(map(_quoted, table.files))}]"
        query = f"SELECT * FROM read_parquet({files})"
        if ordered:
            number = f"CAST(left(parse_filename(filename), {FIRST_ROW_DIGITS}) AS BIGINT) + file_row_number"
            source = f"read_parquet({files}, file_row_number = true, filename = true)"
            query = f"SELECT * EXCLUDE (file_row_number, filename), {number} AS number FROM {source}"
        self._database.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")


def _finish(work: StepFunction, job: Any, folder: Path) -> None:
    """Do a job, whose folder appears when it is done."""
    with finished_folder(folder) as aside:
        work(job, aside)


def _with_parent(work: StepFunction, parent: int, job: Any, folder: Path) -> None:
    """Do a job of a process that is still there: one that was killed goes on by itself, maybe with something else."""
    if os.getppid() != parent:
        os._exit(0)
    work(job, folder)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn what a library says of a full disk into the system's error, which names where."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise
