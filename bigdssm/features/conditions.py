"""One grammar of conditions: on the features of documents (filters), and on those of events (targets, exclusions).

    genres = Comedy and year >= 1990
    (action in (purchase, cart) or price < 12.5) and shop != outlet

A condition is `FEATURE = VALUE`, `FEATURE != VALUE`, `FEATURE in (VALUE, …)`, `FEATURE not in (VALUE, …)`, or for
numbers also <, <=, >, >=. Conditions are joined by `and`, by `or`, which binds weaker, and by parentheses. A value with
blanks or signs is double-quoted as in JSON. A feature with several values matches = and in if any of them does, != and
not in if none does. A missing value matches no condition.
"""

import difflib
import json
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.features.base import Feature, filterable
from bigdssm.features.ragged import Column
from bigdssm.utils.arguments import MAX_ERROR_CHARACTERS, check_utf8

OPERATORS = ("<=", ">=", "!=", "=", "<", ">")
MOST_CONDITIONS = 64  # each scans every document; the server's 10,000 characters would allow a thousand
MOST_LEVELS = 16  # of parentheses
_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(<=|>=|!=|[=<>(),])|((?:(?!!=)[^\s"=<>(),])+))')


@dataclass(frozen=True)
class Condition:
    """One condition on a feature."""

    feature: str
    operator: str  # one of OPERATORS, in, or not in
    values: tuple[str, ...] | tuple[float, ...]  # sorted and distinct; see `resolve`


@dataclass(frozen=True)
class And:
    """A conjunction of two or more distinct expressions, none of which is a conjunction."""

    parts: "tuple[Expression, ...]"


@dataclass(frozen=True)
class Or:
    """A disjunction of two or more distinct expressions, none of which is a disjunction."""

    parts: "tuple[Expression, ...]"


Expression = Condition | And | Or


def parse_filter(text: str, where: str = "filter") -> Expression:
    """Parse an expression; `where` is named in errors. Raises ConfigError: a syntax error, or beyond the limits."""
    parser = _Parser(text, where)
    expression = parser.expression(0)
    if parser.tokens:
        raise parser.error(parser.tokens[0], "'and' or 'or'")
    if (number := len(conditions(expression))) > MOST_CONDITIONS:
        raise ConfigError(
            f"{where}: got {number} conditions, needs at most {MOST_CONDITIONS}; combine several values of a feature, "
            "as in genre in (Drama, Comedy)"
        )
    return expression


def conditions(expression: Expression) -> list[Condition]:
    """Return all conditions of an expression, in order."""
    if isinstance(expression, Condition):
        return [expression]
    return [condition for part in expression.parts for condition in conditions(part)]


def check_features(expression: Expression, features: Mapping[str, Feature], where: str) -> None:
    """Raise ConfigError, which begins with `where`: a condition is on none of the filterable `features`."""
    known = filterable(features)
    for name in (condition.feature for condition in conditions(expression)):
        if name not in known:
            requested = name[:MAX_ERROR_CHARACTERS]
            near = difflib.get_close_matches(requested, known, 1)
            raise ConfigError(
                f"{where}: got {requested!r}, needs one of the categorical or numeric features "
                f"{', '.join(known) or '(there are none)'}{f'; did you mean {near[0]}?' if near else ''}"
            )


def resolve(expression: Expression, features: Mapping[str, Feature], where: str = "filter") -> Expression:
    """Return the expression with the values that columns of `features` hold, see `Feature.operands`.

    Raises ConfigError, which begins with `where`: no such feature, or an operator or value that it lacks.
    """
    if not isinstance(expression, Condition):
        return replace(expression, parts=tuple(resolve(part, features, where) for part in expression.parts))
    check_features(expression, features, where)
    try:
        values = features[expression.feature].operands(expression.operator, tuple(map(str, expression.values)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.public_message}", details=error.details) from None
    return replace(expression, values=values)


def evaluate(expression: Expression, features: Mapping[str, Feature], column: Callable[[str], Column]) -> np.ndarray:
    """Return the mask of rows that match a resolved expression, bool [R].

    `column` returns the encoded values of a feature, once per feature.
    """
    columns: dict[str, Column] = {}

    def mask_of(part: Expression) -> np.ndarray:
        if isinstance(part, Condition):
            if part.feature not in columns:
                columns[part.feature] = column(part.feature)
            return features[part.feature].matches(columns[part.feature], part.operator, part.values)
        combine = np.logical_and if isinstance(part, And) else np.logical_or
        mask = mask_of(part.parts[0])
        for other in part.parts[1:]:
            combine(mask, mask_of(other), out=mask)
        return mask

    return mask_of(expression)


def matching_events(
    text: str, where: str, events: Mapping[str, Feature], column: Callable[[str], Column]
) -> np.ndarray:
    """Return the mask of events that match the expression `text`, bool [events].

    `column` returns the encoded values of a feature of `events`; `where` is the key. Raises ConfigError: invalid.
    """
    return evaluate(resolve(parse_filter(text, where), events, f"{where} {text!r}"), events, column)


class _Parser:
    """Recursive-descent parser of expressions."""

    def __init__(self, text: str, where: str) -> None:
        self._where, self.tokens, position = f"{where} {text[:80]!r}", deque[str](), 0
        end = len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                rest = text[position:end].lstrip()
                raise ConfigError(f"{self._where}: the quote in {rest[:20]!r} is not closed")
            position = match.end()
            self.tokens.append(match.group().strip())

    def expression(self, level: int) -> Expression:
        """Parse a disjunction of conjunctions inside `level` parentheses."""
        return self._joined(Or, "or", self._conjunction, level)

    def error(self, got: str, needed: str) -> ConfigError:
        example = "genre = Drama and (year < 1960 or year > 1990)"
        return ConfigError(f"{self._where}: got {got[:80]}, needs {needed}, as in {example}")

    def _conjunction(self, level: int) -> Expression:
        return self._joined(And, "and", self._part, level)

    def _joined(
        self, kind: type[And] | type[Or], word: str, parse: Callable[[int], Expression], level: int
    ) -> Expression:
        """Parse expressions joined by `word` as one `kind`, flat and distinct, or the only one."""
        parts = [parse(level)]
        while self._skip(word):
            parts.append(parse(level))
        flat = dict.fromkeys(inner for part in parts for inner in (part.parts if isinstance(part, kind) else (part,)))
        return kind(tuple(flat)) if len(flat) > 1 else next(iter(flat))

    def _part(self, level: int) -> Expression:
        if not self._skip("("):
            return self._condition()
        if level == MOST_LEVELS:
            raise self.error(f"{level + 1} levels of parentheses", f"at most {MOST_LEVELS}")
        inner = self.expression(level + 1)
        self._require(")", "'and', 'or' or )")
        return inner

    def _condition(self) -> Condition:
        feature = self._word("the name of a feature")
        operator = self._next_token().lower()
        if operator in OPERATORS:
            return Condition(feature, operator, (self._word(f"a value after {feature} {operator}"),))
        if operator == "not":
            self._require("in", f"in after {feature} not")
            operator = "not in"
        elif operator != "in":
            raise self.error(f"{operator or 'nothing'} after {feature}", f"one of {', '.join(OPERATORS)}, in, not in")
        self._require("(", "(")
        values = {self._word("a value")}
        while self._skip(","):
            values.add(self._word("a value"))
        self._require(")", "a comma or )")
        return Condition(feature, operator, tuple(sorted(values)))

    def _skip(self, expected: str) -> bool:
        """Return whether the next token is `expected`, and if so remove it."""
        if self.tokens and self.tokens[0].lower() == expected:
            self.tokens.popleft()
            return True
        return False

    def _require(self, expected: str, needed: str) -> None:
        if not self._skip(expected):
            raise self.error(self._next_token() or "its end", needed)

    def _next_token(self) -> str:
        """Return the next token, quotes included; '' at the end."""
        return self.tokens.popleft() if self.tokens else ""

    def _word(self, what: str) -> str:
        token = self._next_token()
        if not token or token in OPERATORS or token in ("(", ")", ","):
            raise self.error(token or "its end", what)
        try:
            word = str(json.loads(token)) if token.startswith('"') else token
        except ValueError:
            raise self.error(token, "a string as in JSON") from None
        check_utf8([word])  # JSON can escape lone surrogates
        return word
