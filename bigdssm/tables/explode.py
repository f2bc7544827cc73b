"""Source rows whose one column is a list, as one row for each of its values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch

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
