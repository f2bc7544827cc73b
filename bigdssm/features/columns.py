"""Read columns of source tables as strings, lists of strings and numbers, and report invalid rows.

An invalid required value (id, relevance) fails the row; an invalid feature value is reported and treated as
missing.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError

MAX_FIELD_BYTES = 1 << 20  # of a text
BYTE_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
MISSING_NUMBERS = ("", "nan", "na", "null", "none", "\\n")
TimeUnit = Literal["s", "ms", "us", "ns"]
PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
EXACT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}  # integers below 2^bits are exact


class ReportBad(Protocol):
    """Callback for invalid rows; `left_out` is false if only a value is dropped and the row is kept."""

    def __call__(self, file: str, row: int, reason: str, left_out: bool = True) -> None:
        """Record it."""


@dataclass(frozen=True)
class SourceBatch:
    """Some rows of one file: `table` has the existing requested columns, `rows` (int64) the row numbers in the file."""

    file: str
    table: pa.Table
    rows: np.ndarray

    def keep(self, mask: np.ndarray) -> "SourceBatch":
        """Return the rows where `mask` (bool) is true."""
        return SourceBatch(self.file, self.table.filter(pa.array(mask)), self.rows[mask])


class RowCheck:
    """The mask of good rows of a batch; the first fault of a row is reported."""

    def __init__(self, batch: SourceBatch, report_bad: ReportBad) -> None:
        self.batch = batch
        self.good = np.ones(len(batch.rows), bool)
        self._report_bad = report_bad

    def fail(self, mask: np.ndarray, reason: str, values: Any = None) -> None:
        """Report the rows in `mask` as bad; `{}` in `reason` is replaced by the row's entry in `values`."""
        self._report(mask, reason, values, left_out=True)
        self.good &= ~mask

    def blank(self, mask: np.ndarray, reason: str, values: Any) -> None:
        """Report the values in `mask`, which the caller treats as missing; their rows are kept."""
        self._report(mask, f"{reason}; taken as missing", values, left_out=False)

    def _report(self, mask: np.ndarray, reason: str, values: Any, left_out: bool) -> None:
        for i in np.flatnonzero(mask & self.good).tolist():
            message = reason
            if values is not None:
                try:
                    text = repr(values[i].as_py()) if isinstance(values[i], pa.Scalar) else str(values[i])
                except (ValueError, OverflowError):  # a date beyond Python's range
                    text = f"a {values[i].type} out of range"
                message = reason.replace("{}", text if len(text) <= 60 else text[:57] + "…", 1)
            self._report_bad(self.batch.file, int(self.batch.rows[i]), message, left_out)

    def column(self, name: str) -> pa.Array:
        """Return a source column as one array of a plain type."""
        column = self.batch.table.column(name)
        try:
            return plain(column.combine_chunks() if column.num_chunks != 1 else column.chunk(0))
        except pa.ArrowNotImplementedError:
            kind = column.type
            raise DataError(f"{self.batch.file}: column {name!r} holds {kind}, needs texts, numbers or times") from None


def plain(array: pa.Array) -> pa.Array:
    """Decode dictionaries, run-end encoding and views; UUIDs become texts.

    Raises ArrowNotImplementedError: another extension type, such as pandas' periods.
    """
    kind = array.type
    if isinstance(kind, pa.UuidType):
        return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.large_string())
    if isinstance(kind, pa.BaseExtensionType):
        if not pa.types.is_string(kind.storage_type):
            raise pa.ArrowNotImplementedError(str(kind))
        return array.storage
    if pa.types.is_dictionary(kind):
        return plain(array.cast(kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(array))
    if pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    if pa.types.is_binary_view(kind):
        return array.cast(pa.large_binary())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        # not by a cast: that of pyarrow 26 empties the last list
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int64))
        return pa.LargeListArray.from_arrays(offsets, array.flatten(), mask=array.is_null())
    return array


def is_empty(column: pa.Array) -> np.ndarray:
    """Return the mask of empty strings, bool."""
    return pc.equal(column, "").to_numpy(zero_copy_only=False)


def strings(check: RowCheck, name: str, *, trim: bool = True) -> pa.Array:
    """Return a column as large_string, null as ''; whole floats and decimals are formatted as integers.

    Raises DataError: lists, or values without a text form.
    """
    array = check.column(name)
    if pa.types.is_nested(array.type):
        hint = "; declare it `multi: true` if it is a categorical feature" if pa.types.is_list(array.type) else ""
        raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs single values{hint}")
    array, broken = as_texts(array, f"{check.batch.file}: column {name!r}")
    check.fail(broken, f"{name} is invalid UTF-8")
    lengths = pc.binary_length(array).to_numpy()
    check.fail(lengths > MAX_FIELD_BYTES, f"{name} has {{}} bytes, at most {MAX_FIELD_BYTES} are allowed", lengths)
    return pc.utf8_trim_whitespace(array) if trim else array


def ids(check: RowCheck, name: str, *, lacks: str = "") -> pa.Array:
    """Return a column of ids as large_string; rows with an invalid id fail.

    Invalid ids are empty ones (reported as "no `lacks`"), those with a NUL character, which no command line can pass,
    and floats that are not exact for integers: they may stand for several ids.
    """
    values = strings(check, name)
    check.fail(is_empty(values), f"{lacks and f'no {lacks}: '}{name} is empty")
    with_nul = pc.match_substring(values, "\0").to_numpy(zero_copy_only=False)
    check.fail(with_nul, f"{name} is {{}}, needs an id without a NUL character", values)
    if bits := EXACT_BITS.get(check.column(name).type):
        numbers = _as_float64(check.column(name))
        reason = f"{name} is {{}}, a {check.column(name).type} beyond 2^{bits}, which stands for several integers"
        check.fail(np.abs(numbers) >= 2.0**bits, f"{reason}; store ids as integers or texts", values)
    return values


def as_texts(array: pa.Array, where: str) -> tuple[pa.Array, np.ndarray]:
    """Return single values as large_string, null as '', and the mask of invalid UTF-8 (as ''), bool [R].

    The text depends on the value only. Raises DataError: values without a text form.
    """
    array, kind = plain(array), array.type
    invalid = np.zeros(len(array), bool)
    if pa.types.is_floating(kind):
        # the shortest exact text; whole ones as integers (columns with gaps), NaN as null
        values = _as_float64(array)
        is_integer = (np.abs(values) < 2.0**53) & (values == np.floor(values))
        texts = pa.array(np.where(is_integer, values, 0).astype(np.int64)).cast(pa.large_string())
        if not is_integer.all():
            wide = array.cast(pa.float32()) if pa.types.is_float16(kind) else array
            texts = pc.if_else(pa.array(is_integer), texts, wide.cast(pa.large_string()))
        return pc.if_else(pa.array(np.isnan(values)), pa.scalar("", texts.type), texts), invalid
    if any(is_bytes(kind) for is_bytes in BYTE_TYPES):
        array = array.cast(pa.large_binary())
        try:
            return pc.fill_null(array.cast(pa.large_string()), ""), invalid
        except pa.ArrowInvalid:
            invalid = np.array([is_invalid_utf8(value) for value in array.to_pylist()])
            array = pc.if_else(pa.array(invalid), pa.scalar(b"", array.type), array)
    try:
        texts = array.cast(pa.large_string())
    except pa.ArrowException:
        raise DataError(f"{where} holds {kind}, needs texts, numbers or times") from None
    if pa.types.is_decimal(kind):
        if pc.any(pc.match_substring(texts, "E")).as_py():  # Arrow writes small and round ones as 1.0E-7, 1.2E+3
            plain_texts = [None if value is None else format(value, "f") for value in array.to_pylist()]
            texts = pa.array(plain_texts, pa.large_string())
        texts = pc.replace_substring_regex(texts, r"(\.[0-9]*[1-9])0+$|\.0*$", r"\1")
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind):  # Arrow writes as many digits as the unit has
        texts = pc.replace_substring_regex(texts, r"(\.[0-9]*[1-9])0+(Z?)$|\.0+(Z?)$", r"\1\2\3")
    return pc.fill_null(texts, ""), invalid


def is_invalid_utf8(value: bytes | None) -> bool:
    """Return whether bytes are invalid UTF-8."""
    return value is not None and value.decode(errors="ignore").encode() != value


def _as_float64(array: pa.Array) -> np.ndarray:
    return cast(np.ndarray, array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def value_lists(check: RowCheck, name: str, separator: str) -> pa.Array:
    """Return a column as list<large_string>, cells of a text column split at `separator`, without empty values."""
    array = check.column(name)
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        cells = strings(check, name)
        parts = pc.utf8_split_whitespace(cells) if separator == " " else pc.split_pattern(cells, separator)
    else:
        if pa.types.is_nested(array.type.value_type):
            raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs lists of single values")
        # Readers validate strings in columns, but not in lists.
        parts = array.cast(pa.list_(pa.binary())) if pa.types.is_string(array.type.value_type) else array
    lengths = pc.fill_null(pc.list_value_length(parts), 0).to_numpy(zero_copy_only=False)
    texts, broken = as_texts(parts.flatten(), f"{check.batch.file}: column {name!r}")
    parents = np.repeat(np.arange(len(lengths)), lengths)
    check.fail(np.isin(np.arange(len(lengths)), parents[broken]), f"{name} has a value of invalid UTF-8")
    flat = pc.utf8_trim_whitespace(texts)
    keep = pc.not_equal(flat, "")
    retained_before = np.concatenate([[0], np.cumsum(keep.to_numpy(zero_copy_only=False))])
    offsets = retained_before[np.concatenate([[0], np.cumsum(lengths)])]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat.filter(keep))


def relevances(check: RowCheck, name: str) -> np.ndarray:
    """Return a relevance column as float64; rows with a missing, infinite, negative or non-numeric value fail."""
    values, unreadable = numbers(check, name)
    needed = "a finite number ≥ 0, the weight of the row"
    check.fail(unreadable | ~(values >= 0), f"{name} is {{}}, needs {needed}", check.column(name))
    return values


def numbers(check: RowCheck, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a column as float64, missing as NaN, and the mask of values that are not a finite float32, bool [R].

    Dates and timestamps are seconds since 1970 (UTC), durations and times of day seconds. Raises DataError: another
    type of column.
    """
    array = check.column(name)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        values, unreadable = parse_numbers(array)
    else:
        try:
            values = seconds_of(array) if pa.types.is_temporal(array.type) else _as_float64(array)
        except pa.ArrowException:
            raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs numbers") from None
        unreadable = np.zeros(len(values), bool)  # integers beyond 2^53 are rounded
    return values, unreadable | (np.abs(values) > float(np.finfo(np.float32).max))


def seconds_of(array: pa.Array, per_second: int = 1) -> np.ndarray:
    """Return dates and times as float64 seconds, or parts `per_second` of a second; null as NaN.

    Raises ArrowException: an interval of months.
    """
    kind = array.type
    per_second_of_array = PER_SECOND.get(getattr(kind, "unit", "s"), 1)
    if pa.types.is_date32(kind):
        return _as_float64(array.cast(pa.int32())) * (86_400 * per_second)
    if pa.types.is_date64(kind):
        per_second_of_array = 1000
    counts = array.cast(pa.int32() if pa.types.is_time32(kind) else pa.int64())
    if per_second_of_array == 10**9:
        per_second_of_array = 10**6
        counts = pc.divide(counts, 1000)  # nanoseconds since 1970 are beyond 2^53
    if per_second > per_second_of_array:
        return _as_float64(counts) * (per_second // per_second_of_array)
    return _as_float64(counts) / (per_second_of_array // per_second)


def parse_numbers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as float64, missing as NaN, and the mask of texts that are not numbers, bool [R]."""
    trimmed = pc.utf8_trim_whitespace(pc.fill_null(array, ""))
    absent = pc.is_in(pc.utf8_lower(trimmed), value_set=pa.array(MISSING_NUMBERS, trimmed.type))
    candidates = pc.if_else(absent, pa.scalar(None, trimmed.type), trimmed)
    try:
        return candidates.cast(pa.float64()).to_numpy(zero_copy_only=False), np.zeros(len(array), bool)
    except pa.ArrowInvalid:
        values, unparsable = np.full(len(array), np.nan), np.zeros(len(array), bool)
        for i, text in enumerate(candidates.to_pylist()):
            try:
                values[i] = np.nan if text is None else float(text)
                unparsable[i] = text is not None and "_" in text  # valid in Python only
            except ValueError:
                unparsable[i] = True
        return values, unparsable
