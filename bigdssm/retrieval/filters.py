"""Filters: which documents may be found, said in a line of text about their features.

    genres = Comedy and year >= 1990
    genres in (Comedy, "Film-Noir") and price < 12.5

A condition is `FEATURE = VALUE`, `FEATURE in (VALUE, …)`, or for numbers also <, <=, >, >=; all of them have to hold. A
value with blanks or signs stands in double quotes, as in JSON. Of a feature with several values one has to be named. A
document whose value is missing fulfils no condition on it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features.base import filterable
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.retrieval.request import SHOWN_CHARACTERS, check_encoded

MOST_CONDITIONS = 64  # each looks at every document; a filter of the server's 10,000 characters holds a thousand
KEPT = 32  # filters whose documents are remembered, a byte and a bit for each
SIGNS = ("<=", ">=", "=", "<", ">")
_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(<=|>=|[=<>(),])|([^\s"=<>(),]+))')


@dataclass(frozen=True)
class Condition:
    """One condition on a feature."""

    feature: str
    operator: str  # one of SIGNS, or in
    values: tuple[str, ...]


def parse_filter(text: str) -> tuple[Condition, ...]:
    """Return the conditions of a filter, all of which have to hold. Raises ConfigError: it is none."""
    parser = _Parser(text)
    conditions = [parser.condition()]
    while not parser.at_end:
        parser.expect("and")
        conditions.append(parser.condition())
    return tuple(conditions)


class Filters:
    """The filters over the documents of one catalogue."""

    def __init__(self, schema: Schema, catalogue: Catalogue) -> None:
        self._schema, self._catalogue = schema, catalogue
        self.allowed = lru_cache(KEPT)(self._allowed)

    @cached_property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return what people may choose from, by feature: its type and `Feature.choices`."""
        every, found = np.arange(self._catalogue.num_docs), {}
        for name, feature in filterable(self._schema.doc).items():
            if offered := feature.choices(self._catalogue.column(name, every)):
                found[name] = {"type": feature.type, **offered}
        return found

    def _allowed(self, text: str) -> AllowedDocuments:
        """Return the documents that the filter `text` lets through. Raises ConfigError: no such feature or value."""
        every = np.arange(self._catalogue.num_docs)
        passed = np.ones(len(every), bool)
        for name, conditions in _by_feature(parse_filter(text)).items():
            feature = self._schema.doc.get(name)
            if feature is None:
                asked = name[:SHOWN_CHARACTERS]
                near = difflib.get_close_matches(asked, self._schema.doc, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(
                    f"filter: {asked!r} is no feature of documents, which have {', '.join(self._schema.doc)}{meant}"
                )
            column = self._catalogue.column(name, every)
            for condition in conditions:
                passed &= feature.matches(column, condition.operator, condition.values)
        return AllowedDocuments(passed)


def _by_feature(conditions: Iterable[Condition]) -> dict[str, list[Condition]]:
    """Return the distinct conditions of each feature. Raises ConfigError: more than MOST_CONDITIONS."""
    distinct = dict.fromkeys(replace(condition, values=_sorted(condition.values)) for condition in conditions)
    if len(distinct) > MOST_CONDITIONS:
        raise ConfigError(
            f"filter: got {len(distinct)} conditions, at most {MOST_CONDITIONS} are evaluated; name several values of "
            "a feature in one, as in genre in (Drama, Comedy)"
        )
    found: dict[str, list[Condition]] = {}
    for condition in distinct:
        found.setdefault(condition.feature, []).append(condition)
    return found


def _sorted(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


class _Parser:
    """Reads a filter from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_tokens(text))
        self._next = 0

    @property
    def at_end(self) -> bool:
        return self._next == len(self._tokens)

    def condition(self) -> Condition:
        feature = self._word("the name of a feature")
        operator = self._taken()
        if operator in SIGNS:
            return Condition(feature, operator, (self._word(f"a value behind {feature} {operator}"),))
        if operator.lower() != "in":
            raise self._refused(f"{operator or 'nothing'} behind {feature}", f"one of {', '.join(SIGNS)}, in")
        self.expect("(")
        values = [self._word("a value")]
        while (sign := self._taken()) == ",":
            values.append(self._word("a value"))
        if sign != ")":
            raise self._refused(sign or "its end", "a comma or )")
        return Condition(feature, "in", tuple(values))

    def expect(self, wanted: str) -> None:
        if (found := self._taken()).lower() != wanted:
            raise self._refused(found or "its end", wanted)

    def _taken(self) -> str:
        """Return the next sign or bare word as it is, '' at the end; a quoted one is neither."""
        if self.at_end:
            return ""
        self._next += 1
        return self._tokens[self._next - 1]

    def _word(self, what: str) -> str:
        found = self._taken()
        if not found or found in SIGNS or found in ("(", ")", ","):
            raise self._refused(found or "its end", what)
        try:
            word = str(json.loads(found)) if found.startswith('"') else found
        except ValueError:
            raise self._refused(found, "a string as in JSON") from None
        check_encoded([word])  # JSON has escapes of half a character
        return word

    def _refused(self, got: str, needed: str) -> ConfigError:
        return ConfigError(
            f"filter {self._text[:80]!r}: got {got[:80]}, needs {needed}, as in genre = Drama and year > 1990"
        )


def _tokens(text: str) -> Iterator[str]:
    place = 0
    while rest := text[place:].strip():
        found = _TOKEN.match(text, place)
        if found is None:
            raise ConfigError(f"filter {text[:80]!r}: {rest[:20]!r} begins a quote that does not end")
        place = found.end()
        yield found.group().strip()
