"""What the steps of a making leave behind: tables of rows in Parquet files, which are all that one step tells another.

A step's files appear whole: what is there is finished, and is never made twice.
"""

from __future__ import annotations

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

import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.atomic import aside_of, remove, sync

ROWS_PER_READ = 1 << 16
_COMPRESSION = "zstd"


@dataclass(frozen=True)
class Table:
    """Rows in Parquet files, in the order of the files; row i is the i-th of them all."""

    files: tuple[str, ...]

    @classmethod
    def of(cls, files: Iterable[Path]) -> Table:
        """Return the table that these files are."""
        return cls(tuple(map(str, files)))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(pq.read_metadata(file).num_rows for file in self.files))

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
        pieces = list(self.batches(first, end, columns))
        if pieces:
            return pa.concat_tables(pieces).combine_chunks()
        schema = pq.read_schema(self.files[0])
        names = columns if columns is not None else schema.names
        return pa.schema([schema.field(name) for name in names]).empty_table()


def _rows_of(file: str, first: int, end: int, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    with pq.ParquetFile(file, memory_map=True) as source:
        starts = [0, *accumulate(source.metadata.row_group(i).num_rows for i in range(source.num_row_groups))]
        groups = [i for i in range(source.num_row_groups) if starts[i + 1] > first and starts[i] < end]
        place = starts[groups[0]] if groups else 0
        names = list(columns) if columns is not None else None
        for batch in source.iter_batches(ROWS_PER_READ, row_groups=groups, columns=names):
            begin, stop = max(first - place, 0), min(end - place, batch.num_rows)
            place += batch.num_rows
            if stop > begin:
                yield pa.Table.from_batches([batch.slice(begin, stop - begin)])


def ranges(table: Table, rows: int) -> list[tuple[int, int]]:
    """Return ranges [first, end) of so many rows each that a table has, the last one with fewer."""
    return [(first, min(first + rows, table.num_rows)) for first in range(0, table.num_rows, rows)]


class RowFile:
    """Writes one Parquet file, table by table; it has the schema even without a row."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression=_COMPRESSION)

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if table.num_rows:
            self._writer.write_table(table.cast(self.schema), row_group_size=ROWS_PER_READ)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `folder` when the block ends, unless another one did meanwhile.

    Its name is its own: a worker whose making was killed may still be at the same step.
    """
    aside = aside_of(folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}"))
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                sync(path)
        if not folder.exists():
            os.replace(aside, folder)
    finally:
        remove(aside)


def write_facts(folder: Path, **facts: object) -> None:
    """Note what a step found that is no table."""
    (folder / "facts.json").write_text(json.dumps(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what `write_facts` noted."""
    return dict(json.loads((folder / "facts.json").read_text()))
