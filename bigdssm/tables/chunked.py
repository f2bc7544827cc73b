"""Sources in chunks whose rows are told without reading them: a part is a run of chunks of one file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.tables.batches import as_utf8
from bigdssm.tables.files import TableFile
from bigdssm.tables.header import column_names, require_columns
from bigdssm.tables.source import READING_ERRORS, FileSource, Part, told

ROWS_PER_PART = 1_000_000  # at most, unless a chunk has more


@dataclass(frozen=True)
class ChunkedPart(Part):
    """Some chunks of a file."""

    file: TableFile
    chunks: range


class ChunkedSource(FileSource):
    """Files of chunks, such as Parquet's row groups."""

    @abstractmethod
    def chunk_rows(self, file: TableFile) -> list[int]:
        """Return how many rows each chunk of a file has."""

    @abstractmethod
    def chunk_tables(self, part: ChunkedPart, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield a part's rows in order, a batch at a time, the columns as `named_columns` finds them."""

    def split(self) -> Sequence[Part]:
        """Return runs of chunks of at most 1,000,000 rows together. Raises DataError: a file is damaged."""
        parts: list[ChunkedPart] = []
        first_row = 1
        for file in self.files:
            try:
                rows = self.chunk_rows(file)
            except READING_ERRORS as error:
                raise told(error, file.name, 0) from None
            for chunks in _runs(rows):
                num_rows = sum(rows[chunk] for chunk in chunks)
                parts.append(ChunkedPart(len(parts), first_row, num_rows, file, chunks))
                first_row += num_rows
        return parts or [ChunkedPart(0, 1, 0, self.files[0], range(0))]

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield a part's rows; their numbers are known beforehand."""
        assert isinstance(part, ChunkedPart)
        first_row = part.first_row
        for table in self.chunk_tables(part, columns):
            rows = np.arange(first_row, first_row + table.num_rows, dtype=np.int64)
            first_row += table.num_rows
            yield as_utf8(SourceBatch(self.name, table.rename_columns(list(columns)), rows), report_bad)


def named_columns(file: TableFile, found: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the file's own names of `columns`. Raises DataError: one is missing, or there twice."""
    names = dict(zip(column_names(file.name, found), found, strict=True))
    require_columns(file.name, names, columns)
    return [names[name] for name in columns]


def _runs(rows: Sequence[int]) -> Iterator[range]:
    """Yield ranges of successive chunks that have at most ROWS_PER_PART rows together, or are one; none is empty."""
    start, together = 0, 0
    for chunk, count in enumerate(rows):
        if together and together + count > ROWS_PER_PART:
            yield range(start, chunk)
            start, together = chunk, 0
        together += count
    if together:
        yield range(start, len(rows))
