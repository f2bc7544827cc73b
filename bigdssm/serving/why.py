"""What a found document is near to in its query: the documents of the history, the words of the texts.

It says how near the vectors are, which is not how the towers reckon: a hint for whoever looks at an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigdssm.features import histories_of, texts_of
from bigdssm.schema import Schema

MOST_NEAR = 5  # that are shown
MOST_WORDS = 64  # of a text that are encoded
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class NearItem:
    """A document of the history."""

    key: str
    display: str
    cosine: float  # of its own vector and the found document's


@dataclass(frozen=True)
class NearWord:
    """A word of a text feature."""

    feature: str
    word: str
    cosine: float  # of the query that has this word alone for its text, and the found document


@dataclass(frozen=True)
class Why:
    """What a document is near to, the nearest first."""

    of: str  # its display name
    history: list[NearItem]
    words: list[NearWord]


def read_of(seen: np.ndarray, schema: Schema) -> np.ndarray:
    """Return the distinct catalogue rows among the events that the query's histories hold, int64."""
    most = max((feature.max_items for feature in histories_of(schema.query).values()), default=0)
    return np.unique(seen[len(seen) - min(most, len(seen)) :])


def words_of(features: Mapping[str, Any], schema: Schema) -> list[tuple[str, str]]:
    """Return (feature, word) of the distinct words that a request's texts have, in their order."""
    texts = {name: features[name] for name in texts_of(schema.query) if isinstance(features.get(name), str)}
    words = [(name, word) for name, text in texts.items() for word in WORD.findall(text)]
    return list(dict.fromkeys(words))[:MOST_WORDS]
