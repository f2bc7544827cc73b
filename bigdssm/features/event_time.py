"""Features of the times of events: they have no column of their own. The visit of an event is one of them."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
from typing import Any, ClassVar, Literal, cast
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError, DataError
from bigdssm.features.base import FIRST_CODE, OUT_OF_VOCABULARY, PADDING, Decoder, Feature, SequenceFeature, register
from bigdssm.features.columns import RowCheck, strings
from bigdssm.features.ragged import Column
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.utils.hashing import hash_strings


@dataclass(frozen=True)
class EventTime(SequenceFeature):
    """A code per event, computed from its time and that of the event before it."""

    canonical_type: ClassVar[pa.DataType] = pa.int64()  # codes
    missing: ClassVar[int] = PADDING  # an unknown time

    @abstractmethod
    def codes(self, times: np.ndarray, previous: np.ndarray, unit: float) -> np.ndarray:
        """Return codes int64 of events at `times`, after events at `previous`, both float64 in `unit` seconds.

        NaN: an unknown time, or no previous event.
        """

    @abstractmethod
    def codes_of_values(self, values: np.ndarray) -> np.ndarray:
        """Return codes int64 of given values, float64; NaN: none. Raises DataError: an invalid value."""

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: not a feature of events."""
        if side != "event":
            raise ConfigError(f"{key}: got type={self.type} on side {side}, needs a feature of data.event")

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return codes of the whole range."""
        return cast(np.ndarray, random.randint(PADDING, self.num_codes, rows))

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the value of a code, None for an unknown time or no previous event."""
        code = int(values)
        return None if code < FIRST_CODE else code - FIRST_CODE


BUCKETS = 64  # half octaves of 1 + seconds: up to 136 years


@register
@dataclass(frozen=True)
class Elapsed(EventTime):
    """The time between an event and its sequence's previous one, in half octaves; the first event has none."""

    type: ClassVar[str] = "elapsed"
    num_codes: ClassVar[int] = FIRST_CODE + BUCKETS

    def codes(self, times: np.ndarray, previous: np.ndarray, unit: float) -> np.ndarray:
        """Return the codes of the differences, which are taken before they are converted to seconds."""
        return np.where(np.isnan(times), self.missing, elapsed_codes((times - previous) * unit))

    def codes_of_values(self, values: np.ndarray) -> np.ndarray:
        """Return the codes of seconds."""
        return elapsed_codes(values)

    def describe(self, vocab_size: int) -> str:
        """Return the number of buckets."""
        return f"{BUCKETS} buckets of time since the previous event"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the lower bound in seconds, None without a previous event."""
        bucket = super().display(values, decoder)
        return None if bucket is None else round(2 ** (bucket / 2) - 1)


def elapsed_codes(seconds: np.ndarray) -> np.ndarray:
    """Return the codes of durations in seconds, float64; NaN: no previous event."""
    known = ~np.isnan(seconds)
    octave = np.log2(1 + np.maximum(np.where(known, seconds, 0), 0))
    bucket = np.minimum(2 * octave, BUCKETS - 1).astype(np.int64)
    return np.where(known, FIRST_CODE + bucket, OUT_OF_VOCABULARY)


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
        return np.where(known, FIRST_CODE + value, self.missing)

    def codes_of_values(self, values: np.ndarray) -> np.ndarray:
        """Return the codes of hours or weekdays. Raises DataError: one is not a whole number in range."""
        known, most = ~np.isnan(values), VALUES[self.unit] - 1
        if wrong := values[known & ~np.isin(values, np.arange(most + 1))].tolist():
            raise DataError(f"{self.name} is {wrong[0]:g}, needs a whole {self.unit} from 0 to {most}")
        return np.where(known, FIRST_CODE + np.where(known, values, 0).astype(np.int64), self.missing)

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


@register
@dataclass(frozen=True)
class Session(Feature):
    """A 64-bit hash of the id of a visit; 0 if missing."""

    type: ClassVar[str] = "session"
    is_input: ClassVar[bool] = False
    canonical_type: ClassVar[pa.DataType] = pa.large_string()
    missing: ClassVar[str] = ""

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: not a feature of events."""
        if side != "event":
            raise ConfigError(f"{key}: got type=session on side {side}, needs a feature of data.event")

    def read(self, check: RowCheck) -> pa.Array:
        """Return the trimmed ids, null as ''."""
        return strings(check, self.source)

    def parse(self, value: str) -> str:
        """Return the trimmed id."""
        return value.strip()

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return int64."""
        return pa.int64()

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the hashes."""
        return pa.array(np.where(self.is_missing(column), PADDING, hash_strings(column)))

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return random hashes."""
        return cast(np.ndarray, random.randint(0, 1 << 62, rows))

    def describe(self, vocab_size: int) -> str:
        """Return that it has no parameters."""
        return "visits"

    def display(self, values: np.ndarray, decoder: Decoder) -> int | None:
        """Return the hash, None if missing."""
        return int(values) or None


MICROSECONDS = 1_000_000  # per second
UNKNOWN_TIME = int(np.iinfo(np.int64).min)
PROBE_START = 1_700_000_000  # seconds since 1970


@register
@dataclass(frozen=True)
class Timestamp(EventTime):
    """The time of an event in microseconds since 1970, whose differences are exact; only attention reads it."""

    type: ClassVar[str] = "timestamp"
    missing: ClassVar[int] = UNKNOWN_TIME

    def codes(self, times: np.ndarray, previous: np.ndarray, unit: float) -> np.ndarray:
        """Return the times in microseconds."""
        known = np.isfinite(times)
        microseconds = np.rint(np.where(known, times, 0) * (unit * MICROSECONDS)).astype(np.int64)
        return np.where(known, microseconds, self.missing)

    def codes_of_values(self, values: np.ndarray) -> np.ndarray:
        """Return the codes of seconds since 1970."""
        return self.codes(values, values, 1.0)

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return times that are minutes to days apart."""
        return self.codes_of_values(PROBE_START + np.exp(random.uniform(4, 12, rows)).cumsum())

    def describe(self, vocab_size: int) -> str:
        """Return the use."""
        return "time of the event, for attention"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the second in ISO format, UTC; None for an unknown time."""
        time = int(values)
        return None if time == self.missing else str(np.datetime64(time, "us").astype("datetime64[s]"))


def timestamp_of(event: Mapping[str, Feature]) -> str | None:
    """Return the name of the feature of events that is their time, if there is one."""
    return next((name for name, feature in event.items() if isinstance(feature, Timestamp)), None)
