"""The interface of an ingestion's engines, and the local one: jobs in local processes, SQL queries in DuckDB.

Steps exchange files: Parquet tables, and scalar results. A step's output appears atomically: an existing folder is
complete, and is never written again. Large sorts are jobs, too: rows are partitioned into buckets, which are in sort
order, and each bucket is sorted; within a bucket, rows are in the order of their table.
"""

import errno
import json
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor, as_completed

from bigdssm.errors import DataError
from bigdssm.sources.base import Source
from bigdssm.utils.atomic import remove, sync, temporary_path
from bigdssm.utils.log import Progress, no_progress

ROWS_PER_READ = 1 << 16
FIRST_ROW_DIGITS = 15  # files of ordered tables are named by their first row
MAX_BUFFERED_ROWS = 1 << 20
StepFunction = Callable[[Any, Path], None]
"""Runs a job and writes its output to a folder; picklable, deterministic in the job."""
SMALL_WORK = 200_000  # rows; fewer run in this process, because starting others takes a second
MEMORY = "1500MB"  # for queries; larger sorts spill to disk
MAX_THREADS = 12  # supported by this memory limit
ROWS_PER_BUCKET_JOB = 1 << 20
ROWS_PER_BUCKET = 1 << 21  # approximate; sorted in memory
BUCKETS, SORTED = "rows.arrow", "rows.parquet"
MAX_INT64 = (1 << 63) - 1
_IPC = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)

Assign = Callable[[pa.Table], tuple[pa.Table, np.ndarray]]
"""From rows to (the columns to keep, the bucket number of each row, from 0); picklable."""


@dataclass(frozen=True)
class RowTable:
    """The concatenated rows of Parquet files."""

    files: tuple[str, ...]

    @classmethod
    def of(cls, files: Iterable[Path]) -> "RowTable":
        """Return the table of these files."""
        return cls(tuple(map(str, files)))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(pq.read_metadata(file).num_rows for file in self.files))

    @property
    def num_rows(self) -> int:
        """The number of rows in all files."""
        return self._ends[-1] if self.files else 0

    def batches(
        self, first: int = 0, end: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Yield rows [first, end) in chunks of at most ROWS_PER_READ."""
        end = self.num_rows if end is None else min(end, self.num_rows)
        number = bisect_right(self._ends, first)
        while first < end:
            start = self._ends[number - 1] if number else 0
            last = min(end, self._ends[number])
            with pq.ParquetFile(self.files[number], memory_map=True) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                ends = list(accumulate(sizes, initial=start))
                groups = [i for i in range(len(sizes)) if ends[i + 1] > first and ends[i] < last]
                row = ends[groups[0]] if groups else start
                for batch in file.iter_batches(ROWS_PER_READ, row_groups=groups, columns=columns and list(columns)):
                    begin, stop = max(first - row, 0), min(last - row, batch.num_rows)
                    row += batch.num_rows
                    if stop > begin:
                        yield _with_wide_strings(pa.Table.from_batches([batch.slice(begin, stop - begin)]))
            first, number = last, number + 1

    def read(self, first: int = 0, end: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return rows [first, end) as one table."""
        schema = pq.read_schema(self.files[0])
        none = _with_wide_strings(schema.empty_table().select(columns or schema.names))
        return pa.concat_tables([none, *self.batches(first, end, columns)]).combine_chunks()


def ranges(table: RowTable, rows: int) -> list[tuple[int, int]]:
    """Divide a table into ranges [first, end) of `rows` rows, the last possibly shorter."""
    return [(first, min(first + rows, table.num_rows)) for first in range(0, table.num_rows, rows)]


class RowFile:
    """Writes one Parquet file, table by table; a file without rows still has the schema."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="lz4", use_dictionary=False)

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if table.num_rows:
            self._writer.write_table(table.cast(self.schema), row_group_size=ROWS_PER_READ)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()


def _with_wide_strings(table: pa.Table) -> pa.Table:
    """Cast strings to 64-bit offsets, so that large tables can be concatenated."""
    wide = [field.with_type(pa.large_string()) if pa.types.is_string(field.type) else field for field in table.schema]
    return table.cast(pa.schema(wide))


class FirstRows:
    """Best-effort deduplication by key in bounded memory, keeping first rows.

    SQL removes the rest. Keys are int64. A column `count` is summed over a key's rows. As a context manager it writes
    the buffered rows.
    """

    def __init__(self, file: RowFile, key: str, count: str | None = None) -> None:
        self._file, self._key, self._count = file, key, count
        self._buffer: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Add the next rows."""
        self._buffer.append(table)
        if sum(table.num_rows for table in self._buffer) > MAX_BUFFERED_ROWS:
            self._reduce(at_most=MAX_BUFFERED_ROWS // 2)

    def _reduce(self, at_most: int) -> None:
        """Deduplicate the buffer, and write it if more rows remain."""
        rows = pa.concat_tables(self._buffer)
        # dictionary codes are numbered by first occurrence, so a new maximum is a new value; no sort needed
        codes = rows.column(self._key).combine_chunks().dictionary_encode().indices.to_numpy()
        first = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
        if len(first) < rows.num_rows and self._count is not None:
            sums = np.bincount(codes, rows.column(self._count).to_numpy()).astype(np.int64)
            rows = rows.take(pa.array(first)).set_column(rows.schema.get_field_index(self._count), self._count, [sums])
        elif len(first) < rows.num_rows:
            rows = rows.take(pa.array(first))
        self._buffer = [rows]
        if rows.num_rows > at_most:
            self._file.add(rows)
            self._buffer = []

    def __enter__(self) -> "FirstRows":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None and self._buffer:
            self._reduce(at_most=0)


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, renamed to `folder` at the end unless it exists.

    Its name is unique, because a worker of a killed ingestion may still run the same step. The parent folder is not
    created, so that such a worker fails once its spool is deleted.
    """
    unfinished = temporary_path(folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}"))
    unfinished.mkdir()
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                sync(path)
        try:
            os.replace(unfinished, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        remove(unfinished)


class UnreadableTable(DataError):
    """A fatal error in a table: the message, and the last bad rows before it."""

    def __str__(self) -> str:
        return str(self.args[0])


def write_facts(folder: Path, **facts: object) -> None:
    """Write the scalar results of a step (row counts, minima, maxima)."""
    (folder / "facts.json").write_text(json.dumps(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the results written by `write_facts`."""
    return dict(json.loads((folder / "facts.json").read_text()))


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
        self._database = duckdb.connect(
            config={
                "memory_limit": MEMORY,
                "temp_directory": str(spool / "sorting"),
                "threads": min(self._processes, MAX_THREADS),
            }
        )
        with suppress(duckdb.InvalidInputException):  # raised in Jupyter without widgets
            self._database.execute("SET enable_progress_bar = false")  # it would interfere with the ingestion's own bar

    def map(self, step: str, jobs: Sequence[Any], work: StepFunction, *, rows: int) -> list[Path]:
        """Run `work` on all jobs (about `rows` rows in total), and return their folders in order."""
        (self.spool / step).mkdir(exist_ok=True)
        folders = [self.spool / step / f"{number:06d}" for number in range(len(jobs))]
        remaining = [(job, folder) for job, folder in zip(jobs, folders, strict=True) if not folder.exists()]
        done = len(jobs) - len(remaining)
        in_process = min(self._processes, len(remaining)) < 2 or rows < SMALL_WORK
        finish = partial(_finish, work)
        for _ in starmap(finish, remaining) if in_process else self._spread(finish, remaining):
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
            with finished_folder(folder) as unfinished:
                self._write(f"{query} ORDER BY {order}", unfinished)
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

    def _spread(self, work: Callable[..., None], jobs: Sequence[tuple[Any, Path]]) -> Iterator[Any]:
        """Run the jobs (`_finish`) in any order, yielding as they finish.

        Raises the error of the first failed job.
        """
        if self._pool is None:
            # not joblib's shared pool, which would stay alive for five minutes
            self._pool = ProcessPoolExecutor(self._processes, env={"OMP_NUM_THREADS": "1"})
        futures = [self._pool.submit(work, job, folder, parent=os.getpid()) for job, folder in jobs]
        try:
            for finished in as_completed(futures):
                yield finished.result()
        finally:
            for future in futures:
                future.cancel()

    def _write(self, query: str, folder: Path) -> None:
        """Write the rows of an ordered query to Parquet files named by their first row."""
        # V2 without dictionaries: delta encodings, faster and smaller
        options = "FORMAT parquet, PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT 1, COMPRESSION lz4_raw"
        options += f", ROW_GROUP_SIZE {ROWS_PER_READ}"
        file = _quoted(f"{folder}/{0:0{FIRST_ROW_DIGITS}d}.parquet")
        with disk_full_errors(folder):
            self._database.execute(f"COPY ({query}) TO {file} ({options})")

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


def _finish(work: StepFunction, job: Any, folder: Path, parent: int | None = None) -> None:
    """Run a job; its folder appears when it has finished.

    Unless the process `parent` is gone: workers of a killed ingestion must not write.
    """
    if parent is not None and os.getppid() != parent:
        os._exit(0)
    with finished_folder(folder) as unfinished:
        work(job, unfinished)


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


def write_buckets(
    engine: LocalEngine,
    step: str,
    table: RowTable,
    assign: Assign,
    num_buckets: int,
    columns: Sequence[str] | None = None,
) -> list[Path]:
    """Partition a table's rows into buckets, for `read_bucket`; `assign` gets the given columns.

    Returns a folder per range of the table, each with a file of one batch per bucket.
    """
    work = partial(_write_buckets, table, columns, assign, num_buckets)
    return engine.map(step, ranges(table, ROWS_PER_BUCKET_JOB), work, rows=table.num_rows)


def _write_buckets(
    table: RowTable, columns: Sequence[str] | None, assign: Assign, num_buckets: int, job: tuple[int, int], folder: Path
) -> None:
    rows, bucket = assign(table.read(*job, columns))
    # The smallest type, since a stable sort of small integers is a radix sort.
    order = np.argsort(bucket.astype(np.min_scalar_type(num_buckets)), kind="stable")
    (batch,) = rows.take(pa.array(order)).combine_chunks().to_batches()
    ends = np.cumsum(np.bincount(bucket, minlength=num_buckets))
    with pa.OSFile(str(folder / BUCKETS), "wb") as sink, pa.ipc.new_file(sink, batch.schema, options=_IPC) as writer:
        for first, end in pairwise([0, *ends.tolist()]):
            writer.write_batch(batch.slice(first, end - first))


def read_bucket(folders: Sequence[Path], bucket: int) -> pa.Table:
    """Read all rows of a bucket."""
    pieces = []
    for folder in folders:
        with pa.memory_map(str(folder / BUCKETS)) as source:
            pieces.append(pa.ipc.open_file(source).get_batch(bucket))
    return pa.Table.from_batches(pieces).combine_chunks()


def float_sort_keys(numbers: np.ndarray) -> np.ndarray:
    """Map float64 to int64 in order, adjacent floats to adjacent integers."""
    bits = (numbers + 0.0).view(np.int64)  # −0.0 becomes 0.0
    return np.where(bits >= 0, bits, bits ^ MAX_INT64)


def sort_key_to_float(key: int) -> float:
    """Invert `float_sort_keys` for one value."""
    return float(np.int64(key if key >= 0 else key ^ MAX_INT64).view(np.float64))


def stable_order(numbers: np.ndarray) -> np.ndarray:
    """Return the stable sorting order of float64 [n], int64.

    By 16-bit radix, twice as fast as np.argsort.
    """
    keys = float_sort_keys(numbers)
    left = (keys - keys.min(initial=0)).view(np.uint64)
    order = np.arange(len(numbers))
    for shift in range(0, 64, 16):
        digit = (left >> np.uint64(shift)).astype(np.uint16)
        if digit.any():
            order = order[np.argsort(digit[order], kind="stable")]
    return order


def shuffled(engine: LocalEngine, name: str, table: RowTable, columns: Sequence[str]) -> RowTable:
    """Return the given columns with rows sorted by `shuffle`, a column of distinct int64 hashes."""
    bits = max(0, int(np.ceil(np.log2(max(1, table.num_rows) / ROWS_PER_BUCKET))))
    buckets = write_buckets(
        engine, f"buckets_{name}", table, partial(_by_first_bits, bits), 1 << bits, [*columns, "shuffle"]
    )
    folders = engine.map(name, range(1 << bits), partial(_sort_by_shuffle, buckets), rows=table.num_rows)
    return RowTable.of(folder / SORTED for folder in folders)


def _by_first_bits(bits: int, rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    # The sign bit is inverted: unsigned hashes in the order of the signed numbers.
    hashes = rows.column("shuffle").to_numpy().view(np.uint64) ^ np.uint64(1 << 63)
    return rows, (hashes >> np.uint64(64 - bits) if bits else np.zeros_like(hashes)).astype(np.int64)


def _sort_by_shuffle(folders: Sequence[Path], bucket: int, folder: Path) -> None:
    rows = read_bucket(folders, bucket)
    order = np.argsort(rows.column("shuffle").to_numpy())
    rows = rows.drop_columns("shuffle")
    with RowFile(folder / SORTED, rows.schema) as file:
        file.add(rows.take(pa.array(order)))
