"""Parquet: a file, or a folder of files as Spark and others write them, in the order of their names.

A chunk is a row group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.errors import DataError
from bigdssm.tables.batches import ROWS_PER_BATCH
from bigdssm.tables.chunked import ChunkedPart, ChunkedSource, named_columns
from bigdssm.tables.files import TableFile

PARQUET_SUFFIX = ".parquet"


class ParquetSource(ChunkedSource):
    """Parquet files, read by row groups."""

    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return how many rows each row group has."""
        with file.open_arrow() as opened, pq.ParquetFile(opened) as parquet:
            return [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]

    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of a part's row groups."""
        with part.file.open_arrow() as opened, pq.ParquetFile(opened) as parquet:
            names = named_columns(part.file, parquet.schema_arrow.names, columns)
            for batch in parquet.iter_batches(ROWS_PER_BATCH, list(part.chunks), list(dict.fromkeys(names))):
                yield pa.Table.from_batches([batch]).select(names)


def parquet_names(folder: str, names: Sequence[str]) -> list[str]:
    """Return which of the `names` in a folder are its files: all but hidden ones and marks such as _SUCCESS, sorted.

    Raises DataError: one is no Parquet file.
    """
    visible = sorted(name for name in names if not name.startswith((".", "_")))
    for name in visible:
        if not name.lower().endswith(PARQUET_SUFFIX):
            raise DataError(
                f"{folder} is read as a folder of {PARQUET_SUFFIX} files, but holds {name!r}; move that away, or give "
                f"the files or folders in it one by one"
            )
    return visible
