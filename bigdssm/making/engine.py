"""Who runs the steps of a making: functions over parts of the work, and queries over whole tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bigdssm.making.steps import Table, finished_folder
from bigdssm.progress import Progress, no_progress
from bigdssm.tables.source import Source

Work = Callable[[Any, Path], None]
"""Does a job, and leaves what comes of it in a folder; picklable, and a function of the job alone."""
SMALL_WORK = 200_000  # rows: fewer are done in this process, others take a second to start


class Engine(ABC):
    """Runs a making's steps in a spool folder; a step that is finished there is taken as it is.

    Queries are of the SQL that the engines share, over tables and views of earlier steps. An ordered table's view has
    the column `number` beside its own: the row's place in it, from 0.
    """

    def __init__(self, spool: Path, progress: Progress = no_progress) -> None:
        self.spool, self.progress = spool, progress
        spool.mkdir(parents=True, exist_ok=True)

    def map(self, step: str, jobs: Sequence[Any], work: Work, *, rows: int) -> list[Path]:
        """Have `work` do the jobs, about so many `rows` in all, and return their folders in the order of the jobs."""
        (self.spool / step).mkdir(exist_ok=True)
        folders = [self.spool / step / f"{number:06d}" for number in range(len(jobs))]
        left = [(job, folder) for job, folder in zip(jobs, folders, strict=True) if not folder.exists()]
        done = len(jobs) - len(left)
        for _ in self._run(_Finishing(work), left, rows):
            done += 1
            self.progress(step, done, len(jobs))
        return folders

    def table(self, name: str, files: Iterable[Path]) -> Table:
        """Return finished files as a table that queries know by `name`."""
        table = Table.of(files)
        self._name(name, table, ordered=False)
        return table

    def select(self, name: str, query: str, *, order: str) -> Table:
        """Return a query's rows sorted by `order`, which no two different rows share; queries know it by `name`."""
        folder = self.spool / name
        if not folder.exists():
            self.progress(f"sorting {name}", 0, None)
            with finished_folder(folder) as aside:
                self._write(f"{query} ORDER BY {order}", aside)
        table = Table.of(sorted(folder.glob("*.parquet")))
        self._name(name, table, ordered=True)
        return table

    def source(self, name: str, source: Source, columns: Sequence[str]) -> Source:
        """Return a source that workers read for `source`, of which they need `columns`; `name` is that of a step."""
        return source

    @abstractmethod
    def view(self, name: str, query: str) -> None:
        """Have queries know the rows of `query` by `name`."""

    @abstractmethod
    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return the few rows of a query."""

    def close(self) -> None:  # noqa: B027, some have nothing to close
        """Free what it holds; the spool stays."""

    @abstractmethod
    def _run(self, work: Work, jobs: Sequence[tuple[Any, Path]], rows: int) -> Iterable[Any]:
        """Do the jobs in any order, yielding something for each."""

    @abstractmethod
    def _write(self, query: str, folder: Path) -> None:
        """Write the rows of a query that has an order into Parquet files, that are named by their first rows."""

    @abstractmethod
    def _name(self, name: str, table: Table, *, ordered: bool) -> None:
        """Have queries know `table` by `name`."""


class _Finishing:
    """A work whose folder appears when it is done."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, job: Any, folder: Path) -> None:
        with finished_folder(folder) as aside:
            self._work(job, aside)
