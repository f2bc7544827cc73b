"""Filter expressions over document features.

    genres = Comedy and year >= 1990
    genres in (Comedy, "Film-Noir") and price < 12.5

A condition is `FEATURE = VALUE`, `FEATURE in (VALUE, …)`, or for numbers also <, <=, >, >=; all must hold. A value with
blanks or signs is double-quoted as in JSON. A feature with several values matches if any of them does. A document with
a missing value matches no condition on that feature.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features.base import filterable
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.retrieval.request import MAX_ERROR_CHARACTERS, check_utf8

MOST_CONDITIONS = 64  # each scans every document; the server's 10,000 characters would allow a thousand
CACHED_FILTERS = 32  # a byte and a bit per document and cached filter
OPERATORS = ("<=", ">=", "=", "<", ">")
_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(<=|>=|[=<>(),])|([^\s"=<>(),]+))')


@dataclass(frozen=True)
class Condition:
    """One condition on a feature."""

    feature: str
    operator: str  # one of OPERATORS, or in
    values: tuple[str, ...]


def parse_filter(text: str) -> tuple[Condition, ...]:
    """Parse a filter into its conditions, all of which must hold. Raises ConfigError: a syntax error."""
    parser = _Parser(text)
    conditions = [parser.condition()]
    while parser.tokens:
        parser.expect("and")
        conditions.append(parser.condition())
    return tuple(conditions)


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


class _Parser:
    """Recursive-descent parser of filters."""

    def __init__(self, text: str) -> None:
        self._text, self.tokens, position = text, deque[str](), 0
        while rest := text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise ConfigError(f"filter {text[:80]!r}: the quote in {rest[:20]!r} is not closed")
            position = match.end()
            self.tokens.append(match.group().strip())

    def condition(self) -> Condition:
        feature = self._word("the name of a feature")
        operator = self._next_token()
        if operator in OPERATORS:
            return Condition(feature, operator, (self._word(f"a value after {feature} {operator}"),))
        if operator.lower() != "in":
            raise self._error(f"{operator or 'nothing'} after {feature}", f"one of {', '.join(OPERATORS)}, in")
        self.expect("(")
        values = [self._word("a value")]
        while (sign := self._next_token()) == ",":
            values.append(self._word("a value"))
        if sign != ")":
            raise self._error(sign or "its end", "a comma or )")
        return Condition(feature, "in", tuple(values))

    def expect(self, expected: str) -> None:
        if (token := self._next_token()).lower() != expected:
            raise self._error(token or "its end", expected)

    def _next_token(self) -> str:
        """Return the next token, quotes included; '' at the end."""
        return self.tokens.popleft() if self.tokens else ""

    def _word(self, what: str) -> str:
        token = self._next_token()
        if not token or token in OPERATORS or token in ("(", ")", ","):
            raise self._error(token or "its end", what)
        try:
            word = str(json.loads(token)) if token.startswith('"') else token
        except ValueError:
            raise self._error(token, "a string as in JSON") from None
        check_utf8([word])  # JSON can escape lone surrogates
        return word

    def _error(self, got: str, needed: str) -> ConfigError:
        return ConfigError(
            f"filter {self._text[:80]!r}: got {got[:80]}, needs {needed}, as in genre = Drama and year > 1990"
        )
