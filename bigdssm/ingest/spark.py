"""The Apache Spark engine: jobs are tasks of workers (`mapInArrow`), queries are Spark SQL.

All workers must have access to the spool folder by the same path, because steps exchange files in it.
"""

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
from bigdssm.ingest.engines import (
    FIRST_ROW_DIGITS,
    ROWS_PER_READ,
    LocalEngine,
    RowTable,
    StepFunction,
    UnreadableTable,
    disk_full_errors,
    finished_folder,
)
from bigdssm.sources.base import Source, TableFile
from bigdssm.sources.columnar import ParquetSource
from bigdssm.sources.opening import SparkTable
from bigdssm.sources.text import require_columns
from bigdssm.utils.log import Progress, no_progress

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

MAX_DRIVER_BYTES = 128 << 20  # the default of DRIVER_BYTES_KEY
POLL_S = 1.0  # between polls of the tasks of Spark
ANSWERS = "number long, answer binary"
DEFAULTS: dict[str, str] = {"spark.app.name": "bigdssm", "spark.ui.showConsoleProgress": "false"}
DRIVER_BYTES_KEY = "spark.bigdssm.driverBytes"  # queries over at most this many bytes of files run on the driver
ERRORS: dict[str, Callable[..., BigDSSMError]] = {  # transferred from workers to the driver
    kind.__name__: kind for kind in (ConfigError, DataError, UnavailableError, UnreadableTable)
}


@dataclass(frozen=True)
class Cluster:
    """The Spark master and settings."""

    master: str | None = None  # None: from the settings or environment, else all local cores
    conf: tuple[tuple[str, str], ...] = ()


class SparkEngine(LocalEngine):
    """Runs large steps in the Spark session of this process, or in a new one.

    Every Spark query takes seconds, so queries over small tables run in DuckDB on the driver.
    """

    def __init__(self, spool: Path, progress: Progress = no_progress, *, cluster: Cluster = Cluster()) -> None:
        """Raises ConfigError: no pyspark, Java or session, or a worker cannot access the spool."""
        super().__init__(spool.resolve(), progress)
        progress("starting Spark", 0, None)
        self.session, self._owned = _session(cluster)
        # a new session: names of steps must not hide the user's tables and views
        self._steps = self.session.newSession()
        self._processes = self.session.sparkContext.defaultParallelism
        self._bytes: dict[str, int] = {}  # upper bound on the file sizes behind tables and views
        self._unregistered: dict[str, Callable[[], object]] = {}  # registers a name in Spark, at its first use
        try:
            for name, value in () if self._owned else cluster.conf:
                try:
                    self._steps.conf.set(name, value)
                except Exception as error:  # any Java exception
                    raise ConfigError(f"{name} cannot be set in an existing Spark session: {_line(error)}") from error
            self._max_driver_bytes = self._read_max_driver_bytes()
            # all workers need access to the spool folder
            token = self.spool / f"seen-{uuid.uuid4().hex}"
            token.touch()
            try:
                with _spark_errors(self.spool):
                    answers = self._tasks(
                        lambda _: None if token.exists() else socket.gethostname().encode(), self._processes
                    ).collect()
            finally:
                token.unlink(missing_ok=True)
            if hosts := sorted({answer.decode() for _, answer in answers if answer is not None}):
                raise ConfigError(
                    f"Spark's worker on {hosts[0]} cannot access {self.spool}; choose an --out on a disk that this "
                    "machine and all workers share, by one path"
                )
        except BaseException:
            self.close()
            raise

    def view(self, name: str, query: str) -> None:
        """Create or replace a view for queries."""
        super().view(name, query)
        used = self._used(query)
        self._bytes[name] = sum(self._bytes[other] for other in used)
        self._unregistered[name] = partial(self._sql, f"CREATE OR REPLACE TEMPORARY VIEW {name} AS {query}", used)

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return all rows of a query with a small result."""
        if self._is_small(query):
            return super().fetch(query)
        with _spark_errors(self.spool):
            return [tuple(row) for row in self._sql(query, self._used(query)).collect()]

    def close(self) -> None:
        """Stop the session, unless it existed before."""
        super().close()
        if self._owned:
            self.session.stop()

    def source(self, name: str, source: Source, columns: Sequence[str]) -> Source:
        """Write a Spark table or query to Parquet files in the spool, sorted by `columns`.

        The result does not depend on Spark's partitions, and an interrupted ingestion resumes with the same rows.
        Raises DataError: it cannot be read, or lacks a column.
        """
        if not isinstance(source, SparkTable):
            return source
        folder = self.spool / name
        if not folder.exists():
            self.progress(f"reading {source.name}", 0, None)
            try:
                frame = self.session.sql(source.query)
            except Exception as error:  # any Java exception
                raise DataError(f"{source.name}: Spark cannot resolve it: {_line(error)}") from error
            require_columns(source.name, frame.columns, columns)
            quoted = [f"`{column.replace('`', '``')}`" for column in columns]
            with finished_folder(folder) as unfinished, _spark_errors(unfinished):
                _write_numbered(frame.select(*quoted).orderBy(*quoted), unfinished)
        return ParquetSource(*map(TableFile, sorted(folder.glob("*.parquet"))), name=source.name)

    def _read_max_driver_bytes(self) -> int:
        given = str(self._steps.conf.get(DRIVER_BYTES_KEY, str(MAX_DRIVER_BYTES)))
        if not re.fullmatch(r"\d+", given):
            raise ConfigError(
                f"{DRIVER_BYTES_KEY}={given}: needs an integer number of bytes, such as {MAX_DRIVER_BYTES}"
            )
        return int(given)

    def _spread(self, work: StepFunction, jobs: Sequence[tuple[Any, Path]]) -> Iterator[Path]:
        """Yield the folders of jobs as they finish. Raises the error of the first failed job."""
        tasks, tag = self._tasks(partial(_do, work, jobs, os.getcwd()), len(jobs)), f"bigdssm-{uuid.uuid4().hex}"

        def collect() -> list[Any]:
            self._steps.addTag(tag)
            with _spark_errors(self.spool):
                return tasks.collect()

        remaining = [folder for _, folder in jobs]
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(collect)
            try:
                while not answers.done():
                    wait([answers], POLL_S)
                    finished = {folder for folder in remaining if folder.exists()}
                    remaining = [folder for folder in remaining if folder not in finished]
                    yield from finished
            except BaseException:
                self._steps.interruptTag(tag)
                raise
        if failed := sorted((number, answer) for number, answer in answers.result() if answer is not None):
            raise _error_of(failed[0][1])
        yield from remaining

    def _tasks(self, answer: Callable[[int], bytes | None], number: int) -> "DataFrame":
        """Return a DataFrame of the answers of `number` tasks, called with their numbers from 0."""
        return self._steps.range(0, number, 1, number).mapInArrow(partial(_answers, answer), ANSWERS)

    def _write(self, query: str, folder: Path) -> None:
        if self._is_small(query):
            super()._write(query, folder)
            return
        with _spark_errors(folder):
            _write_numbered(self._sql(query, self._used(query)), folder)

    def _register(self, name: str, table: RowTable, *, ordered: bool) -> None:
        super()._register(name, table, ordered=ordered)
        self._bytes[name] = sum(os.stat(file).st_size for file in table.files)

        def register() -> None:
            # as URLs, with glob characters escaped
            files = ["file://" + re.sub(r"([*?\[\]{}\\])", r"\\\1", file) for file in table.files]
            frame = self._steps.read.parquet(*files)
            if ordered:
                first_row = f"CAST(left(_metadata.file_name, {FIRST_ROW_DIGITS}) AS BIGINT)"
                frame = frame.selectExpr("*", f"{first_row} + _metadata.row_index AS number")
            frame.createOrReplaceTempView(name)

        self._unregistered[name] = register

    def _used(self, query: str) -> set[str]:
        """Return the registered names in a query, possibly with false positives."""
        return self._bytes.keys() & set(re.findall(r"\w+", query))

    def _is_small(self, query: str) -> bool:
        return sum(self._bytes[name] for name in self._used(query)) <= self._max_driver_bytes

    def _sql(self, query: str, used: Iterable[str]) -> "DataFrame":
        """Run a query in Spark, after registering the names in it."""
        for name in used:
            if register := self._unregistered.pop(name, None):
                register()
        return self._steps.sql(query)


def _answers(answer: Callable[[int], bytes | None], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Return `answer(number)` of each task to the driver, through `mapInArrow`."""
    for batch in batches:
        numbers = batch.column(0)
        answers = pa.array(map(answer, numbers.to_pylist()), pa.binary())
        yield pa.RecordBatch.from_arrays([numbers, answers], ["number", "answer"])


def _do(work: StepFunction, jobs: Sequence[tuple[Any, Path]], home: str, number: int) -> bytes | None:
    """Run a job, and return a permanent error; on other errors Spark retries."""
    job, folder = jobs[number]
    with suppress(OSError):
        os.chdir(home)  # for relative paths
    try:
        if not folder.exists():
            work(job, folder)
    except BigDSSMError as error:
        return json.dumps([type(error).__name__, *error.args]).encode()
    return None


def _error_of(answer: bytes) -> BigDSSMError:
    """Restore an error returned by `_do`."""
    name, *args = json.loads(answer)
    return ERRORS.get(name, DataError)(*args)


def _write_numbered(frame: "DataFrame", folder: Path) -> None:
    """Write a sorted frame to `folder` as Parquet files that are named by their first row."""
    parts = folder / "parts"
    options = {"compression": "zstd", "parquet.block.row.count.limit": str(ROWS_PER_READ)}
    frame.write.options(**options).parquet(f"file://{parts}")  # not a glob here
    rows = {file: pq.read_metadata(file).num_rows for file in sorted(parts.glob("part-*.parquet"))}
    files = [file for file, count in rows.items() if count] or list(rows)[:1]
    for file, first in zip(files, accumulate((rows[file] for file in files), initial=0), strict=False):
        os.replace(file, folder / f"{first:0{FIRST_ROW_DIGITS}d}.parquet")
    shutil.rmtree(parts)


def _session(cluster: Cluster) -> "tuple[SparkSession, bool]":
    """Return a Spark session, and whether it is new."""
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise ConfigError("the engine spark needs pyspark; pip install 'bigdssm[spark]'") from None
    if (active := SparkSession.getActiveSession()) is not None:
        if cluster.master not in (None, active.sparkContext.master):
            raise ConfigError(
                f"this process already has a Spark session on {active.sparkContext.master}, not on {cluster.master}: "
                "leave out the master, or stop the session"
            )
        return active, False
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    if shutil.which(java) is None:
        raise ConfigError(
            f"the engine spark needs Java 17 or newer, but there is no {java}; install it, or set JAVA_HOME"
        )
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the default is the first python3
    builder = SparkSession.builder.config(map=DEFAULTS | dict(cluster.conf))
    if cluster.master is not None:
        builder = builder.master(cluster.master)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # any Java exception
        raise ConfigError(
            f"no Spark session can be created on {cluster.master or 'local[*]'}: {_line(error)}"
        ) from error
    session.sparkContext.setLogLevel("ERROR")
    return session, True


@contextmanager
def _spark_errors(folder: Path) -> Iterator[None]:
    """Convert Spark's exceptions to BigDSSMError, disk-full errors to OSError."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        with disk_full_errors(folder):
            yield
    except (PySparkException, Py4JError) as error:
        raise BigDSSMError(f"Spark failed in {folder}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Return the most informative line of an error, which in tracebacks is not the first."""
    text = str(error).strip() or repr(error)
    messages = re.findall(r"^(?:: )?[\w.]*(?:Error|Exception): .*$", text, re.MULTILINE)
    return str([*messages, *text.splitlines()][0])[:300]
