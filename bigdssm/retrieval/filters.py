"""Filters: conditions (features/conditions.py) on the features of documents."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features.base import filterable
from bigdssm.features.conditions import Condition, parse_filter
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.utils.arguments import MAX_ERROR_CHARACTERS

MOST_CONDITIONS = 64  # each scans every document; the server's 10,000 characters would allow a thousand
CACHED_FILTERS = 32  # a byte and a bit per document and cached filter


class Filters:
    """Evaluates filters over the documents of one catalogue, with a cache."""

    def __init__(self, schema: Schema, catalogue: Catalogue, num_docs: int | None = None) -> None:
        """`num_docs`: the first documents, which an index has; None: all."""
        self._schema, self._catalogue, self._num_docs = schema, catalogue, num_docs
        self.allowed = lru_cache(CACHED_FILTERS)(self._allowed)

    @cached_property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return the type and `Feature.choices` per filterable feature."""
        every, choices = np.arange(self._catalogue.num_docs), {}
        for name, feature in filterable(self._schema.doc).items():
            if values := feature.choices(self._catalogue.column(name, every)):
                choices[name] = {"type": feature.type, **values}
        return choices

    def _allowed(self, text: str) -> AllowedDocuments:
        """Return the documents that match the filter `text` and are not withdrawn.

        Raises ConfigError: an unknown feature or value.
        """
        every = np.arange(self._catalogue.num_docs)
        passed = np.ones(len(every), bool)
        for name, conditions in _by_feature(parse_filter(text)).items():
            feature = self._schema.doc.get(name)
            if feature is None:
                requested = name[:MAX_ERROR_CHARACTERS]
                near = difflib.get_close_matches(requested, self._schema.doc, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(
                    f"filter: {requested!r} is not a document feature; they are {', '.join(self._schema.doc)}{meant}"
                )
            column = self._catalogue.column(name, every)
            for condition in conditions:
                passed &= feature.matches(column, condition.operator, condition.values)
        passed[self._catalogue.withdrawn] = False
        return AllowedDocuments(passed[: self._num_docs])


def _by_feature(conditions: Iterable[Condition]) -> dict[str, list[Condition]]:
    """Group distinct conditions by feature. Raises ConfigError: more than MOST_CONDITIONS."""
    distinct = dict.fromkeys(
        replace(condition, values=tuple(sorted(set(condition.values)))) for condition in conditions
    )
    if len(distinct) > MOST_CONDITIONS:
        raise ConfigError(
            f"filter: got {len(distinct)} conditions, needs at most {MOST_CONDITIONS}; combine several values of a "
            "feature, as in genre in (Drama, Comedy)"
        )
    by_feature: dict[str, list[Condition]] = {}
    for condition in distinct:
        by_feature.setdefault(condition.feature, []).append(condition)
    return by_feature
