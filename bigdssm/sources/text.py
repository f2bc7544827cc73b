"""Text tables: CSV, TSV, RecBole files, JSON Lines, and WebDataset shards.

CSV columns are strings, so an id such as `007` is preserved. A shard has one row per sample, with columns from text
members:

    x.json         the object's keys are columns       x.query.txt    column `query`
    x.doc.json     columns `doc.<key>`                 x.txt          column `txt`
                                                       __key__        the name up to the first dot

Other members (images, …) are skipped unread. Nothing is unpickled, no command is run, no key becomes a path. Truncated
shards and damaged headers are rejected; webdataset's reader would silently stop there.
"""

import csv
import difflib
import json
import math
import re
import shutil
import tarfile
import tempfile
from abc import abstractmethod
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.sources.base import BYTES_PER_BATCH, ROWS_PER_BATCH, FileSource, Part, TableFile, as_utf8, register_source

# RecBole headers contain types, as in `item_id:token`
HEADER_TYPE = re.compile(r":(token|float)(_seq)?\Z")
# Fields of a CSV: text without quotes, a quote within an unquoted field, a quoted field, and one with text after its
# closing quote in the same line. Bounded, because each repetition takes memory.
SOUND_FIELDS = re.compile(
    rb"""(?:[^"]+|(?<![,\r\n])"|"[^"]*(?:""[^"]*)*"(?=[,\r\n])|"[^"\r\n]*(?:""[^"\r\n]*)*"(?=[^",\r\n])){1,1000}"""
)
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
MAX_HEADER_BYTES = 64 << 20
MAX_RECORD_BYTES = 64 << 20
MAX_NESTING = 500  # of JSON: Python's limit depends on the depth of the calls
TOO_DEEP = f"an object with more than {MAX_NESTING} levels"
UNPICKLED_SUFFIXES = ("pyd", "pickle", "pkl", "pth")  # by webdataset's decoders
TEXT_SUFFIXES = ("txt", "text", "json", "cls", "id")
KEY = "__key__"


def column_names(table: str, header: Sequence[str]) -> list[str]:
    """Strip RecBole types from column names. Raises DataError: a duplicate column."""
    names = [HEADER_TYPE.sub("", name).strip() for name in header]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{table} has the column {duplicates[0]!r} twice")
    return names


class MissingColumn(DataError):
    """A missing column: table, column and hint; the caller adds the option or feature that names it."""

    def __str__(self) -> str:
        return self.message({})

    def message(self, names: Mapping[str, str]) -> str:
        """Format the message; `names` maps columns to the options or features that name them."""
        table, column, hint = self.args
        source = f", which {names[column]} names" if column in names else ""
        return f"{table} has no column {column!r}{source}; {hint}"


def require_columns(table: str, present: Collection[str], required: Sequence[str]) -> None:
    """Raise MissingColumn with the first missing column and the closest match."""
    for name in required:
        if name not in present:
            near = difflib.get_close_matches(name, list(present), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, present))}"
            raise MissingColumn(table, name, hint)


class QuotedStream:
    """The bytes of a CSV, in which every quoted field is validated: Arrow reads an open one to the end of the file."""

    closed = False

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self._name, self._stream = name, stream
        self._tail, self._lines = b"", 0  # from the byte before an incomplete field on; line breaks before it

    def close(self) -> None:
        """Leave the stream open, which the caller closes."""

    def read(self, size: int) -> bytes:
        """Return the next bytes. Raises DataError: a quoted field that is never closed, or within another field."""
        chunk = self._stream.read(size)
        # as if a line break were before the first line and after the last one
        start = self._tail + chunk if self._tail else b"\n" + chunk.removeprefix(BOM_UTF8)
        data = start if chunk else start + b"\n"
        end = 1
        while fields := SOUND_FIELDS.match(data, end):
            end = fields.end()
        if end < len(data) and (not chunk or len(data) - end > BYTES_PER_BATCH):
            line = self._lines + data.count(b"\n", 0, end)
            raise DataError(
                f"{self._name}: the quote that opens a field in line {line} is not closed, or closed within a later "
                'field; write the field as """text", or the table as .tsv, where quotes are characters'
            )
        self._lines += data.count(b"\n", 0, end - 1)
        self._tail = data[end - 1 :]
        return chunk


@register_source
class DelimitedSource(FileSource):
    """A delimited text file with a header line, which has no row number."""

    suffixes: ClassVar[tuple[str, ...]] = tuple(DELIMITERS)
    compressible: ClassVar[bool] = True

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the rows of the file."""
        delimiter = DELIMITERS[self.file.suffix]
        quoted = delimiter == ","  # TSV has no quoting: titles may hold a lone quote
        with self.file.open() as stream:
            first = stream.readline(MAX_HEADER_BYTES)
        try:
            header = first.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"{self.name}: the header is not UTF-8; convert the table first") from None
        if not header:
            raise DataError(f"{self.name} has no header: the file or its first line is empty")
        fields = csv.reader([header], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        names = column_names(self.name, next(fields))
        require_columns(self.name, names, columns)
        broken: dict[int, str] = {}

        def on_broken(row: pa_csv.InvalidRow) -> str:
            number = row.number - 1  # Arrow counts the header too
            broken[number] = f"has {row.actual_columns} fields, the header has {row.expected_columns}"
            return "skip"

        with self.file.stream() as stream:
            first_row = 0  # names are explicit, so Arrow returns the header as row 0
            batches = pa_csv.open_csv(
                pa.PythonFile(QuotedStream(self.name, stream) if quoted else stream, mode="r"),
                pa_csv.ReadOptions(use_threads=False, block_size=BYTES_PER_BATCH, column_names=names),
                pa_csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                    invalid_row_handler=on_broken,
                ),
                pa_csv.ConvertOptions(
                    check_utf8=False, column_types=dict.fromkeys(names, pa.binary()), include_columns=list(columns)
                ),
            )
            for batch in batches:
                candidates = np.arange(first_row, first_row + batch.num_rows + len(broken))
                rows = np.setdiff1d(candidates, np.array(list(broken), np.int64))[: batch.num_rows]
                first_row = int(rows[-1]) + 1 if len(rows) else first_row
                for number in [number for number in list(broken) if number < first_row]:  # Arrow reads ahead
                    report_bad(self.name, number, broken.pop(number))
                table = SourceBatch(self.name, pa.Table.from_batches([batch]), rows)
                yield as_utf8(table.keep(rows > 0) if len(rows) and rows[0] == 0 else table, report_bad)
        for number, reason in broken.items():
            report_bad(self.name, number, reason)


Record = dict[str, Any]


def record_batch(
    name: str, records: list[Record], rows: list[int], columns: Sequence[str], checked: bool, report_bad: ReportBad
) -> SourceBatch:
    """Convert records to a batch of `columns`.

    Unless `checked`, a column without any value raises DataError.
    """
    if not checked:  # a key may be absent in some records, but not in the whole first batch
        require_columns(name, dict.fromkeys(key for record in records for key in record), columns)
    table = pa.table({column: typed([record.get(column) for record in records]) for column in columns})
    return as_utf8(SourceBatch(name, table, np.array(rows, np.int64)), report_bad)


def parse_object(text: str) -> Record:
    """Parse a JSON object. Raises ValueError: not JSON, not an object, nested too deeply, or a lone surrogate."""
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, needs an object")
    if text.count("[") + text.count("{") > MAX_NESTING:
        inner: list[Any] = [record]
        for _ in range(MAX_NESTING):
            inner = [value for outer in inner for value in (outer.values() if isinstance(outer, dict) else outer)]
            inner = [value for value in inner if isinstance(value, list | dict)]
        if inner:
            raise ValueError(TOO_DEEP)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"an object with a lone surrogate, {error.object[error.start]!a}") from None
    return record


def typed(values: list[Any]) -> pa.Array:
    """Convert JSON values to an array: mixed types become strings, within lists too."""
    lists = all(value is None or isinstance(value, list) for value in values)
    single = [element for value in values if value for element in value] if lists else values
    kinds = {type(value) for value in single if value is not None}
    if bool not in kinds or len(kinds) == 1:  # Arrow would convert a boolean after a float to a number
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # mixed types
            pass
    if lists:
        return pa.array([value and list(map(_text, value)) for value in values], pa.list_(pa.string()))
    return pa.array(list(map(_text, values)), pa.string())


def _text(value: Any) -> str | None:
    """Format a value independently of its batch: numbers as in numeric columns, NaN as null."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        is_integer = value.is_integer() and abs(value) < 2**53
        return str(int(value)) if is_integer else str(pa.scalar(value).cast(pa.string()).as_py())
    return json.dumps(value, ensure_ascii=False)


class RecordSource(FileSource):
    """A file of records, each with columns of its own."""

    compressible: ClassVar[bool] = True

    @abstractmethod
    def records(self, stream: BinaryIO, report_bad: ReportBad) -> Iterator[tuple[int, Record, int]]:
        """Yield (row number, record, bytes)."""

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Group the records into batches of `columns`.

        Raises DataError: a column that no record of the first batch has.
        """
        records: list[Record] = []
        rows: list[int] = []
        num_bytes, checked = 0, False
        with self.file.stream() as stream:
            for row, record, size in self.records(stream, report_bad):
                records.append(record)
                rows.append(row)
                num_bytes += size
                if len(records) >= ROWS_PER_BATCH or num_bytes >= BYTES_PER_BATCH:
                    yield record_batch(self.name, records, rows, columns, checked, report_bad)
                    records, rows, num_bytes, checked = [], [], 0, True
            if records:
                yield record_batch(self.name, records, rows, columns, checked, report_bad)


@register_source
class JsonLinesSource(RecordSource):
    """A text file with one JSON object per line."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def records(self, stream: BinaryIO, report_bad: ReportBad) -> Iterator[tuple[int, Record, int]]:
        """Yield the objects of the lines."""
        for row, line in enumerate(filter(bytes.strip, _lines(stream)), 1):  # empty lines are not rows
            if row == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise DataError(f"{self.name} is a JSON array, needs one object per line; `jq -c '.[]'` converts it")
            try:
                if len(line) >= MAX_RECORD_BYTES:
                    raise ValueError(f"a line of more than {MAX_RECORD_BYTES:,} bytes")
                record = parse_object(line.decode("utf-8-sig" if row == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                report_bad(self.name, row, f"invalid UTF-8 at byte {error.start}")
                continue
            except ValueError as error:
                report_bad(self.name, row, f"not a JSON object: {error}")
                continue
            yield row, record, len(line)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines, truncated to the limit to bound memory."""
    while line := stream.readline(MAX_RECORD_BYTES):
        yield line
        while len(line) >= MAX_RECORD_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_RECORD_BYTES)


@register_source
class WebDatasetSource(RecordSource):
    """A shard, with one row per sample."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar",)

    def split(self) -> Sequence[Part]:
        """Return a single part. Raises DataError: truncated or rejected, see `check_shard`."""
        check_shard(self.file)
        return super().split()

    def records(self, stream: BinaryIO, report_bad: ReportBad) -> Iterator[tuple[int, Record, int]]:
        """Yield the samples; bad ones are reported.

        Raises DataError: no samples, or a duplicate member.
        """
        from webdataset.tariterators import group_by_keys, tar_file_iterator  # imports torch: seconds per worker

        members = ({**member, "__url__": self.name} for member in tar_file_iterator(stream, select_files=is_text))
        empty = True
        try:
            for row, sample in enumerate(group_by_keys(members), 1):
                try:
                    record = record_of(sample)
                except ValueError as error:
                    report_bad(self.name, row, f"sample {sample[KEY]!r}: {error}")
                    continue
                empty = False
                yield row, record, sum(len(content) for content in sample.values())
        except ValueError as error:  # a duplicate member in a sample
            raise DataError(f"{self.name}: {error.args[0]}; give every sample a unique key") from None
        if empty:
            raise DataError(f"{self.name} has no usable samples")


def check_shard(file: TableFile) -> bool:
    """Return whether there are texts. Raises DataError: a damaged tar header, a member that readers would unpickle."""
    last = "the beginning"
    has_texts = False
    with file.open() as compressed, tempfile.TemporaryFile() as unpacked:
        stream = compressed
        if not compressed.seekable():  # zstd
            shutil.copyfileobj(compressed, unpacked)
            unpacked.seek(0)
            stream = unpacked
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    setattr(tar, "members", [])  # noqa: B010 (not in the stubs; bounds memory)
                    last = f"member {member.name!r}"
                    if member.name.lower().endswith(tuple(f".{suffix}" for suffix in UNPICKLED_SUFFIXES)):
                        raise DataError(f"{file.name}: {last} is a pickle, which can run code; rejected, omit it")
                    if is_text(member.name):
                        has_texts = True
                        if member.size > MAX_RECORD_BYTES:
                            raise DataError(
                                f"{file.name}: {last} has {member.size:,} bytes, at most {MAX_RECORD_BYTES:,} are read"
                            )
                # tarfile takes an early end for that of the archive, which is a block of zeros
                stream.seek(tar.offset)
                end = stream.read(tarfile.BLOCKSIZE)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{file.name} is damaged or truncated after {last}: {error}") from None
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise DataError(f"{file.name} is damaged or truncated after {last}: no end-of-archive marker; get it again")
    return has_texts


def is_text(name: str) -> bool:
    """Return whether a member has the suffix of a text file."""
    return name.lower().endswith(tuple(f".{suffix}" for suffix in TEXT_SUFFIXES))


def record_of(sample: dict[str, Any]) -> Record:
    """Return a sample's columns.

    Raises ValueError: not UTF-8, not a JSON object, or a duplicate column.
    """
    record: Record = {KEY: sample[KEY]}
    for suffix, member in sample.items():
        if suffix.startswith("__"):
            continue
        name, _, kind = suffix.rpartition(".")
        try:
            text = member.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 in .{suffix} at byte {error.start}") from None
        columns: Record = {name or kind: text}
        if kind == "json":
            try:
                content = parse_object(text)
            except json.JSONDecodeError as error:
                raise ValueError(f".{suffix} is not JSON: {error}") from None
            except ValueError as error:
                raise ValueError(f".{suffix} is {error}") from None
            columns = {f"{name}.{key}" if name else key: value for key, value in content.items()}
        for column in columns:
            if column in record:
                raise ValueError(f"column {column!r} comes from .{suffix} and from another member")
        record |= columns
    return record
