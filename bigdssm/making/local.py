"""The built-in engine: processes of this machine, and DuckDB, which sorts and groups what is larger than memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
from joblib import Parallel, cpu_count, delayed

from bigdssm.making.engine import SMALL_WORK, Engine, Work
from bigdssm.making.steps import ROWS_PER_READ, Table
from bigdssm.progress import Progress, no_progress

MEMORY = "1500MB"  # of queries; more is sorted on disk
MOST_THREADS = 12  # that so much memory is enough for


class LocalEngine(Engine):
    """Uses `processes` processes (0: one for each core)."""

    def __init__(self, spool: Path, progress: Progress = no_progress, *, processes: int = 0) -> None:
        super().__init__(spool, progress)
        self._processes = processes or cpu_count()
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": str(spool / "sorting"),
            "threads": min(self._processes, MOST_THREADS),
        }
        self._database = duckdb.connect(config=settings)
        with suppress(duckdb.InvalidInputException):  # in Jupyter without widgets, where it has no bar
            self._database.execute("SET enable_progress_bar = false")  # it would stand in the making's own

    def view(self, name: str, query: str) -> None:
        """Have queries know the rows of `query` by `name`."""
        self._database.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return the few rows of a query."""
        with _naming_a_full_disk(self.spool):
            return self._database.execute(query).fetchall()

    def close(self) -> None:
        """Close the database, which is in memory."""
        self._database.close()

    def _run(self, work: Work, jobs: Sequence[tuple[Any, Path]], rows: int) -> Iterable[Any]:
        if min(self._processes, len(jobs)) < 2 or rows < SMALL_WORK:
            return map(work, *zip(*jobs, strict=True)) if jobs else ()
        with_parent = partial(_with_parent, work, os.getpid())
        return Parallel(self._processes, return_as="generator_unordered", batch_size=1)(
            delayed(with_parent)(job, folder) for job, folder in jobs
        )

    def _write(self, query: str, folder: Path) -> None:
        # V2 without dictionaries: columns are written as differences, in less time and room.
        options = "FORMAT parquet, PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT 1, COMPRESSION lz4_raw"
        options += f", ROW_GROUP_SIZE {ROWS_PER_READ}"
        with _naming_a_full_disk(folder):
            self._database.execute(f"COPY ({query}) TO {_quoted(str(folder / 'rows.parquet'))} ({options})")

    def _name(self, name: str, table: Table, *, ordered: bool) -> None:
        files = f"[{', '.join(map(_quoted, table.files))}]"
        if ordered:
            (file,) = table.files
            source = f"read_parquet({_quoted(file)}, file_row_number = true)"
            self.view(name, f"SELECT * EXCLUDE (file_row_number), file_row_number AS number FROM {source}")
        else:
            self.view(name, f"SELECT * FROM read_parquet({files})")


def _with_parent(work: Work, parent: int, job: Any, folder: Path) -> None:
    """Do a job of a process that is still there: one that was killed goes on by itself, maybe with something else."""
    if os.getppid() != parent:
        os._exit(0)
    work(job, folder)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def _naming_a_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except duckdb.IOException as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise
