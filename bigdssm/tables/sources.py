"""Source tables as a stream of Arrow batches: TSV, CSV, JSON lines and Parquet, also compressed (.gz, .xz, .zst).

Delimited tables come as strings, so that an id such as `007` stays what it is; types are given later, by the schema.
A line that cannot be read (wrong number of fields, broken JSON, invalid UTF-8) is a bad row, never a silent gap: it is
handed to the quarantine with its number. Rows are numbered from 1, the header not counted.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
# RecBole writes each column's type into the header, as in `item_id:token`.
HEADER_TYPES = (":token", ":token_seq", ":float", ":float_seq")
ROWS_PER_BATCH = 16384
BYTES_PER_BATCH = 8 << 20
READ_AHEAD_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20


TableReader = Callable[[Path, Sequence[str], ReportBad], Iterator[SourceBatch]]
"""Yields a table's rows in order with exactly the asked columns, numbered from 1; bad rows go to the last argument."""

_SOURCES: dict[str, TableReader] = {}
_TEXT_SOURCES: dict[str, TableReader] = {}  # compressed or not


def register_source(suffix: str, read: TableReader, *, compressed: bool = False) -> None:
    """Have files whose names end in `suffix` read as tables; compressed: `read` opens .gz, .xz and .zst of it, too."""
    (_TEXT_SOURCES if compressed else _SOURCES)[suffix] = read


def read_table(path: str | Path, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
    """Yield the rows of the table at `path` in order, with exactly `columns`; bad rows go to `report_bad`.

    Raises DataError: missing file, unknown format, missing column (naming the nearest), damaged file, empty table.
    """
    path = Path(path)
    check_table(path)
    read = _SOURCES.get(path.suffix.lower()) or _TEXT_SOURCES.get(split_suffix(path)[0])
    if read is None:
        known = ", ".join([*_TEXT_SOURCES, *_SOURCES])
        raise DataError(
            f"{path}: unknown table format; known are {known}, {', '.join(_TEXT_SOURCES)} also with .gz, .xz or .zst"
        )
    seen = 0
    try:
        for batch in read(path, columns, report_bad):
            seen += len(batch.rows)
            yield batch
    except (pa.ArrowException, OSError, lzma.LZMAError, zlib.error, EOFError, csv.Error) as error:
        if isinstance(error, OSError) and error.errno:  # the machine's trouble, not the file's
            raise
        detail = " ".join(str(error).split())[:300]
        if "straddling object" in detail:
            detail = f"a row of more than {BYTES_PER_BATCH:,} bytes, or a quote that is never closed"
        raise DataError(f"{path} is damaged or not what its name says, after row {seen}: {detail}") from None
    if not seen:
        raise DataError(f"{path} has no usable rows")


def check_table(path: Path) -> None:
    """Raise DataError where there is no such file."""
    if not path.is_file():
        raise DataError(f"table {path} {'is no file' if path.exists() else 'does not exist'}")


def split_suffix(path: Path) -> tuple[str, str | None]:
    """Return the format's suffix and the compression's name (None: not compressed)."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def require_columns(path: Path, found: Collection[str], needed: Sequence[str]) -> None:
    """Raise DataError naming the first of `needed` that `found` lacks, and the nearest that it has."""
    for name in needed:
        if name not in found:
            near = difflib.get_close_matches(name, list(found), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, found))}"
            raise DataError(f"{path} has no column {name!r}; {hint}")


def open_source(path: Path, compression: str | None) -> BinaryIO:
    """Return the file opened for reading, its compression undone."""
    if compression == "xz":
        return cast(BinaryIO, lzma.open(path))
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


class ReadAhead(io.RawIOBase):
    """The bytes of a stream, which another thread reads: undoing a compression takes a core."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._pool, self._chunk = stream, ThreadPoolExecutor(1), memoryview(b"")
        self._coming = deque(self._pool.submit(stream.read, READ_AHEAD_BYTES) for _ in range(2))

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill `target` as far as there is something; 0 at the end. Raises what reading the stream raised."""
        if not self._chunk:
            self._chunk = memoryview(self._coming.popleft().result())
            self._coming.append(self._pool.submit(self._stream.read, READ_AHEAD_BYTES))
        size = min(len(target), len(self._chunk))
        target[:size], self._chunk = self._chunk[:size], self._chunk[size:]
        return size

    def close(self) -> None:
        """Close the stream, too."""
        if not self.closed:
            self._pool.shutdown(cancel_futures=True)
            self._stream.close()
        super().close()


def stream_source(path: Path, compression: str | None) -> BinaryIO:
    """Return what `open_source` does to be read once from the beginning; a compression is undone in another thread."""
    source = open_source(path, compression)
    return source if compression is None else cast(BinaryIO, io.BufferedReader(ReadAhead(source), READ_AHEAD_BYTES))


def _strip_types(path: Path, header: Sequence[str]) -> list[str]:
    names = []
    for name in header:
        suffix = next((kind for kind in HEADER_TYPES if name.endswith(kind)), "")
        names.append(name.removesuffix(suffix).strip())
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice")
    return names


def _read_delimited(path: Path, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
    suffix, compression = split_suffix(path)
    delimiter = DELIMITERS[suffix]
    quoted = delimiter == ","  # TSV has no quoting: titles may hold a lone quote
    with open_source(path, compression) as stream:
        first = stream.readline(MAX_LINE_BYTES)
    try:
        header = first.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: the header is not UTF-8; convert the table first") from None
    if not header:
        raise DataError(f"{path} has no header: it is empty, or its first line is")
    names = _strip_types(path, next(csv.reader([header], delimiter=delimiter, quoting=0 if quoted else csv.QUOTE_NONE)))
    require_columns(path, names, columns)
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
    with stream_source(path, compression) as stream:
        first_row = 0  # names are given, so that the header comes as row 0
        for batch in pa_csv.open_csv(pa.PythonFile(stream, mode="r"), reading, parsing, conversion):
            candidates = np.arange(first_row, first_row + batch.num_rows + len(broken))
            rows = np.setdiff1d(candidates, np.array(list(broken), np.int64))[: batch.num_rows]
            first_row = int(rows[-1]) + 1 if len(rows) else first_row
            for number in [number for number in list(broken) if number < first_row]:  # Arrow reads ahead
                report_bad(str(path), number, broken.pop(number))
            table = SourceBatch(str(path), pa.Table.from_batches([batch]), rows)
            yield _as_utf8(table.keep(rows > 0) if len(rows) and rows[0] == 0 else table, report_bad)
    for number, reason in broken.items():
        report_bad(str(path), number, reason)


def _read_json_lines(path: Path, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
    compression = split_suffix(path)[1]
    records: list[dict[str, Any]] = []
    rows: list[int] = []
    num_bytes, checked = 0, False
    with stream_source(path, compression) as stream:
        for row, line in enumerate(_lines(stream), 1):
            if not line.strip():
                continue
            if row == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise DataError(f"{path} is a JSON array, needs one object a line; `jq -c '.[]'` makes lines of it")
            try:
                if len(line) >= MAX_LINE_BYTES:
                    raise ValueError(f"a line of more than {MAX_LINE_BYTES:,} bytes")
                record = parse_object(line.decode("utf-8-sig" if row == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                report_bad(str(path), row, f"invalid UTF-8 at byte {error.start}")
                continue
            except (ValueError, RecursionError) as error:
                report_bad(str(path), row, f"not a JSON object: {error}")
                continue
            records.append(record)
            rows.append(row)
            num_bytes += len(line)
            if len(records) >= ROWS_PER_BATCH or num_bytes >= BYTES_PER_BATCH:
                yield record_batch(path, records, rows, columns, checked, report_bad)
                records, rows, num_bytes, checked = [], [], 0, True
    if records:
        yield record_batch(path, records, rows, columns, checked, report_bad)


def parse_object(text: str) -> dict[str, Any]:
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


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines; of a line longer than the limit only its beginning, so that memory stays bounded."""
    while line := stream.readline(MAX_LINE_BYTES):
        yield line
        while len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)


def record_batch(
    path: Path, records: list[dict[str, Any]], rows: list[int], columns: Sequence[str], checked: bool, bad: ReportBad
) -> SourceBatch:
    """Return records as a batch of `columns`; until `checked`, one that no record has raises DataError."""
    if not checked:  # a key may be absent in some records, but not in all of the first ones
        require_columns(path, dict.fromkeys(key for record in records for key in record), columns)
    table = pa.table({name: _json_column([record.get(name) for record in records]) for name in columns})
    return _as_utf8(SourceBatch(str(path), table, np.array(rows, np.int64)), bad)


def _json_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # mixed types
        return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_parquet(path: Path, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
    with pq.ParquetFile(path) as file:
        raw = file.schema_arrow.names
        names = dict(zip(_strip_types(path, raw), raw, strict=True))
        require_columns(path, names, columns)
        first_row = 1
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=[names[name] for name in columns]):
            table = (
                pa.Table.from_batches([batch]).select([names[name] for name in columns]).rename_columns(list(columns))
            )
            rows = np.arange(first_row, first_row + batch.num_rows, dtype=np.int64)
            first_row += batch.num_rows
            yield _as_utf8(SourceBatch(str(path), table, rows), report_bad)


def _as_utf8(batch: SourceBatch, report_bad: ReportBad) -> SourceBatch:
    """Return the batch with byte columns as strings, without the rows that are not UTF-8."""
    good = np.ones(len(batch.rows), bool)
    columns: dict[str, pa.ChunkedArray] = {}
    for name in batch.table.column_names:
        column = batch.table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())  # casting back checks it; Parquet and JSON readers do not
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            try:
                column = column.cast(pa.large_string())
            except pa.ArrowInvalid:
                wrong = [i for i, value in enumerate(column.to_pylist()) if value is not None and not _is_utf8(value)]
                for i in wrong:
                    if good[i]:
                        report_bad(batch.file, int(batch.rows[i]), f"invalid UTF-8 in column {name!r}")
                good[wrong] = False
                column = pc.if_else(pa.array(good), column, pa.scalar(b"", column.type)).cast(pa.large_string())
        columns[name] = column
    whole = SourceBatch(batch.file, pa.table(columns), batch.rows)
    return whole if good.all() else whole.keep(good)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


for _suffix in DELIMITERS:
    register_source(_suffix, _read_delimited, compressed=True)
for _suffix in JSON_SUFFIXES:
    register_source(_suffix, _read_json_lines, compressed=True)
register_source(".parquet", _read_parquet)
