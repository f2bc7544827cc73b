"""What the steps of a making leave behind: tables of rows in Parquet files, which are all that one step tells another.

A step's files appear whole: what is there is finished, and is never made twice.
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
FIRST_ROW_DIGITS = 15  # of an ordered table's file, which is named by its first row
MOST_WAITING = 1 << 20


@dataclass(frozen=True)
class RowTable:
    """Rows in Parquet files, in the order of the files; row i is the i-th of them all."""

    files: tuple[str, ...]

    @classmethod
    def of(cls, files: Iterable[Path]) -> RowTable:
        """Return the table that these files are."""
        return cls(tuple(map(str, files)))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(pq.read_metadata(file).num_rows for file in self.files))

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(os.stat(file).st_size for file in self.files)

    @property
    def num_rows(self) -> int:
        """Return the rows of all files."""
        return self._ends[-1] if self.files else 0

    def batches(
        self, first: int = 0, end: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Yield rows [first, end) in pieces of at most ROWS_PER_READ; only the row groups they stand in are read."""
        end = self.num_rows if end is None else min(end, self.num_rows)
        number = bisect_right(self._ends, first)
        while first < end:
            start = self._ends[number - 1] if number else 0
            last = min(end, self._ends[number])
            yield from _rows_of(self.files[number], first - start, last - start, columns)
            first, number = last, number + 1

    def read(self, first: int = 0, end: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return rows [first, end) at once."""
        schema = pq.read_schema(self.files[0])
        none = _with_wide_strings(schema.empty_table().select(columns or schema.names))
        return pa.concat_tables([none, *self.batches(first, end, columns)]).combine_chunks()


def _rows_of(file: str, first: int, end: int, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    with pq.ParquetFile(file, memory_map=True) as source:
        starts = [0, *accumulate(source.metadata.row_group(i).num_rows for i in range(source.num_row_groups))]
        groups = [i for i in range(source.num_row_groups) if starts[i + 1] > first and starts[i] < end]
        place = starts[groups[0]] if groups else 0
        for batch in source.iter_batches(ROWS_PER_READ, row_groups=groups, columns=columns and list(columns)):
            begin, stop = max(first - place, 0), min(end - place, batch.num_rows)
            place += batch.num_rows
            if stop > begin:
                yield _with_wide_strings(pa.Table.from_batches([batch.slice(begin, stop - begin)]))


def ranges(table: RowTable, rows: int) -> list[tuple[int, int]]:
    """Return ranges [first, end) of so many rows each that a table has, the last one with fewer."""
    return [(first, min(first + rows, table.num_rows)) for first in range(0, table.num_rows, rows)]


class RowFile:
    """Writes one Parquet file, table by table; it has the schema even without a row."""

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
    """Return a table whose strings have 64-bit offsets, so that many can be joined."""
    wide = [field.with_type(pa.large_string()) if pa.types.is_string(field.type) else field for field in table.schema]
    return table.cast(pa.schema(wide))


class FirstRows:
    """Writes a table's rows but those whose key came before; as far as memory of so many rows goes, for a query to end.

    Keys are int64. A column `count` is summed over a key's rows. As a context manager it writes what waits.
    """

    def __init__(self, file: RowFile, key: str, count: str | None = None) -> None:
        self._file, self._key, self._count = file, key, count
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Take in rows, which follow those before."""
        self._waiting.append(table)
        if sum(waiting.num_rows for waiting in self._waiting) > MOST_WAITING:
            self._reduce(at_most=MOST_WAITING // 2)

    def _reduce(self, at_most: int) -> None:
        """Let go of rows whose key came before; what is left is written where it is more."""
        rows = self._first(pa.concat_tables(self._waiting))
        self._waiting = [rows]
        if rows.num_rows > at_most:
            self._file.add(rows)
            self._waiting = []

    def _first(self, table: pa.Table) -> pa.Table:
        # Codes are numbered as their values come, so that a value is new where its code is: nothing is sorted.
        codes = table.column(self._key).combine_chunks().dictionary_encode().indices.to_numpy()
        first = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
        if len(first) == table.num_rows:
            return table
        kept = table.take(pa.array(first))
        if self._count is None:
            return kept
        counts = np.bincount(codes, table.column(self._count).to_numpy()).astype(np.int64)
        return kept.set_column(kept.schema.get_field_index(self._count), self._count, [counts])

    def __enter__(self) -> FirstRows:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None and self._waiting:
            self._reduce(at_most=0)


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `folder` when the block ends, unless another one did meanwhile.

    Its name is its own: a worker whose making was killed may still be at the same step. The folder that it stands in
    is not made: that worker's may be gone.
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
    """Note what a step found that is no table."""
    (folder / "facts.json").write_text(json.dumps(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what `write_facts` noted."""
    return dict(json.loads((folder / "facts.json").read_text()))
