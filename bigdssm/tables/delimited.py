"""CSV, TSV and RecBole's files, their columns as strings, so that an id such as `007` stays what it is.

A line with another number of fields than the header has is a bad row, reported with its number.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.tables.batches import BYTES_PER_BATCH, as_utf8
from bigdssm.tables.header import column_names, require_columns
from bigdssm.tables.source import FileSource, Part

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
MAX_HEADER_BYTES = 64 << 20


class DelimitedSource(FileSource):
    """A text file of lines of fields, the first of them the header; rows are numbered without it."""

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the file's rows."""
        delimiter = DELIMITERS[self.file.suffix]
        quoted = delimiter == ","  # TSV has no quoting: titles may hold a lone quote
        names = self._header(delimiter, quoted)
        require_columns(self.name, names, columns)
        broken: dict[int, str] = {}

        def on_broken(row: pa_csv.InvalidRow) -> str:
            number = row.number - 1  # Arrow counts the header too
            broken[number] = f"has {row.actual_columns} fields, the header has {row.expected_columns}"
            return "skip"

        parsing = pa_csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quoted else False,
            newlines_in_values=quoted,
            invalid_row_handler=on_broken,
        )
        conversion = pa_csv.ConvertOptions(
            check_utf8=False, column_types=dict.fromkeys(names, pa.binary()), include_columns=list(columns)
        )
        reading = pa_csv.ReadOptions(use_threads=False, block_size=BYTES_PER_BATCH, column_names=names)
        with self.file.stream() as stream:
            first_row = 0  # names are given, so that the header comes as row 0
            for batch in pa_csv.open_csv(pa.PythonFile(stream, mode="r"), reading, parsing, conversion):
                candidates = np.arange(first_row, first_row + batch.num_rows + len(broken))
                rows = np.setdiff1d(candidates, np.array(list(broken), np.int64))[: batch.num_rows]
                first_row = int(rows[-1]) + 1 if len(rows) else first_row
                for number in [number for number in list(broken) if number < first_row]:  # Arrow reads ahead
                    report_bad(self.name, number, broken.pop(number))
                table = SourceBatch(self.name, pa.Table.from_batches([batch]), rows)
                yield as_utf8(table.keep(rows > 0) if len(rows) and rows[0] == 0 else table, report_bad)
        for number, reason in broken.items():
            report_bad(self.name, number, reason)

    def _header(self, delimiter: str, quoted: bool) -> list[str]:
        with self.file.open() as stream:
            first = stream.readline(MAX_HEADER_BYTES)
        try:
            header = first.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"{self.name}: the header is not UTF-8; convert the table first") from None
        if not header:
            raise DataError(f"{self.name} has no header: it is empty, or its first line is")
        fields = csv.reader([header], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        return column_names(self.name, next(fields))
