"""Apache Spark as the engine: jobs are tasks of its workers (`mapInArrow`), queries are its SQL.

Every worker must see the spool folder, by one path: that is how steps hand over their files, here as on one machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.errors import BigDSSMError, ConfigError, DataError, UnavailableError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.ingest.engines.local import LocalEngine, StepFunction, naming_a_full_disk
from bigdssm.ingest.engines.tables import FIRST_ROW_DIGITS, ROWS_PER_READ, RowTable, finished_folder
from bigdssm.ingest.reading import Unreadable
from bigdssm.ingest.sources.base import Part, Source
from bigdssm.ingest.sources.columnar import ParquetSource
from bigdssm.ingest.sources.files import LocalFile
from bigdssm.ingest.sources.registry import open_source
from bigdssm.ingest.sources.text import require_columns
from bigdssm.utils.log import Progress, no_progress

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


POLL_S = 1.0
PREFIX = "spark:"
QUERY = re.compile(r"[\s(]*(select|with|from|values|table)\b", re.IGNORECASE)
ANSWERS = "number long, answer binary"
DEFAULTS: dict[str, str] = {"spark.app.name": "bigdssm", "spark.ui.showConsoleProgress": "false"}
ON_DRIVER = "spark.bigdssm.driverBytes"  # of tables, in their files: queries over as much are the driver's own
ERRORS: dict[str, Callable[..., BigDSSMError]] = {  # that jobs raise
    kind.__name__: kind for kind in (ConfigError, DataError, UnavailableError, Unreadable)
}
MOST_ON_DRIVER = 128 << 20  # where the settings do not say


@dataclass(frozen=True)
class Cluster:
    """Where Spark runs, and with what settings."""

    master: str | None = None  # None: what the settings or the environment say, else all cores of this machine
    conf: tuple[tuple[str, str], ...] = ()


class SparkTable(Source):
    """A table that the Spark session knows, or a query of its SQL; the engine makes files of it, which are read."""

    def __init__(self, text: str) -> None:
        """`text` is what stands behind `spark:`, such as db.events, parquet.`/path` or SELECT …"""
        self._text, self.name = text, f"{PREFIX}{text}"

    def fingerprint(self) -> str:
        """Return its text: what it gave when a making began stays what the making is of."""
        return self.name

    def size(self) -> int:
        """Return 0: nobody knows before it is read."""
        return 0

    def split(self) -> Sequence[Part]:
        """Raise ConfigError: the engine is another one."""
        raise ConfigError(f"{self.name} is read by Spark; give --engine spark (engine='spark'), or a file")

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Is never called: there are no parts."""
        raise NotImplementedError

    def frame(self, session: SparkSession) -> DataFrame:
        """Return the table. Raises DataError where Spark cannot."""
        query = self._text if QUERY.match(self._text) else f"SELECT * FROM {self._text}"
        try:
            return session.sql(query)
        except Exception as error:  # whatever Java raises
            raise DataError(f"{self.name}: Spark does not understand it: {_line(error)}") from error


def open_table(table: str | Path | Source) -> Source:
    """Return the table at a path or URL, or behind `spark:`; a source as it is. Raises what `open_source` does."""
    if isinstance(table, Source):
        return table
    text = str(table)
    return SparkTable(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else open_source(table)


class SparkEngine(LocalEngine):
    """Runs what is large in the Spark session of this process or, where there is none, in one of its own.

    A query costs Spark seconds, however few the rows: those over small tables are the driver's, as the built-in
    engine's are.
    """

    def __init__(self, spool: Path, progress: Progress = no_progress, *, cluster: Cluster = Cluster()) -> None:
        """Raises ConfigError: pyspark or Java is missing, no session can be had, or a worker does not see the spool."""
        super().__init__(spool.resolve(), progress)
        progress("starting Spark", 0, None)
        self.session, self._owned = _session(cluster)
        # Names of steps must not hide the session's own tables and views.
        self._steps = self.session.newSession()
        self._processes = self.session.sparkContext.defaultParallelism
        self._bytes: dict[str, int] = {}  # of the files that tables and views are made of, at most
        self._untold: dict[str, Callable[[], object]] = {}  # tells Spark of a name, when a query needs it
        try:
            self._set(cluster.conf)
            self._most_on_driver = self._read_most_on_driver()
            self._check_workers()
        except BaseException:
            self.close()
            raise

    def view(self, name: str, query: str) -> None:
        """Have queries know the rows of `query` by `name`."""
        super().view(name, query)
        used = self._used(query)
        self._bytes[name] = self._size(used)
        self._untold[name] = partial(self._sql, f"CREATE OR REPLACE TEMPORARY VIEW {name} AS {query}", used)

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return the few rows of a query."""
        if self._is_small(query):
            return super().fetch(query)
        with _telling(self.spool):
            return [tuple(row) for row in self._sql(query, self._used(query)).collect()]

    def close(self) -> None:
        """Stop the session, unless it was there before."""
        super().close()
        if self._owned:
            self.session.stop()

    def source(self, name: str, source: Source, columns: Sequence[str]) -> Source:
        """Return a table, or query, that the session knows as Parquet files in the spool, sorted by `columns`.

        So it does not matter how Spark parts it, and a making that was killed goes on with the same rows.
        Raises DataError: it cannot be read, or lacks a column.
        """
        if not isinstance(source, SparkTable):
            return source
        folder = self.spool / name
        if not folder.exists():
            self.progress(f"reading {source.name}", 0, None)
            frame = source.frame(self.session)
            require_columns(source.name, frame.columns, columns)
            own = [f"`{column.replace('`', '``')}`" for column in columns]
            with finished_folder(folder) as aside, _telling(aside):
                _write_numbered(frame.select(*own).orderBy(*own), aside)
        return ParquetSource(*map(LocalFile, sorted(folder.glob("*.parquet"))), name=source.name)

    def _set(self, conf: Iterable[tuple[str, str]]) -> None:
        """Set what is given for a session that was there before. Raises ConfigError where it cannot be set any more."""
        for name, value in () if self._owned else conf:
            try:
                self._steps.conf.set(name, value)
            except Exception as error:  # whatever Java raises
                raise ConfigError(f"{name} cannot be set in a Spark session that is there: {_line(error)}") from error

    def _read_most_on_driver(self) -> int:
        given = str(self._steps.conf.get(ON_DRIVER, str(MOST_ON_DRIVER)))
        if not re.fullmatch(r"\d+", given):
            raise ConfigError(f"{ON_DRIVER}={given}: needs a whole number of bytes, such as {MOST_ON_DRIVER}")
        return int(given)

    def _check_workers(self) -> None:
        """Raise ConfigError where a worker does not see the spool folder."""
        token = self.spool / f"seen-{uuid.uuid4().hex}"
        token.touch()
        try:
            with _telling(self.spool):
                answers = self._tasks(partial(_blind, token), self._processes).collect()
        finally:
            token.unlink(missing_ok=True)
        if blind := sorted({answer.decode() for _, answer in answers if answer is not None}):
            raise ConfigError(
                f"Spark's worker on {blind[0]} does not see {self.spool}; choose an --out on a disk that this machine "
                "and all workers share, by one path"
            )

    def _spread(self, work: StepFunction, jobs: Sequence[tuple[Any, Path]]) -> Iterator[Path]:
        """Yield the folders of jobs as they are finished. Raises what the first job that failed raised."""
        tasks, tag = self._tasks(partial(_do, work, jobs, os.getcwd()), len(jobs)), f"bigdssm-{uuid.uuid4().hex}"

        def collect() -> list[Any]:
            self._steps.addTag(tag)
            with _telling(self.spool):
                return tasks.collect()

        left = [folder for _, folder in jobs]
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(collect)
            try:
                while not answers.done():
                    wait([answers], POLL_S)
                    finished = {folder for folder in left if folder.exists()}
                    left = [folder for folder in left if folder not in finished]
                    yield from finished
            except BaseException:
                self._steps.interruptTag(tag)
                raise
        if failed := sorted((number, answer) for number, answer in answers.result() if answer is not None):
            raise _error_of(failed[0][1])
        yield from left

    def _tasks(self, answer: Callable[[int], bytes | None], number: int) -> DataFrame:
        """Return what so many tasks answer, each to its number from 0 on."""
        return self._steps.range(0, number, 1, number).mapInArrow(partial(_answers, answer), ANSWERS)

    def _write(self, query: str, folder: Path) -> None:
        if self._is_small(query):
            super()._write(query, folder)
            return
        with _telling(folder):
            _write_numbered(self._sql(query, self._used(query)), folder)

    def _name(self, name: str, table: RowTable, *, ordered: bool) -> None:
        super()._name(name, table, ordered=ordered)
        self._bytes[name] = table.size
        self._untold[name] = partial(self._define, name, table, ordered)

    def _define(self, name: str, table: RowTable, ordered: bool) -> None:
        frame = self._steps.read.parquet(*map(_location, table.files))
        if ordered:
            first_row = f"CAST(left(_metadata.file_name, {FIRST_ROW_DIGITS}) AS BIGINT)"
            frame = frame.selectExpr("*", f"{first_row} + _metadata.row_index AS number")
        frame.createOrReplaceTempView(name)

    def _used(self, query: str) -> set[str]:
        """Return the names that a query knows, maybe some too many."""
        return self._bytes.keys() & set(re.findall(r"\w+", query))

    def _size(self, names: Iterable[str]) -> int:
        return sum(map(self._bytes.__getitem__, names))

    def _is_small(self, query: str) -> bool:
        return self._size(self._used(query)) <= self._most_on_driver

    def _sql(self, query: str, used: Iterable[str]) -> DataFrame:
        """Return what Spark makes of a query, after it has been told the names that it uses."""
        for name in used:
            if tell := self._untold.pop(name, None):
                tell()
        return self._steps.sql(query)


def _answers(answer: Callable[[int], bytes | None], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Tell the driver, through `mapInArrow`, what `answer` says of the numbers of tasks."""
    for batch in batches:
        numbers = batch.column(0)
        answers = pa.array(map(answer, numbers.to_pylist()), pa.binary())
        yield pa.RecordBatch.from_arrays([numbers, answers], ["number", "answer"])


def _blind(file: Path, number: int) -> bytes | None:
    """Return the worker's host where it does not see a file."""
    return None if file.exists() else socket.gethostname().encode()


def _do(work: StepFunction, jobs: Sequence[tuple[Any, Path]], home: str, number: int) -> bytes | None:
    """Do a job, and return the error that no second attempt would mend; after any other Spark tries again."""
    job, folder = jobs[number]
    with suppress(OSError):
        os.chdir(home)  # where relative paths begin
    try:
        if not folder.exists():
            work(job, folder)
    except BigDSSMError as error:
        return json.dumps([type(error).__name__, *error.args]).encode()
    return None


def _error_of(answer: bytes) -> BigDSSMError:
    """Return the error that `_do` told."""
    name, *told = json.loads(answer)
    return ERRORS.get(name, DataError)(*told)


def _write_numbered(frame: DataFrame, folder: Path) -> None:
    """Write a sorted frame into `folder` as Parquet files that have the number of their first row as names."""
    parts = folder / "parts"
    options = {"compression": "zstd", "parquet.block.row.count.limit": str(ROWS_PER_READ)}
    frame.write.options(**options).parquet(f"file://{parts}")  # a pattern is none here
    rows = {file: pq.read_metadata(file).num_rows for file in sorted(parts.glob("part-*.parquet"))}
    kept = [file for file, count in rows.items() if count] or list(rows)[:1]
    for file, first in zip(kept, accumulate((rows[file] for file in kept), initial=0), strict=False):
        os.replace(file, folder / f"{first:0{FIRST_ROW_DIGITS}d}.parquet")
    shutil.rmtree(parts)


def _location(path: Path | str) -> str:
    """Return a path as Spark takes one: a plain file of each machine, whatever the cluster's default is, no pattern."""
    return "file://" + "".join(f"\\{character}" if character in "*?[]{}\\" else character for character in str(path))


def _session(cluster: Cluster) -> tuple[SparkSession, bool]:
    """Return a Spark session, and whether it was made for this."""
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise ConfigError("the engine spark needs pyspark; pip install 'bigdssm[spark]'") from None
    if (active := SparkSession.getActiveSession()) is not None:
        if cluster.master not in (None, active.sparkContext.master):
            raise ConfigError(
                f"this process has a Spark session on {active.sparkContext.master} already, not on {cluster.master}: "
                "leave out the master, or stop the session"
            )
        return active, False
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    if shutil.which(java) is None:
        raise ConfigError(
            f"the engine spark needs Java 17 or newer, but there is no {java}; install it, or set JAVA_HOME"
        )
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else Spark takes the first python3
    builder = SparkSession.builder.config(map=DEFAULTS | dict(cluster.conf))
    if cluster.master is not None:
        builder = builder.master(cluster.master)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # whatever Java raises
        raise ConfigError(f"no Spark session can be had on {cluster.master or 'local[*]'}: {_line(error)}") from error
    session.sparkContext.setLogLevel("ERROR")
    return session, True


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Turn what Spark raises into a sentence, a full disk into the system's error."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        with naming_a_full_disk(folder):
            yield
    except (PySparkException, Py4JError) as error:
        raise BigDSSMError(f"Spark could not do its work in {folder}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Return the line of an error that says what is wrong: a traceback's, of Python or Java, is not the first."""
    text = str(error).strip() or repr(error)
    named = re.findall(r"^(?:: )?[\w.]*(?:Error|Exception): .*$", text, re.MULTILINE)
    return str([*named, *text.splitlines()][0])[:300]
