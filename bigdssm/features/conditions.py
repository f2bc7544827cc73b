"""One grammar of conditions: on the features of documents (filters), and on those of events (targets, exclusions).

    genres = Comedy and year >= 1990
    action in (purchase, cart) and price < 12.5

A condition is `FEATURE = VALUE`, `FEATURE in (VALUE, …)`, or for numbers also <, <=, >, >=; all must hold. A value with
blanks or signs is double-quoted as in JSON. A feature with several values matches if any of them does. A missing value
matches no condition.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.features.base import Feature, filterable
from bigdssm.features.ragged import Column
from bigdssm.utils.arguments import check_utf8

OPERATORS = ("<=", ">=", "=", "<", ">")
_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(<=|>=|[=<>(),])|([^\s"=<>(),]+))')


@dataclass(frozen=True)
class Condition:
    """One condition on a feature."""

    feature: str
    operator: str  # one of OPERATORS, or in
    values: tuple[str, ...]


def parse_filter(text: str, where: str = "filter") -> tuple[Condition, ...]:
    """Parse conditions, all of which must hold; `where` is named in errors. Raises ConfigError: a syntax error."""
    parser = _Parser(text, where)
    conditions = [parser.condition()]
    while parser.tokens:
        parser.expect("and")
        conditions.append(parser.condition())
    return tuple(conditions)


def parse_events(text: str, where: str, events: Mapping[str, Feature]) -> tuple[Condition, ...]:
    """Parse conditions on features of `events`; `where` is the key. Raises ConfigError: invalid, or other features."""
    conditions = parse_filter(text, where)
    for condition in conditions:
        if condition.feature not in (known := filterable(events)):
            raise ConfigError(
                f"{where} {text!r}: got {condition.feature}, needs categorical or numeric features of data.event, of "
                f"{list(known)}"
            )
    return conditions


def matching_events(
    text: str, where: str, events: Mapping[str, Feature], column: Callable[[str], Column]
) -> np.ndarray:
    """Return the mask of events that match all conditions of `text`, bool [events].

    `column` returns the encoded values of a feature of `events`. Raises ConfigError: no event has a value, or as above.
    """
    masks = []
    for condition in parse_events(text, where, events):
        feature = events[condition.feature]
        try:
            masks.append(feature.matches(column(condition.feature), condition.operator, condition.values))
        except ConfigError as error:
            reason = str(error).removeprefix("filter: ").replace("no document has", "no event has", 1)
            raise ConfigError(f"{where} {text!r}: {reason}") from None
    mask: np.ndarray = np.all(masks, axis=0)
    return mask


class _Parser:
    """Recursive-descent parser of conditions."""

    def __init__(self, text: str, where: str) -> None:
        self._where, self.tokens, position = f"{where} {text[:80]!r}", deque[str](), 0
        while rest := text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise ConfigError(f"{self._where}: the quote in {rest[:20]!r} is not closed")
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
        return ConfigError(f"{self._where}: got {got[:80]}, needs {needed}, as in genre = Drama and year > 1990")
