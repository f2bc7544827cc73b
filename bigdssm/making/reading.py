"""The first step of a making: tables are read part by part, each row checked and numbered, bad ones noted.

Everything that depends on the order of rows goes by a row's `place`: its table and its number in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.errors import DataError, UnavailableError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.making.steps import RowFile, write_facts
from bigdssm.tables.explode import MOST_VALUES
from bigdssm.tables.source import Part, Source

PLACE_BITS = 47  # of a row's number in its table
NTH_BITS = MOST_VALUES.bit_length() - 1  # of them: of one of the rows that a list column makes of one
MAX_TABLES = 1 << (63 - PLACE_BITS)
BAD = "bad.parquet"
MOST_WAITING = 1 << 16  # bad rows in memory
BAD_SCHEMA = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("left_out", pa.bool_())])


@dataclass(frozen=True)
class PartOfTable:
    """What one worker reads."""

    source: Source
    number: int  # of the table among all of a making
    part: Part


def parts_of(sources: Sequence[Source]) -> list[PartOfTable]:
    """Return the parts of tables, in order. Raises DataError where there are too many tables."""
    if len(sources) > MAX_TABLES:
        raise DataError(f"{len(sources)} tables are given, at most {MAX_TABLES} can be; join some of them")
    return [PartOfTable(source, number, part) for number, source in enumerate(sources) for part in source.parts()]


def places(part: PartOfTable, batch: SourceBatch, *, exploded: bool = False) -> np.ndarray:
    """Return the place of every row, int64 [rows] ≥ 0; `exploded`: rows of one number follow each other."""
    rows = batch.rows - 1
    if exploded:
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        nth = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        rows = (rows << NTH_BITS) + nth
    return (np.int64(part.number) << PLACE_BITS) + rows


class BadRows:
    """What is wrong with the rows of a part, in the order in which it was met; written when it is many rows."""

    def __init__(self, file: RowFile) -> None:
        self._file, self.waiting = file, list[tuple[str, int, str, bool]]()

    def report(self, file: str, row: int, reason: str, left_out: bool = True) -> None:
        """Note a bad row, or (not left out) a bad value of a row that stays."""
        self.waiting.append((file, row, reason, left_out))
        if len(self.waiting) >= MOST_WAITING:
            self.write()

    def write(self) -> None:
        """Write what waits."""
        if self.waiting:
            columns = zip(*self.waiting, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, BAD_SCHEMA, strict=True)]
            self._file.add(pa.Table.from_arrays(arrays, schema=BAD_SCHEMA))
            self.waiting = []


class Unreadable(DataError):
    """A table that cannot be read on, and the newest bad rows met before."""

    def __init__(self, message: str, bad: list[tuple[str, int, str, bool]]) -> None:
        super().__init__(message, bad)
        self.bad = bad

    def __str__(self) -> str:
        return str(self.args[0])


Take = Callable[[Iterator[SourceBatch], ReportBad], dict[str, Any]]
"""Goes through the batches of a part, and returns counts, such as that of the good rows, `num_good`."""


def read_part(part: PartOfTable, columns: Iterable[str | None], folder: Path, take: Take) -> None:
    """Have `take` go through a part's batches with these columns; `folder` gets its counts and the bad rows.

    Raises Unreadable.
    """
    num_rows = 0
    wanted = list(dict.fromkeys(column for column in columns if column))

    def batches() -> Iterator[SourceBatch]:
        nonlocal num_rows
        for batch in part.source.batches(part.part, wanted, bad.report):
            num_rows += len(batch.rows)
            yield batch

    with RowFile(folder / BAD, BAD_SCHEMA) as file:
        bad = BadRows(file)
        try:
            counts = take(batches(), bad.report)
        except DataError as error:
            raise error if isinstance(error, UnavailableError) else Unreadable(str(error), bad.waiting) from None
        bad.write()
    write_facts(folder, num_rows=num_rows, **counts)
