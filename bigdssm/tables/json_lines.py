"""JSON lines: an object on each line; one that holds none is a bad row, reported with its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.tables.records import MAX_RECORD_BYTES, Record, parse_object, record_batches
from bigdssm.tables.source import FileSource, Part

JSON_SUFFIXES = (".jsonl", ".ndjson")


class JsonLinesSource(FileSource):
    """A text file of JSON objects; rows are its lines."""

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the file's rows."""
        with self.file.stream() as stream:
            yield from record_batches(self.name, self._records(stream, report_bad), columns, report_bad)

    def _records(self, stream: BinaryIO, report_bad: ReportBad) -> Iterator[tuple[int, Record, int]]:
        for row, line in enumerate(_lines(stream), 1):
            if not line.strip():
                continue
            if row == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise DataError(
                    f"{self.name} is a JSON array, needs one object a line; `jq -c '.[]'` makes lines of it"
                )
            try:
                if len(line) >= MAX_RECORD_BYTES:
                    raise ValueError(f"a line of more than {MAX_RECORD_BYTES:,} bytes")
                record = parse_object(line.decode("utf-8-sig" if row == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                report_bad(self.name, row, f"invalid UTF-8 at byte {error.start}")
                continue
            except (ValueError, RecursionError) as error:
                report_bad(self.name, row, f"not a JSON object: {error}")
                continue
            yield row, record, len(line)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines; of a line longer than the limit only its beginning, so that memory stays bounded."""
    while line := stream.readline(MAX_RECORD_BYTES):
        yield line
        while len(line) >= MAX_RECORD_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_RECORD_BYTES)
