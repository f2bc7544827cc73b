"""Columns of source tables as strings, lists of strings, numbers and times, with what is wrong with their rows.

What a row cannot do without (ids, relevance, time) fails the row; a feature's value that cannot be read is reported and
taken as missing: real tables have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timezone
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError

MAX_FIELD_BYTES = 1 << 20  # of a text: a longer one would cost more than its block
BYTE_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
MISSING_NUMBERS = ("", "nan", "na", "null", "none", "\\n")
EXACT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}  # whole numbers below 2^bits are all there
THIS_CENTURY, EPOCH_POWERS = (946_684_800, 4_102_444_800), (0, 3, 6, 9)  # s since 1970; s, ms, µs, ns


class ReportBad(Protocol):
    """Takes what is wrong with a row; `left_out` is false where only a value is dropped and the row stays."""

    def __call__(self, file: str, row: int, reason: str, left_out: bool = True) -> None:
        """Record it."""


@dataclass(frozen=True)
class SourceBatch:
    """Some rows of one file: `table` has the asked columns that exist, `rows` (int64) their numbers in the file."""

    file: str
    table: pa.Table
    rows: np.ndarray

    def keep(self, mask: np.ndarray) -> SourceBatch:
        """Return the rows where `mask` (bool) is true."""
        return SourceBatch(self.file, self.table.filter(pa.array(mask)), self.rows[mask])


class RowCheck:
    """Which rows of a batch are still good; the first thing wrong with a row is reported."""

    def __init__(self, batch: SourceBatch, report_bad: ReportBad) -> None:
        self.batch = batch
        self.good = np.ones(len(batch.rows), bool)
        self._report_bad = report_bad

    def fail(self, mask: np.ndarray, reason: str, values: Any = None) -> None:
        """Report the rows in `mask` as bad; `{}` in `reason` stands for the row's entry in `values`."""
        self._report(mask, reason, values, left_out=True)
        self.good &= ~mask

    def blank(self, mask: np.ndarray, reason: str, values: Any) -> None:
        """Report the values in `mask`, which the caller takes as missing; their rows stay."""
        self._report(mask, f"{reason}; taken as missing", values, left_out=False)

    def _report(self, mask: np.ndarray, reason: str, values: Any, left_out: bool) -> None:
        for i in np.flatnonzero(mask & self.good).tolist():
            said = reason if values is None else reason.replace("{}", _shown(values[i]), 1)
            self._report_bad(self.batch.file, int(self.batch.rows[i]), said, left_out)

    def column(self, name: str) -> pa.Array:
        """Return a source column as one array, of a plain type."""
        column = self.batch.table.column(name)
        try:
            return plain(column.combine_chunks() if column.num_chunks != 1 else column.chunk(0))
        except pa.ArrowNotImplementedError:
            kind = column.type
            raise DataError(f"{self.batch.file}: column {name!r} holds {kind}, needs texts, numbers or times") from None


def plain(array: pa.Array) -> pa.Array:
    """Return an array without what only says how its values are stored: dictionaries, runs, views; UUIDs as texts.

    Raises ArrowNotImplementedError: an extension type, such as pandas' periods, whose storage means something else.
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
        return array.cast(pa.large_list(kind.value_type))
    return array


def is_empty(column: pa.Array) -> np.ndarray:
    """Return which strings are empty, bool."""
    return pc.equal(column, "").to_numpy(zero_copy_only=False)


def strings(check: RowCheck, name: str, *, trim: bool = True) -> pa.Array:
    """Return a column as large_string, null as ''; whole floats and decimals are written as integers.

    Raises DataError: lists, or values without a text.
    """
    array = check.column(name)
    if pa.types.is_nested(array.type):
        hint = "; declare it `multi: true` if it is a categorical feature" if pa.types.is_list(array.type) else ""
        raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs single values{hint}")
    array, broken = _texts(array, f"{check.batch.file}: column {name!r}")
    check.fail(broken, f"{name} is invalid UTF-8")
    lengths = pc.binary_length(array).to_numpy()
    check.fail(lengths > MAX_FIELD_BYTES, f"{name} has {{}} bytes, at most {MAX_FIELD_BYTES} are taken", lengths)
    return pc.utf8_trim_whitespace(array) if trim else array


def ids(check: RowCheck, name: str, *, lacks: str = "") -> pa.Array:
    """Return a column of ids as large_string; a row without one (which `lacks` what it is of) is failed.

    So is one with a NUL character, which no command line can name, and a float at which neighbouring integers are
    one: it stands for several ids.
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


def _texts(array: pa.Array, where: str) -> tuple[pa.Array, np.ndarray]:
    """Return single values as large_string, null as '', and which are invalid UTF-8 (then ''), bool [R].

    A value's text depends on nothing but the value. Raises DataError: values have no text.
    """
    array, kind = plain(array), array.type
    broken = np.zeros(len(array), bool)
    if pa.types.is_floating(kind):
        return pc.fill_null(_float_strings(array), ""), broken
    if any(is_bytes(kind) for is_bytes in BYTE_TYPES):
        array = array.cast(pa.large_binary())
        try:
            return pc.fill_null(array.cast(pa.large_string()), ""), broken
        except pa.ArrowInvalid:
            broken = np.array([is_broken(value) for value in array.to_pylist()])
            array = pc.if_else(pa.array(broken), pa.scalar(b"", array.type), array)
    try:
        texts = array.cast(pa.large_string())
    except pa.ArrowException:
        raise DataError(f"{where} holds {kind}, needs texts, numbers or times") from None
    if pa.types.is_decimal(kind):
        texts = pc.replace_substring_regex(texts, r"(\.[0-9]*[1-9])0+$|\.0*$", r"\1")
    return pc.fill_null(texts, ""), broken


def is_broken(value: bytes | None) -> bool:
    """Return whether bytes are no UTF-8."""
    return value is not None and value.decode(errors="ignore").encode() != value


def _as_float64(array: pa.Array) -> np.ndarray:
    found: np.ndarray = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return found


def _float_strings(array: pa.Array) -> pa.Array:
    """Return floats as the shortest text that reads back; whole ones as integers (columns with gaps), NaN as null."""
    values = _as_float64(array)
    whole = (np.abs(values) < 2.0**53) & (values == np.floor(values))
    texts = pa.array(np.where(whole, values, 0).astype(np.int64)).cast(pa.large_string())
    if not whole.all():
        wide = array.cast(pa.float32()) if pa.types.is_float16(array.type) else array
        texts = pc.if_else(pa.array(whole), texts, wide.cast(pa.large_string()))
    return pc.if_else(pa.array(np.isnan(values)), pa.scalar(None, texts.type), texts)


def value_lists(check: RowCheck, name: str, separator: str) -> pa.Array:
    """Return a column as list<large_string>, cells of a text column parted at `separator`; no empty values."""
    array = check.column(name)
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        cells = strings(check, name)
        parts = pc.utf8_split_whitespace(cells) if separator == " " else pc.split_pattern(cells, separator)
    else:
        if pa.types.is_nested(array.type.value_type):
            raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs lists of single values")
        parts = array
        if pa.types.is_string(array.type.value_type):  # readers check the strings of columns, not those of lists
            parts = array.cast(pa.list_(pa.binary()))
    lengths = pc.fill_null(pc.list_value_length(parts), 0).to_numpy(zero_copy_only=False)
    texts, broken = _texts(parts.flatten(), f"{check.batch.file}: column {name!r}")
    parents = np.repeat(np.arange(len(lengths)), lengths)
    check.fail(np.isin(np.arange(len(lengths)), parents[broken]), f"{name} has a value of invalid UTF-8")
    flat = pc.utf8_trim_whitespace(texts)
    keep = pc.not_equal(flat, "")
    kept = np.concatenate([[0], np.cumsum(keep.to_numpy(zero_copy_only=False))])
    offsets = kept[np.concatenate([[0], np.cumsum(lengths)])]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat.filter(keep))


def relevances(check: RowCheck, name: str) -> np.ndarray:
    """Return a relevance column as float64; rows where it is missing, infinite, negative or no number are failed."""
    values, unreadable = numbers(check, name)
    check.fail(unreadable | ~(values >= 0), f"{name} is {{}}, needs a finite number ≥ 0", check.column(name))
    return values


def numbers(check: RowCheck, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a column as float64, missing as NaN, and which values are there but are no finite float32, bool [R].

    Dates and timestamps are seconds since 1970 (UTC), durations and times of day seconds. Raises DataError: the column
    holds something else.
    """
    array = check.column(name)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        values, unreadable = _parse_numbers(array)
    else:
        try:
            values = _seconds_of(array) if pa.types.is_temporal(array.type) else _as_float64(array)
        except pa.ArrowException:
            raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs numbers") from None
        unreadable = np.zeros(len(values), bool)  # integers beyond 2^53 are rounded
    return values, unreadable | (np.abs(values) > float(np.finfo(np.float32).max))


def _seconds_of(array: pa.Array) -> np.ndarray:
    """Return dates and times as float64 seconds, null as NaN. Raises ArrowException: an interval of months."""
    kind = array.type
    per_second = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}.get(getattr(kind, "unit", ""), 1)
    if pa.types.is_date32(kind):
        return _as_float64(array.cast(pa.int32())) * 86_400
    if pa.types.is_date64(kind):
        per_second = 1000
    counts = array.cast(pa.int32() if pa.types.is_time32(kind) else pa.int64())
    if per_second == 10**9:
        counts, per_second = pc.divide(counts, 1000), 10**6  # nanoseconds since 1970 are beyond 2^53
    return _as_float64(counts) / per_second


def _parse_numbers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
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
                unparsable[i] = text is not None and "_" in text  # Python's own notation
            except ValueError:
                unparsable[i] = True
        return values, unparsable


def times(check: RowCheck, name: str) -> np.ndarray:
    """Return a time column as float64 seconds (numbers as they are; ISO 8601 and timestamps since 1970, UTC).

    A row without a time that can be read is failed.
    """
    array = check.column(name)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        values = _seconds_of(array)
    elif pa.types.is_temporal(array.type) or pa.types.is_boolean(array.type):
        raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs dates, timestamps or numbers")
    else:
        values, unreadable = numbers(check, name)
        values = values.copy()  # Arrow's own memory cannot be written
        for i in np.flatnonzero(unreadable).tolist():
            values[i] = _parse_iso(str(array[i].as_py()))
    check.fail(~np.isfinite(values), f"{name} is {{}}, needs a number or an ISO-8601 time", array)
    return values


class TimeUnits:
    """How many of some times are dates of 2000 to 2100 in seconds, in 1/1000 …, and one of each."""

    def __init__(self) -> None:
        self._total = 0
        self._found: dict[int, tuple[int, float]] = {}  # by power of 1/10

    def add(self, moments: np.ndarray) -> None:
        """Take in times, float64."""
        self._total += len(moments)
        for power in EPOCH_POWERS:
            first, last = (seconds * 10.0**power for seconds in THIS_CENTURY)
            mask = (moments >= first) & (moments < last)
            if mask.any():
                count, one = self._found.get(power, (0, float(moments[mask][0])))
                self._found[power] = count + int(mask.sum()), one

    def facts(self) -> dict[str, Any]:
        """Return them as JSON types, for `check_time_units`."""
        return {"num_times": self._total, "units": [[power, *known] for power, known in self._found.items()]}


def check_single_unit(moments: np.ndarray, where: str) -> None:
    """Raise DataError where times, float64, are in several units, as `check_time_units` has it."""
    units = TimeUnits()
    units.add(moments)
    check_time_units([units.facts()], where)


def check_time_units(facts: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raise DataError where nearly all times are dates of 2000 to 2100, but some in seconds and others in 1/1000 …

    `facts` are those of TimeUnits, part by part.
    """
    joined = merged_units(facts)
    if len(joined["units"]) > 1 and sum(count for _, count, _ in joined["units"]) >= 0.99 * joined["num_times"]:
        some_of_each = ", ".join(f"{count} such as {one:.0f}" for _, count, one in joined["units"])
        raise DataError(
            f"{where} mixes units of time: {some_of_each}; give all in seconds since 1970, or all in another unit"
        )


def merged_units(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of TimeUnits of several parts as those of one."""
    total, found = 0, dict[int, tuple[int, float]]()
    for some in facts:
        total += some["num_times"]
        for power, count, one in some["units"]:
            before, first = found.get(power, (0, one))
            found[power] = before + count, first
    return {"num_times": total, "units": [[power, *known] for power, known in sorted(found.items())]}


def parse_time(value: float | str | date) -> float:
    """Return a time that stands in no column as `times` reads it: a number, a date, ISO 8601; NaN where it is none."""
    if isinstance(value, date):
        return _seconds(value) if value == value else float("nan")  # pandas' NaT is a date, and equals nothing
    try:
        return float(value)
    except ValueError:
        return _parse_iso(str(value))


def _parse_iso(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        return float("nan")
    return _seconds(moment)


def _seconds(moment: date) -> float:
    """Return seconds since 1970, UTC where it has no time zone."""
    if not isinstance(moment, datetime):
        moment = datetime.combine(moment, time())
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _shown(value: Any) -> str:
    try:
        text = repr(value.as_py()) if isinstance(value, pa.Scalar) else str(value)
    except (ValueError, OverflowError):  # a date that Python has not
        text = f"a {value.type} out of range"
    return text if len(text) <= 60 else text[:57] + "…"
