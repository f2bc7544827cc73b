"""The first step of an ingestion: read, number and validate rows; quarantine bad ones."""

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError, UnavailableError
from bigdssm.features import Feature
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch, TimeUnits
from bigdssm.ingest.engines.local import write_facts
from bigdssm.sources.base import Part, Source
from bigdssm.sources.text import MissingColumn

MAX_VALUES = 1 << 12  # per row
ORDINAL_BITS = 47  # for a row's number within its table
NTH_BITS = MAX_VALUES.bit_length() - 1  # the lowest of these: for the number of an unnested value
MAX_TABLES = 1 << (63 - ORDINAL_BITS)
BAD = "bad.jsonl"
MAX_REPORTED = 1 << 16  # bad rows before a fatal error
# The row-specific parts of a reason.
PARTICULAR = re.compile(r"'.*'|\".*\"|(?<!\S)-?\d[\d.,e+-]*(?![\w-])")
MAX_KINDS = 100


def explode(batch: SourceBatch, name: str, report_bad: ReportBad) -> SourceBatch:
    """Unnest the list column `name`: one row per value.

    Rows without values, or with more than MAX_VALUES, are reported and skipped. Raises DataError: not a list column.
    """
    column = batch.table.column(name).combine_chunks()
    if pa.types.is_null(column.type):  # by chance no row of the batch has a value
        column = column.cast(pa.list_(pa.string()))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{batch.file}: column {name!r} holds {column.type}, --each-of needs lists")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    check = RowCheck(batch, report_bad)
    check.fail(lengths == 0, f"{name} holds no value")
    check.fail(lengths > MAX_VALUES, f"{name} holds {{}} values, at most {MAX_VALUES} are allowed", lengths)
    parent = np.repeat(np.flatnonzero(check.good), lengths[check.good])
    values = column.filter(pa.array(check.good)).flatten()
    table = batch.table.take(pa.array(parent)).set_column(batch.table.column_names.index(name), name, values)
    return SourceBatch(batch.file, table, batch.rows[parent])


BadSourceRow = tuple[str, int, str, bool]
"""File, row, reason, and whether the row is skipped (otherwise the bad value is treated as missing)."""


@dataclass(frozen=True)
class TablePart:
    """A part of a table, read by one worker."""

    source: Source
    number: int  # of the table within the ingestion
    part: Part


def column_options(*columns: tuple[str | None, str]) -> dict[str, str]:
    """Map each distinct column to the option, or else the feature, that names it.

    None is dropped.
    """
    names: dict[str, str] = {}
    for column, by in columns:
        if column and (column not in names or by.startswith("--")):
            names[column] = by
    return names


def feature_columns(features: Mapping[str, Feature], side: str) -> list[tuple[str | None, str]]:
    """Return (source column, config key) of one side's features."""
    return [(column, f"data.{side}.{name}") for name, feature in features.items() for column in feature.source_columns]


def row_ordinals(part: TablePart, batch: SourceBatch, *, several: bool = False) -> np.ndarray:
    """Return a unique, ordered key of every row: (table, row), int64 [rows] ≥ 0.

    `several`: adjacent rows may have equal numbers (after `explode`); then also the index within these.
    """
    rows = batch.rows - 1
    if several:
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        nth = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        rows = (rows << NTH_BITS) + nth
    return (np.int64(part.number) << ORDINAL_BITS) + rows


class UnreadableTable(DataError):
    """A fatal error in a table: the message, and the last bad rows before it."""

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def read_part(
    part: TablePart, columns: Mapping[str, str], folder: Path, *, each_of: str | None = None
) -> Iterator[tuple[Iterator[RowCheck], TimeUnits]]:
    """Read a part: yield an iterator over its batches, to be validated, and the units, to add their times to.

    At the end counts and bad rows are written to `folder`. `columns` maps required columns to the options that name
    them, for messages. The list column `each_of` is unnested. Raises UnreadableTable.
    """
    num_rows, num_good, last_row, units = 0, 0, 0, TimeUnits()
    newest = deque[BadSourceRow](maxlen=MAX_REPORTED)

    def report_bad(file: str, row: int, reason: str, left_out: bool = True) -> None:
        nonlocal last_row
        last_row = max(last_row, row)
        newest.append((file, row, reason, left_out))
        lines.write(json.dumps(newest[-1]) + "\n")

    def batches() -> Iterator[RowCheck]:
        nonlocal num_rows, num_good, last_row
        for batch in part.source.batches(part.part, list(columns), report_bad):
            num_rows += len(batch.rows)
            last_row = max(last_row, int(batch.rows.max(initial=0)))
            check = RowCheck(explode(batch, each_of, report_bad) if each_of else batch, report_bad)
            yield check
            num_good += int(check.good.sum())

    with (folder / BAD).open("w", encoding="utf-8") as lines:
        try:
            yield batches(), units
        except UnavailableError:
            raise
        except DataError as error:
            message = error.message(columns) if isinstance(error, MissingColumn) else str(error)
            raise UnreadableTable(message, list(newest)) from None
    write_facts(folder, num_rows=num_rows, num_good=num_good, last_row=last_row, **units.facts())


def bad_rows(folders: Iterable[Path]) -> Iterator[BadSourceRow]:
    """Yield the bad rows of a step's folders, in order."""
    for folder in folders:
        with (folder / BAD).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


class Quarantine:
    """Writes bad rows to a file, in order, and counts them by kind of reason."""

    def __init__(self, path: Path, final_path: Path, partition: str, max_bad_fraction: float) -> None:
        """Write to `path`; `final_path` is the file's location if the ingestion fails."""
        self.path, self.final_path = path, final_path
        self._partition, self._max_bad_fraction = partition, max_bad_fraction
        self._file = path.open("w", encoding="utf-8")
        self._first = ""
        self._kinds: Counter[str] = Counter()
        self.num_bad = self.num_left_out = self.num_good = 0

    def add(self, rows: Iterable[BadSourceRow]) -> None:
        """Write bad rows."""
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
        """Raise DataError if there are too many bad rows."""
        total, limit = self.num_left_out + self.num_good, self._max_bad_fraction
        if self.num_bad > limit * total:
            counted = f"{self.num_bad} of {total} rows are bad or have bad values, all tables together"
            raise DataError(f"{counted}, more than data.max_bad_fraction={limit}{self.summary()}")

    def summary(self) -> str:
        """Return the most frequent reasons, the first bad row and the file, to end a message."""
        if not self.num_bad:
            return ""
        reasons = ", ".join(f"{count} × {kind}" for kind, count in self._kinds.most_common(3))
        return f": {reasons}; the first is {self._first}; all are in {self.final_path}"

    def close(self) -> None:
        """Close the file."""
        self._file.close()
