"""Filters: expressions (features/conditions.py) on the features of documents."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.features.conditions import evaluate, parse_filter, resolve
from bigdssm.retrieval.index_types import AllowedDocuments

CACHED_FILTERS = 32  # a byte and a bit per document and cached filter


class Filters:
    """Evaluates filters over the documents of one catalogue, with a cache."""

    def __init__(self, catalogue: Catalogue, num_docs: int | None = None) -> None:
        """`num_docs`: the first documents, which an index has; None: all."""
        self._catalogue, self._num_docs = catalogue, num_docs
        self.allowed = lru_cache(CACHED_FILTERS)(self._allowed)

    @cached_property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return the type and `Feature.choices` per filterable feature."""
        every, choices = np.arange(self._catalogue.num_docs), {}
        for name, feature in self._catalogue.filterable.items():
            if values := feature.choices(self._catalogue.column(name, every)):
                choices[name] = {"type": feature.type, **values}
        return choices

    def _allowed(self, text: str) -> AllowedDocuments:
        """Return the documents that match the filter `text` and are not withdrawn.

        Raises ConfigError: an unknown feature or value.
        """
        features = self._catalogue.filterable
        expression = resolve(parse_filter(text), features)
        every = np.arange(self._catalogue.num_docs)
        passed = evaluate(expression, features, lambda name: self._catalogue.column(name, every))
        passed[self._catalogue.withdrawn] = False
        return AllowedDocuments(passed[: self._num_docs])
