"""Base class of the features that are computed from the times of events: they have no column."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError
from bigdssm.features.base import FIRST_CODE, PADDING, Decoder, Feature
from bigdssm.features.columns import RowCheck
from bigdssm.features.ragged import Column
from bigdssm.features.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EventTime(Feature):
    """A code per event, computed from its time and that of the event before it."""

    from_sequence: ClassVar[bool] = True
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

    def read(self, check: RowCheck) -> pa.Array:
        """Not implemented: it is computed from the times of the sequences."""
        raise NotImplementedError

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return int64."""
        return pa.int64()

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the codes unchanged."""
        return column

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return codes of the whole range."""
        codes: np.ndarray = random.randint(PADDING, self.num_codes, rows)
        return codes

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the value of a code, None for an unknown time or no previous event."""
        code = int(values)
        return None if code < FIRST_CODE else code - FIRST_CODE
