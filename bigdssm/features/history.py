"""History features: the documents of a user's earlier events, oldest first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError
from bigdssm.features.base import OUT_OF_VOCABULARY, PADDING, Decoder, Feature, SequenceFeature, pad_lists, register
from bigdssm.features.categorical import UNKNOWN, Categorical, boolean_indices, codes_of, lists_of_codes
from bigdssm.features.ragged import Column
from bigdssm.utils.components import bounded


def history_input(feature, values, exported):  # type: ignore[no-untyped-def]
    """Return the codes of the newest items, int64 [rows, T]."""
    item, most = exported.schema["doc"][feature["of"]], feature["max_items"]
    codes = [codes_of(item, (value or [])[-most:]) for value in values]
    return pad_lists([[max(code, 1) for code in row] for row in codes], 0)  # 0 marks the end of a history


@register
@dataclass(frozen=True)
class History(SequenceFeature):
    """Codes of earlier documents, in the vocabulary of one of their features, read from the sequences."""

    type: ClassVar[str] = "history"
    example: ClassVar[str] = '["a value"]'
    canonical_type: ClassVar[pa.DataType] = pa.list_(pa.int64())  # codes
    padding: ClassVar[int] = PADDING
    onnx_code: ClassVar = (pad_lists, boolean_indices, codes_of, history_input)

    of: str | None = None  # the single-valued categorical document feature that identifies an item
    max_items: int = bounded(50, 1, 65_536)  # number of newest items

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: a history on the document side, or `of` is not a single-valued categorical feature."""
        if side != "query":
            raise ConfigError(f"{key}: got type=history on side {side}, needs a query feature")
        valid = [name for name, doc in docs.items() if isinstance(doc, Categorical) and not doc.multi]
        if self.of not in valid:
            raise ConfigError(
                f"{key}.of: got {self.of}, needs a single-valued categorical document feature, one of {valid}"
            )

    @property
    def missing(self) -> list[int]:
        """Return no items."""
        return []

    @property
    def max_length(self) -> int:
        """Return `max_items`."""
        return self.max_items

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return histories of all lengths."""
        return lists_of_codes(random, rows, self.max_items, docs[str(self.of)].num_codes)

    def describe(self, vocab_size: int) -> str:
        """Return the maximum length and the item feature."""
        return f"newest {self.max_items} of doc.{self.of}"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the titles of the items, oldest first."""
        codes = [code for code in values.tolist() if code != PADDING]
        return [UNKNOWN if code == OUT_OF_VOCABULARY else decoder.item(str(self.of), code) for code in codes]


def item_codes(codes: np.ndarray) -> np.ndarray:
    """Return codes for a history: an item without a value is out of vocabulary, since 0 marks the end of a history."""
    return cast(np.ndarray, np.maximum(codes, OUT_OF_VOCABULARY))


def histories_of(features: Mapping[str, Feature]) -> dict[str, History]:
    """Return the history features."""
    return {name: feature for name, feature in features.items() if isinstance(feature, History)}


def stored_features(features: Mapping[str, Feature]) -> dict[str, Feature]:
    """Return the features with a column; the others are derived from the sequences."""
    return {name: feature for name, feature in features.items() if not feature.from_sequence}
