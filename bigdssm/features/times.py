"""Times of tables and requests: numbers of one unit per dataset, declared or found from all values, and dates.

Without a declared unit every number must be a date of 1975 to 2100 in one unit: there the ranges of the units are
disjoint. A date or an ISO 8601 text has its unit from its type, and is converted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from bigdssm.errors import DataError
from bigdssm.features.columns import PER_SECOND, RowCheck, SourceBatch, TimeUnit, numbers, seconds_of
from bigdssm.features.event_time import DAY, END_SECOND, EPOCH, FIRST_SECOND, MICROSECONDS

DeclaredUnit = Literal["auto", "s", "ms", "us", "ns"]
# The dates that a number can be recognized by: END_DATE is less than 1,000 times FIRST_DATE, the ratio of two units.
FIRST_DATE, END_DATE = 157_766_400, END_SECOND  # 1975 to 2100, seconds since 1970
EDGES = np.array([edge * per_second for per_second in PER_SECOND.values() for edge in (FIRST_DATE, END_DATE)], float)
# Groups of times: dates in each unit, and four others.
DATES, DAYS, NEAR_0, OTHER = "dates", "days", "near 0", "other"
GROUPS = (*PER_SECOND, DATES, DAYS, NEAR_0, OTHER)
DESCRIBED = {  # in messages
    DATES: "dates, in s",
    DAYS: "day numbers",
    NEAR_0: "near 0",
    OTHER: "outside 1975 to 2100 in each unit",
}
RECOGNIZED = 0.99  # share of recognized times from which those of a dataset without a recorded unit are dates


@dataclass(frozen=True)
class Times:
    """The times of the rows of a batch, float64 in the unit of the rule that read them; without one dates are in s."""

    values: np.ndarray
    is_date: np.ndarray  # bool: from a date, a timestamp or an ISO 8601 text

    @classmethod
    def zeros(cls, length: int) -> "Times":
        """Return times of rows that have none."""
        return cls(np.zeros(length), np.zeros(length, bool))


@dataclass(frozen=True)
class TimeRule:
    """The rule by which numbers are times: their unit, and the range [first, end) of valid ones, in this unit."""

    unit: TimeUnit | None = None  # None: to be found, see `matching_unit`
    first: float = -np.inf
    end: float = np.inf
    needed: str = "a number"

    @classmethod
    def declared(cls, unit: TimeUnit) -> "TimeRule":
        """Return the rule of a declared unit: times of 1900 to 2100."""
        per_second = PER_SECOND[unit]
        return cls(unit, FIRST_SECOND * per_second, END_SECOND * per_second, f"a time of 1900 to 2100 in {unit}")

    @classmethod
    def recognized(cls, unit: TimeUnit) -> "TimeRule":
        """Return the rule of times that are recognized as dates in `unit`: those of 1975 to 2100."""
        per_second = PER_SECOND[unit]
        return cls(unit, FIRST_DATE * per_second, END_DATE * per_second, f"a time of 1975 to 2100 in {unit}")

    @classmethod
    def of_dataset(cls, times: Mapping[str, Any]) -> "TimeRule":
        """Return the rule of a dataset, from `times` of its dataset.json: the narrowest that its times fulfil."""
        unit = recorded_unit(times)
        if "unit" not in times:  # of an earlier version: counts of dates of 2000 to 2100
            num_dates = sum(count for _, count, _ in times.get("units", []))
            is_dated = num_dates > 0 and num_dates >= RECOGNIZED * times["num_times"]
            return cls.recognized(unit) if is_dated else cls(unit)
        extremes = np.array([times["oldest"], times["newest"]])
        rules = (cls.recognized(unit), cls.declared(unit))
        return next((rule for rule in rules if rule.accepts(extremes).all()), cls(unit))

    @property
    def per_second(self) -> int:
        """The number of units in a second."""
        return PER_SECOND[self.unit or "s"]

    def accepts(self, values: np.ndarray) -> np.ndarray:
        """Return whether each number is in the range, bool."""
        return (values >= self.first) & (values < self.end)


def recorded_unit(times: Mapping[str, Any]) -> TimeUnit:
    """Return the unit of a dataset, from `times` of its dataset.json.

    Without a record it is that of most recognized times; seconds if none is.
    """
    if "unit" in times:
        return cast(TimeUnit, times["unit"])
    powers = dict(zip((0, 3, 6, 9), PER_SECOND, strict=True))
    power, *_ = max(times.get("units", []), key=lambda counted: counted[1], default=(0,))
    return powers[power]


def times(check: RowCheck, name: str, rule: TimeRule) -> Times:
    """Return a time column; rows without a valid time fail.

    Numbers are in the unit of the rule; dates, timestamps and ISO 8601 texts (without a time zone: UTC) are converted.
    """
    array = check.column(name)
    values, is_date = _read_times(check, name, rule)
    check.fail(~np.isfinite(values), f"{name} is {{}}, needs a number or an ISO-8601 time", array)
    check.fail(~is_date & ~rule.accepts(values), f"{name} is {{}}, needs {rule.needed}", array)
    return Times(values, is_date)


def _read_times(check: RowCheck, name: str, rule: TimeRule) -> tuple[np.ndarray, np.ndarray]:
    """Return a time column, float64 in the unit of the rule, and the mask of dates; missing and unreadable: NaN."""
    array = check.column(name)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        values = seconds_of(array, rule.per_second)
        is_date = np.ones(len(values), bool)
    elif pa.types.is_temporal(array.type) or pa.types.is_boolean(array.type):
        raise DataError(f"{check.batch.file}: column {name!r} holds {array.type}, needs dates, timestamps or numbers")
    else:
        values, is_date = numbers(check, name)
        values = values.copy()  # Arrow's memory is read-only
        for i in np.flatnonzero(is_date).tolist():
            values[i] = _parse_iso(str(array[i].as_py()), rule.per_second)
    return values, is_date


def times_or_missing(check: RowCheck, name: str, rule: TimeRule) -> np.ndarray:
    """Return a time column, float64 in the unit of the rule, as `times`; missing and invalid times are NaN.

    Invalid ones are reported.
    """
    array = check.column(name)
    if pa.types.is_null(array.type):
        return np.full(len(array), np.nan)
    values, is_date = _read_times(check, name, rule)
    is_unreadable = is_date & np.isnan(values) & array.is_valid().to_numpy(zero_copy_only=False)
    wrong = is_unreadable | (~np.isnan(values) & ~rule.accepts(values))
    check.blank(wrong, f"{name} is {{}}, needs {rule.needed}", array)
    return np.where(wrong, np.nan, values)


def parse_time(value: float | str | date, rule: TimeRule) -> tuple[float, bool]:
    """Parse a single time as `times` does, and return whether it is a date; NaN if invalid."""
    if isinstance(value, date):
        is_valid = value == value  # pandas' NaT is a date that does not equal itself
        return (_of_date(value, rule.per_second) if is_valid else float("nan")), True
    try:
        return float(value), False
    except ValueError:
        return _parse_iso(str(value), rule.per_second), True


def _parse_iso(text: str, per_second: int) -> float:
    try:
        parsed = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        return float("nan")
    return _of_date(parsed, per_second)


def _of_date(value: date, per_second: int) -> float:
    """Return the time of a date since 1970; without a time zone, it is UTC."""
    if not isinstance(value, datetime):
        value = datetime.combine(value, time())
    utc = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    microseconds = (utc - EPOCH) // timedelta(microseconds=1)
    return microseconds * per_second / MICROSECONDS


class TimeSummary:
    """The times of a part of a table by group (a unit, DATES, DAYS, NEAR_0 or OTHER), and the oldest and newest one."""

    def __init__(self) -> None:
        # by group: count, and the least value with its file and row
        self._groups: dict[str, tuple[int, float, str, int]] = {}
        self._range: tuple[float, float] | None = None

    def add(self, batch: SourceBatch, times: Times, rows: np.ndarray) -> None:
        """Add the times of the rows in the mask `rows`, bool [rows of the batch]."""
        values = times.values[rows]
        if not len(values):
            return
        oldest, newest = self._range or (np.inf, -np.inf)
        self._range = min(oldest, float(values.min())), max(newest, float(values.max()))
        groups = groups_of(values)
        groups[times.is_date[rows]] = GROUPS.index(DATES)
        for group in np.unique(groups).tolist():
            members = np.flatnonzero(groups == group)
            least = members[values[members].argmin()]
            row = int(batch.rows[rows][least])
            self._add(GROUPS[group], len(members), (float(values[least]), batch.file, row))

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Add the facts of another summary."""
        for group, (count, *example) in facts["groups"].items():
            self._add(group, count, tuple(example))
        if facts["range"] is not None:
            oldest, newest = self._range or (np.inf, -np.inf)
            self._range = min(oldest, facts["range"][0]), max(newest, facts["range"][1])

    def _add(self, group: str, count: int, example: tuple[float, str, int]) -> None:
        earlier = self._groups.get(group)
        if earlier is not None:
            count += earlier[0]
            example = min(example, earlier[1:])
        self._groups[group] = (count, *example)

    @classmethod
    def merged(cls, parts: Iterable[Mapping[str, Any]]) -> "TimeSummary":
        """Return the summary of all parts, from their facts."""
        summary = cls()
        for facts in parts:
            summary.merge(facts)
        return summary

    def facts(self) -> dict[str, Any]:
        """Return the content in JSON types."""
        return {"groups": self._groups, "range": self._range}

    @property
    def groups(self) -> set[str]:
        """The groups that have times."""
        return set(self._groups)

    @property
    def range(self) -> tuple[float, float] | None:
        """The oldest and the newest time; None without any."""
        return self._range

    def described(self, groups: Iterable[str]) -> str:
        """Return the number of times of each group with an example, for messages."""
        parts = []
        for group in groups:
            count, value, file, row = self._groups[group]
            kind = DESCRIBED.get(group, f"in {group}")
            parts.append(f"{count} {kind}, such as {value:.15g} ({Path(file).name}, row {row})")
        return "; ".join(parts)


def groups_of(values: np.ndarray) -> np.ndarray:
    """Return the group of each number as an index into GROUPS, int64 [n]; none is DATES."""
    of_interval = np.full(len(EDGES) + 1, GROUPS.index(OTHER))
    of_interval[0] = GROUPS.index(NEAR_0)
    of_interval[1::2] = np.arange(len(PER_SECOND))
    groups: np.ndarray = of_interval[np.searchsorted(EDGES, values, "right")]
    is_day = (values >= FIRST_DATE // DAY) & (values < END_DATE // DAY) & (values == np.floor(values))
    groups[is_day] = GROUPS.index(DAYS)
    return groups


def mixes_units(values: np.ndarray) -> bool:
    """Return whether `values` are dates in several units."""
    groups = np.unique(groups_of(values))
    return int((groups < len(PER_SECOND)).sum()) > 1


def matching_unit(parts: Sequence[Mapping[str, Any]], where: str) -> TimeUnit:
    """Return the unit of which all times are dates of 1975 to 2100, from the facts of all parts; s without times.

    Raises DataError, with examples: there is no such unit, so that it has to be declared.
    """
    summary = TimeSummary.merged(parts)
    units = [unit for unit in PER_SECOND if unit in summary.groups or (unit == "s" and DATES in summary.groups)]
    unknown = [group for group in (NEAR_0, DAYS, OTHER) if group in summary.groups]
    if len(units) < 2 and not unknown:
        return units[0] if units else "s"
    ordered = [group for group in GROUPS if group in summary.groups]
    problem = "mixes units of time" if len(units) > 1 else "has times of unknown unit"
    days = ", or times 86,400 for day numbers" if DAYS in unknown else ""
    raise DataError(
        f"{where} {problem}: {summary.described(ordered)}; give the unit by --time-unit s, ms, us or ns "
        f"(data.time_unit), or times of one unit{days}"
    )


def check_declared(parts: Sequence[Mapping[str, Any]], unit: TimeUnit, where: str) -> None:
    """Raise DataError, with examples, if times contradict their declared unit.

    They do if all are dates in other units, or if some are and others are dates in this one.
    """
    summary = TimeSummary.merged(parts)
    read = summary.groups - {DATES}
    others = [group for group in PER_SECOND if group in read and group != unit]
    if others and (unit in read or read <= set(PER_SECOND)):
        ordered = [unit, *others] if unit in read else others
        raise DataError(
            f"{where} has times in another unit than --time-unit {unit} (data.time_unit): "
            f"{summary.described(ordered)}; give all in {unit}, or declare their unit"
        )
