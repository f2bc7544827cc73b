"""JSON objects as the rows of a table: their keys are its columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.tables.batches import BYTES_PER_BATCH, ROWS_PER_BATCH, as_utf8
from bigdssm.tables.header import require_columns

MAX_RECORD_BYTES = 64 << 20

Record = dict[str, Any]


def record_batches(
    name: str, numbered: Iterable[tuple[int, Record, int]], columns: Sequence[str], report_bad: ReportBad
) -> Iterator[SourceBatch]:
    """Yield records of the table `name`, each with its row's number and bytes, as batches of `columns`.

    Raises DataError: a column that none of the first ones has.
    """
    records: list[Record] = []
    rows: list[int] = []
    num_bytes, checked = 0, False
    for row, record, size in numbered:
        records.append(record)
        rows.append(row)
        num_bytes += size
        if len(records) >= ROWS_PER_BATCH or num_bytes >= BYTES_PER_BATCH:
            yield record_batch(name, records, rows, columns, checked, report_bad)
            records, rows, num_bytes, checked = [], [], 0, True
    if records:
        yield record_batch(name, records, rows, columns, checked, report_bad)


def record_batch(
    name: str, records: list[Record], rows: list[int], columns: Sequence[str], checked: bool, report_bad: ReportBad
) -> SourceBatch:
    """Return records as a batch of `columns`; until `checked`, one that no record has raises DataError."""
    if not checked:  # a key may be absent in some records, but not in all of the first ones
        require_columns(name, dict.fromkeys(key for record in records for key in record), columns)
    table = pa.table({column: _typed([record.get(column) for record in records]) for column in columns})
    return as_utf8(SourceBatch(name, table, np.array(rows, np.int64)), report_bad)


def parse_object(text: str) -> Record:
    """Return a JSON object. Raises ValueError: no JSON, no object, or one with half a character (a lone surrogate)."""
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, needs an object")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"an object with half a character, {error.object[error.start]!a}") from None
    return record


def _typed(values: list[Any]) -> pa.Array:
    """Return values of one type as they are, others as texts; lists of single values stay lists."""
    lists = all(value is None or isinstance(value, list) for value in values)
    single = [element for value in values if value for element in value] if lists else values
    kinds = {type(value) for value in single if value is not None}
    if bool not in kinds or len(kinds) == 1:  # Arrow takes a boolean behind a float as a number
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # mixed types
            pass
    if lists:
        return pa.array([value and list(map(_text, value)) for value in values], pa.list_(pa.string()))
    return pa.array(list(map(_text, values)), pa.string())


def _text(value: Any) -> str | None:
    """Return the text that a value has in any batch: numbers as columns of numbers give them, NaN as null."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        whole = value.is_integer() and abs(value) < 2**53
        return str(int(value)) if whole else str(pa.scalar(value).cast(pa.string()).as_py())
    return json.dumps(value, ensure_ascii=False)
