"""The arrival time of a document, for its age at the time of a request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError
from bigdssm.features.base import Decoder, Feature, register
from bigdssm.features.columns import RowCheck, TimeUnit
from bigdssm.features.event_time import MICROSECONDS, PROBE_START, UNKNOWN_TIME
from bigdssm.features.ragged import Column
from bigdssm.features.times import TimeRule, parse_time, times_or_missing
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.utils.components import bounded

MAX_PERIODS = 64


@register
@dataclass(frozen=True)
class Age(Feature):
    """The time at which a document arrived; the score depends on its age at the request, see `models.age`."""

    type: ClassVar[str] = "age"
    example: ClassVar[str] = f"{PROBE_START}"
    canonical_type: ClassVar[pa.DataType] = pa.int64()  # microseconds since 1970
    missing: ClassVar[int] = UNKNOWN_TIME

    unit: TimeUnit = "s"  # of numbers in the column, times since 1970; dates and ISO 8601 texts need none
    periods: int = bounded(16, 2, MAX_PERIODS)  # number of periods, each with two dimensions of model.dim

    @property
    def width(self) -> int:
        """Return the number of dimensions of both vectors that belong to the age."""
        return 2 * self.periods

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: not a feature of documents, or a second one of this type."""
        if side != "doc":
            raise ConfigError(f"{key}: got type=age on side {side}, needs a feature of data.doc")
        others = [name for name, feature in docs.items() if isinstance(feature, Age)]
        if len(others) > 1:
            raise ConfigError(f"{key}: got {len(others)} features of type age, {', '.join(others)}, needs one")

    def read(self, check: RowCheck) -> pa.Array:
        """Return the times; those outside 1900 to 2100 in the unit are reported and missing."""
        return pa.array(self._microseconds(times_or_missing(check, self.source, TimeRule.declared(self.unit))))

    def parse(self, value: str) -> int:
        """Return the microseconds of a number in the unit or an ISO 8601 text. Raises ConfigError."""
        rule = TimeRule.declared(self.unit)
        time, _ = parse_time(value, rule)
        if not rule.accepts(np.array(time)):
            raise ConfigError(f"{self.name} is {value!r}, needs {rule.needed}, or an ISO-8601 time")
        return int(self._microseconds(np.array([time]))[0])

    def _microseconds(self, times: np.ndarray) -> np.ndarray:
        """Return times, float64 in the unit, as int64 microseconds; NaN as UNKNOWN_TIME."""
        known = ~np.isnan(times)
        per_unit = MICROSECONDS / TimeRule.declared(self.unit).per_second
        microseconds = np.rint(np.where(known, times, 0) * per_unit).astype(np.int64)
        return np.where(known, microseconds, UNKNOWN_TIME)

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return int64."""
        return pa.int64()

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the microseconds unchanged."""
        return column

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return times of two years, a fifth of them unknown."""
        seconds = PROBE_START - random.randint(0, 2 * 365 * 86_400, rows)
        return np.where(random.rand(rows) < 0.2, UNKNOWN_TIME, seconds * MICROSECONDS)

    def describe(self, vocab_size: int) -> str:
        """Return the number of periods."""
        return f"age at the request, {self.periods} periods"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the second in ISO format, UTC; None for an unknown time."""
        time = int(values)
        return None if time == UNKNOWN_TIME else str(np.datetime64(time, "us").astype("datetime64[s]"))


def age_of(docs: Mapping[str, Feature]) -> Age | None:
    """Return the feature of documents that is their age, if there is one."""
    return next((feature for feature in docs.values() if isinstance(feature, Age)), None)
