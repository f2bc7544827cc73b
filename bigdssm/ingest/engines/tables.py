"""The intermediate files of ingestion steps: Parquet tables, and scalar results.

A step's output appears atomically: an existing folder is complete, and is never written again.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.utils.atomic import remove, sync, temporary_path

ROWS_PER_READ = 1 << 16
FIRST_ROW_DIGITS = 15  # files of ordered tables are named by their first row
MAX_BUFFERED_ROWS = 1 << 20


@dataclass(frozen=True)
class RowTable:
    """The concatenated rows of Parquet files."""

    files: tuple[str, ...]

    @classmethod
    def of(cls, files: Iterable[Path]) -> RowTable:
        """Return the table of these files."""
        return cls(tuple(map(str, files)))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(pq.read_metadata(file).num_rows for file in self.files))

    @property
    def size(self) -> int:
        """The total file size in bytes."""
        return sum(os.stat(file).st_size for file in self.files)

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
            yield from _rows_of(self.files[number], first - start, last - start, columns)
            first, number = last, number + 1

    def read(self, first: int = 0, end: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return rows [first, end) as one table."""
        schema = pq.read_schema(self.files[0])
        none = _with_wide_strings(schema.empty_table().select(columns or schema.names))
        return pa.concat_tables([none, *self.batches(first, end, columns)]).combine_chunks()


def _rows_of(file: str, first: int, end: int, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    with pq.ParquetFile(file, memory_map=True) as source:
        starts = [0, *accumulate(source.metadata.row_group(i).num_rows for i in range(source.num_row_groups))]
        groups = [i for i in range(source.num_row_groups) if starts[i + 1] > first and starts[i] < end]
        row = starts[groups[0]] if groups else 0
        for batch in source.iter_batches(ROWS_PER_READ, row_groups=groups, columns=columns and list(columns)):
            begin, stop = max(first - row, 0), min(end - row, batch.num_rows)
            row += batch.num_rows
            if stop > begin:
                yield _with_wide_strings(pa.Table.from_batches([batch.slice(begin, stop - begin)]))


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

    def __enter__(self) -> RowFile:
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
        rows = self._first(pa.concat_tables(self._buffer))
        self._buffer = [rows]
        if rows.num_rows > at_most:
            self._file.add(rows)
            self._buffer = []

    def _first(self, table: pa.Table) -> pa.Table:
        # dictionary codes are numbered by first occurrence, so a new maximum is a new value; no sort needed
        codes = table.column(self._key).combine_chunks().dictionary_encode().indices.to_numpy()
        first = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
        if len(first) == table.num_rows:
            return table
        rows = table.take(pa.array(first))
        if self._count is None:
            return rows
        counts = np.bincount(codes, table.column(self._count).to_numpy()).astype(np.int64)
        return rows.set_column(rows.schema.get_field_index(self._count), self._count, [counts])

    def __enter__(self) -> FirstRows:
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
    aside = temporary_path(folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}"))
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                sync(path)
        try:
            os.replace(aside, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        remove(aside)


def write_facts(folder: Path, **facts: object) -> None:
    """Write the scalar results of a step (row counts, minima, maxima)."""
    (folder / "facts.json").write_text(json.dumps(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the results written by `write_facts`."""
    return dict(json.loads((folder / "facts.json").read_text()))
