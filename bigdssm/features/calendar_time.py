"""The hour or weekday of an event in a time zone."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
from typing import ClassVar, Literal
from zoneinfo import ZoneInfo

import numpy as np

from bigdssm.errors import ConfigError, DataError
from bigdssm.features.base import FIRST_CODE, Feature, register
from bigdssm.features.event_time import EventTime

VALUES = {"hour": 24, "weekday": 7, "hour_of_week": 168}
HOUR, DAY = 3600, 86_400
FIRST_SECOND, END_SECOND = -2_208_988_800, 4_102_444_800  # 1900 to 2100, since 1970
MONDAY = 4  # days from 1970-01-01, a Thursday, to a Monday
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@register
@dataclass(frozen=True)
class CalendarTime(EventTime):
    """The local hour (0 to 23), weekday (0 to 6, from Monday) or hour of the week (0 to 167) of an event."""

    type: ClassVar[str] = "calendar"

    unit: Literal["hour", "weekday", "hour_of_week"] = "hour"
    timezone: str = "UTC"  # a name of the IANA database, such as Europe/Berlin

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: not a feature of events, or an unknown time zone."""
        super().check(key, side, docs)
        try:
            _zone(self.timezone)
        except (KeyError, ValueError, OSError):
            raise ConfigError(
                f"{key}.timezone: got {self.timezone!r}, needs a time zone of this system (or of the package tzdata), "
                "such as Europe/Berlin"
            ) from None

    def codes(self, times: np.ndarray, previous: np.ndarray, unit: float) -> np.ndarray:
        """Return the codes of local times; those outside 1900 to 2100 are missing."""
        seconds = np.floor(times * unit)
        known = (seconds >= FIRST_SECOND) & (seconds < END_SECOND)
        utc = np.where(known, seconds, 0).astype(np.int64)
        since, offsets = _offsets(self.timezone)
        hours = (utc + offsets[np.searchsorted(since, utc, "right") - 1]) // HOUR
        hour, weekday = hours % 24, (hours // 24 - MONDAY) % 7
        value = {"hour": hour, "weekday": weekday, "hour_of_week": 24 * weekday + hour}[self.unit]
        codes: np.ndarray = np.where(known, FIRST_CODE + value, self.missing)
        return codes

    def codes_of_values(self, values: np.ndarray) -> np.ndarray:
        """Return the codes of hours or weekdays. Raises DataError: one is not a whole number in range."""
        known, most = ~np.isnan(values), VALUES[self.unit] - 1
        if wrong := values[known & ~np.isin(values, np.arange(most + 1))].tolist():
            raise DataError(f"{self.name} is {wrong[0]:g}, needs a whole {self.unit} from 0 to {most}")
        codes: np.ndarray = np.where(known, FIRST_CODE + np.where(known, values, 0).astype(np.int64), self.missing)
        return codes

    @property
    def num_codes(self) -> int:
        """Return the number of codes."""
        return FIRST_CODE + VALUES[self.unit]

    def describe(self, vocab_size: int) -> str:
        """Return the unit and the time zone."""
        return f"{self.unit} in {self.timezone}"


def _zone(name: str) -> timezone | ZoneInfo:
    return timezone.utc if name == "UTC" else ZoneInfo(name)  # UTC needs no database


@cache
def _offsets(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds at which the offset from UTC changes, from FIRST_SECOND on, and the offsets, int64.

    The offset is looked up daily, and its changes by bisection: no time zone changes it and back within a day.
    """
    zone = _zone(name)

    def offset_at(second: int) -> int:
        offset = (EPOCH + timedelta(seconds=second)).astimezone(zone).utcoffset()
        assert offset is not None
        return int(offset.total_seconds())

    since, offsets = [FIRST_SECOND], [offset_at(FIRST_SECOND)]
    for day in range(FIRST_SECOND + DAY, END_SECOND + 1, DAY):
        if (offset := offset_at(day)) != offsets[-1]:
            before, after = day - DAY, day
            while after - before > 1:
                middle = (before + after) // 2
                before, after = (middle, after) if offset_at(middle) == offsets[-1] else (before, middle)
            since.append(after)
            offsets.append(offset)
    return np.array(since), np.array(offsets)
