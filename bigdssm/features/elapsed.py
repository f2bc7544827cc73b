"""The time since the previous event, as a code of logarithmic buckets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError
from bigdssm.features.base import FIRST_CODE, OUT_OF_VOCABULARY, PADDING, Decoder, Feature, register
from bigdssm.features.columns import RowCheck
from bigdssm.features.ragged import Column
from bigdssm.features.tokenizer import TextTokenizer

BUCKETS = 64  # half octaves of 1 + seconds: up to 136 years


@register
@dataclass(frozen=True)
class Elapsed(Feature):
    """The time between an event and its sequence's previous one, in half octaves; the first event has none."""

    type: ClassVar[str] = "elapsed"
    from_sequence: ClassVar[bool] = True

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: not a feature of events."""
        if side != "event":
            raise ConfigError(f"{key}: got type=elapsed on side {side}, needs a feature of data.event")

    @property
    def canonical_type(self) -> pa.DataType:
        """Return int64: the canonical form is the code."""
        return pa.int64()

    @property
    def missing(self) -> int:
        """Return the code of an event without a previous one."""
        return OUT_OF_VOCABULARY

    def read(self, check: RowCheck) -> pa.Array:
        """Not implemented: it is computed from the times of the sequences."""
        raise NotImplementedError

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return int64."""
        return pa.int64()

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the codes unchanged."""
        return column

    @property
    def num_codes(self) -> int:
        """Return the number of codes."""
        return FIRST_CODE + BUCKETS

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return codes of the whole range."""
        codes: np.ndarray = random.randint(PADDING, self.num_codes, rows)
        return codes

    def describe(self, vocab_size: int) -> str:
        """Return the number of buckets."""
        return f"{BUCKETS} buckets of time since the previous event"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the lower bound in seconds, None without a previous event."""
        code = int(values)
        return None if code < FIRST_CODE else round(2 ** ((code - FIRST_CODE) / 2) - 1)


def elapsed_codes(seconds: np.ndarray) -> np.ndarray:
    """Return the codes of durations in seconds, float64; NaN: no previous event."""
    known = ~np.isnan(seconds)
    octave = np.log2(1 + np.maximum(np.where(known, seconds, 0), 0))
    bucket = np.minimum(2 * octave, BUCKETS - 1).astype(np.int64)
    codes: np.ndarray = np.where(known, FIRST_CODE + bucket, OUT_OF_VOCABULARY)
    return codes
