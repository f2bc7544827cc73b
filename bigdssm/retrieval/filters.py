"""Filters: expressions (features/conditions.py) on the features of documents.

An index resolves the text of a filter to the form that it searches with.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.features.base import ColumnType, Feature
from bigdssm.features.categorical import Categorical
from bigdssm.features.conditions import Expression, evaluate, parse_filter, resolve
from bigdssm.features.numeric import Numeric
from bigdssm.retrieval.index_types import AllowedDocuments

BOOLEANS = (("true", "True", "TRUE", "1"), ("false", "False", "FALSE", "0"))  # as in `boolean_indices`
CACHED_FILTERS = 32  # a byte and a bit per document and cached filter


class DocumentFilters(Protocol):
    """Filters on the documents of an index."""

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return the type and `Feature.choices` per filterable feature."""

    def allowed(self, text: str) -> AllowedDocuments | Expression:
        """Return the filter `text` as the index searches with it. Raises ConfigError: invalid."""


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


class StoreFilters:
    """Resolves filters to expressions on the columns of a collection."""

    def __init__(self, columns: Mapping[str, ColumnType], catalogue: Catalogue | None) -> None:
        """`catalogue` of the dataset has the vocabularies; without one, every value may exist."""
        self._catalogue = catalogue
        self._features: dict[str, Feature] = {}
        for name, type in columns.items():
            if catalogue is None:
                self._features[name] = Numeric(name=name) if type == "number" else _AnyCategory(name=name)
            elif name in catalogue.filterable:
                self._features[name] = catalogue.filterable[name]

    @cached_property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return the choices in the dataset; none without it."""
        choices = {} if self._catalogue is None else Filters(self._catalogue).choices
        return {name: choice for name, choice in choices.items() if name in self._features}

    def allowed(self, text: str) -> Expression:
        """Return the resolved expression."""
        return resolve(parse_filter(text), self._features)


class _AnyCategory(Categorical):
    """A category with an unknown vocabulary; it may be one of booleans, so a boolean has all its spellings."""

    def operands(self, operator: str, values: Sequence[str]) -> tuple[str, ...]:
        super().operands(operator, ())
        spellings = {text for value in values for group in BOOLEANS if value in group for text in group}
        return tuple(sorted({*values, *spellings} - {""}))
