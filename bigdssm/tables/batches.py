"""How large the batches of a table are, and the types of their columns: strings in place of bytes, checked."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch, is_broken

ROWS_PER_BATCH = 16384
BYTES_PER_BATCH = 8 << 20
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def as_utf8(batch: SourceBatch, report_bad: ReportBad) -> SourceBatch:
    """Return the batch with byte columns as strings, without the rows that are not UTF-8."""
    check = RowCheck(batch, report_bad)
    columns: dict[str, pa.ChunkedArray] = {}
    for name in batch.table.column_names:
        column = batch.table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        if any(is_text(column.type) for is_text in TEXT_TYPES):
            column = column.cast(pa.large_binary())  # casting back checks it; Parquet and JSON readers do not
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            try:
                column = column.cast(pa.large_string())
            except pa.ArrowInvalid:
                check.fail(np.array(list(map(is_broken, column.to_pylist()))), f"invalid UTF-8 in column {name!r}")
                good = pc.if_else(pa.array(check.good), column, pa.scalar(b"", column.type))
                column = good.cast(pa.large_string())
        columns[name] = column
    whole = SourceBatch(batch.file, pa.table(columns), batch.rows)
    return whole if check.good.all() else whole.keep(check.good)
