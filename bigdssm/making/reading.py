"""The first step of a making: tables are read part by part, each row checked and numbered, bad ones noted.

Everything that depends on the order of rows goes by a row's `place`: its table and its number in it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigdssm.errors import DataError, UnavailableError
from bigdssm.features import Feature
from bigdssm.features.columns import RowCheck, SourceBatch, TimeUnits
from bigdssm.making.steps import write_facts
from bigdssm.tables.explode import MOST_VALUES, exploded
from bigdssm.tables.header import MissingColumn
from bigdssm.tables.source import Part, Source

PLACE_BITS = 47  # of a row's number in its table
NTH_BITS = MOST_VALUES.bit_length() - 1  # of them: of one of the rows that a list column makes of one
MAX_TABLES = 1 << (63 - PLACE_BITS)
BAD = "bad.jsonl"
MOST_TOLD = 1 << 16  # bad rows of a table that cannot be read on

BadRow = tuple[str, int, str, bool]
"""File, row, what is wrong, and whether the row is left out (else a value of it is taken as missing)."""


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


def named_columns(*columns: tuple[str | None, str]) -> dict[str, str]:
    """Return columns in the order given, without None, and the option or else the feature that names each."""
    names: dict[str, str] = {}
    for column, by in columns:
        if column and (column not in names or by.startswith("--")):
            names[column] = by
    return names


def columns_of_features(features: Mapping[str, Feature], side: str) -> list[tuple[str | None, str]]:
    """Return the source columns of one side's features, and the config key that names each."""
    return [(column, f"data.{side}.{name}") for name, feature in features.items() for column in feature.source_columns]


def places(part: PartOfTable, batch: SourceBatch, *, several: bool = False) -> np.ndarray:
    """Return the place of every row, int64 [rows] ≥ 0; `several`: rows of one number follow each other."""
    rows = batch.rows - 1
    if several:
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        nth = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        rows = (rows << NTH_BITS) + nth
    return (np.int64(part.number) << PLACE_BITS) + rows


class Unreadable(DataError):
    """A table that cannot be read on, and the newest bad rows met before."""

    def __init__(self, message: str, bad: list[BadRow]) -> None:
        super().__init__(message, bad)
        self.bad = bad

    def __str__(self) -> str:
        return str(self.args[0])


Take = Callable[[RowCheck, TimeUnits], None]
"""Takes in the rows of a batch that are good when it is done with the check, and their times."""


def read_part(
    part: PartOfTable, columns: Mapping[str, str], folder: Path, take: Take, *, each_of: str | None = None
) -> None:
    """Have `take` look at each batch of a part; `folder` gets counts and bad rows.

    Batches have these columns (what names each is for messages), and a row for each value of the list column `each_of`.
    Raises Unreadable.
    """
    num_rows, num_good, units = 0, 0, TimeUnits()
    newest = deque[BadRow](maxlen=MOST_TOLD)

    def report_bad(file: str, row: int, reason: str, left_out: bool = True) -> None:
        newest.append((file, row, reason, left_out))
        lines.write(json.dumps(newest[-1]) + "\n")

    with (folder / BAD).open("w", encoding="utf-8") as lines:
        try:
            for batch in part.source.batches(part.part, list(columns), report_bad):
                num_rows += len(batch.rows)
                check = RowCheck(exploded(batch, each_of, report_bad) if each_of else batch, report_bad)
                take(check, units)
                num_good += int(check.good.sum())
        except DataError as error:
            if isinstance(error, UnavailableError):
                raise
            said = error.named_by(columns) if isinstance(error, MissingColumn) else str(error)
            raise Unreadable(said, list(newest)) from None
    write_facts(folder, num_rows=num_rows, num_good=num_good, **units.facts())


def bad_rows(folders: Iterable[Path]) -> Iterator[BadRow]:
    """Yield the bad rows of a step's folders, in order."""
    for folder in folders:
        with (folder / BAD).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
