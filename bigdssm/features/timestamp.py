"""The time of an event, for attention by time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bigdssm.features.base import Decoder, Feature, register
from bigdssm.features.event_time import EventTime
from bigdssm.features.ragged import Column

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
        codes: np.ndarray = np.where(known, microseconds, self.missing)
        return codes

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
