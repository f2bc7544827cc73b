"""The time since the previous event, as a code of logarithmic buckets."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bigdssm.features.base import FIRST_CODE, OUT_OF_VOCABULARY, Decoder, register
from bigdssm.features.event_time import EventTime

BUCKETS = 64  # half octaves of 1 + seconds: up to 136 years


@register
@dataclass(frozen=True)
class Elapsed(EventTime):
    """The time between an event and its sequence's previous one, in half octaves; the first event has none."""

    type: ClassVar[str] = "elapsed"

    def codes(self, times: np.ndarray, previous: np.ndarray, unit: float) -> np.ndarray:
        """Return the codes of the differences, which are taken before they are converted to seconds."""
        codes: np.ndarray = np.where(np.isnan(times), self.missing, elapsed_codes((times - previous) * unit))
        return codes

    def codes_of_values(self, values: np.ndarray) -> np.ndarray:
        """Return the codes of seconds."""
        return elapsed_codes(values)

    @property
    def num_codes(self) -> int:
        """Return the number of codes."""
        return FIRST_CODE + BUCKETS

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
    codes: np.ndarray = np.where(known, FIRST_CODE + bucket, OUT_OF_VOCABULARY)
    return codes
