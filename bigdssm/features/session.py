"""The visit of an event, such as a session id: events with equal values are one visit. It is no input of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError
from bigdssm.features.base import PADDING, Decoder, Feature, register
from bigdssm.features.columns import RowCheck, strings
from bigdssm.features.ragged import Column
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.utils.string_hashing import hash_strings


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
        hashes: np.ndarray = random.randint(0, 1 << 62, rows)
        return hashes

    def describe(self, vocab_size: int) -> str:
        """Return that it has no parameters."""
        return "visits"

    def display(self, values: np.ndarray, decoder: Decoder) -> int | None:
        """Return the hash, None if missing."""
        return int(values) or None
