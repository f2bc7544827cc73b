"""First step of an ingestion: read tables part by part, number and validate rows, quarantine bad ones."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError, UnavailableError
from bigdssm.features import Feature
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch, TimeUnits
from bigdssm.ingest.engines.tables import write_facts
from bigdssm.ingest.sources.base import Part, Source
from bigdssm.ingest.sources.text import MissingColumn

MOST_VALUES = 1 << 12  # of one row


def exploded(batch: SourceBatch, name: str, report_bad: ReportBad) -> SourceBatch:
    """Return the rows of `batch`, once for each value of the list column `name`.

    A row without values, or with more than MOST_VALUES, is reported and left out.

    Raises DataError where the column holds no lists.
    """
    column = batch.table.column(name).combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{batch.file}: column {name!r} holds {column.type}, --each-of needs lists")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    check = RowCheck(batch, report_bad)
    check.fail(lengths == 0, f"{name} holds no value")
    check.fail(lengths > MOST_VALUES, f"{name} holds {{}} values, at most {MOST_VALUES} are taken", lengths)
    parent = np.repeat(np.flatnonzero(check.good), lengths[check.good])
    values = column.filter(pa.array(check.good)).flatten()
    table = batch.table.take(pa.array(parent))
    table = table.set_column(table.column_names.index(name), name, values)
    return SourceBatch(batch.file, table, batch.rows[parent])


ORDINAL_BITS = 47  # of a row's number in its table
NTH_BITS = MOST_VALUES.bit_length() - 1  # of them: of one of the rows that a list column makes of one
MAX_TABLES = 1 << (63 - ORDINAL_BITS)
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


def row_ordinals(part: PartOfTable, batch: SourceBatch, *, several: bool = False) -> np.ndarray:
    """Return the place of every row, int64 [rows] ≥ 0; `several`: rows of one number follow each other."""
    rows = batch.rows - 1
    if several:
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        nth = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        rows = (rows << NTH_BITS) + nth
    return (np.int64(part.number) << ORDINAL_BITS) + rows


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


# What one bad row's reason has and another's of the kind has not.
PARTICULAR = re.compile(r"'.*'|\".*\"|(?<!\S)-?\d[\d.,e+-]*(?![\w-])")
MAX_KINDS = 100


class Quarantine:
    """Takes bad rows in their order into a file."""

    def __init__(self, path: Path, kept: Path, partition: str, max_bad_fraction: float) -> None:
        """Write to `path`; `kept` is where the file will stand if the making fails."""
        self.path, self.kept = path, kept
        self._partition, self._max_bad_fraction = partition, max_bad_fraction
        self._file = path.open("w", encoding="utf-8")
        self._first = ""
        self._kinds: Counter[str] = Counter()
        self.num_bad = 0
        self.num_left_out = 0
        self.num_good = 0

    def add(self, rows: Iterable[BadRow]) -> None:
        """Take in bad rows."""
        for file, row, reason, left_out in rows:
            self.num_bad += 1
            self.num_left_out += left_out
            kind = PARTICULAR.sub("…", reason)
            if kind in self._kinds or len(self._kinds) < MAX_KINDS:
                self._kinds[kind] += 1
            self._first = self._first or f"{file}, row {row}: {reason}"
            record = {"partition": self._partition, "file": file, "row": row, "reason": reason, "left_out": left_out}
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """Raise DataError, naming the first bad row, where there are too many."""
        total, limit = self.num_left_out + self.num_good, self._max_bad_fraction
        if self.num_bad > limit * total:
            told = f"{self.num_bad} of {total} rows are bad or have bad values, all tables together"
            raise DataError(f"{told}, more than data.max_bad_fraction={limit}{self.told()}")

    def told(self) -> str:
        """Return the commonest reasons with their counts, the first bad row and the file, to end a sentence with."""
        if not self.num_bad:
            return ""
        said = ", ".join(f"{count} × {kind}" for kind, count in self._kinds.most_common(3))
        return f": {said}; the first is {self._first}; all are in {self.kept}"

    def close(self) -> None:
        """Close the file."""
        self._file.close()
