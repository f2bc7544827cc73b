"""Search requests: one declaration for the Python API, the command line and the server (serving/app.py)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.utils.arguments import MAX_ERROR_CHARACTERS
from bigdssm.utils.components import BOUND, Bound

HELP = "help"  # in the metadata of a field, with BOUND
VALUE_TYPES: Mapping[str, tuple[Any, str]] = {  # by `value_type`: the type of values, and its name in messages
    "bool": (bool | np.bool_, "true or false"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "list[str]": (Sequence, "a list of texts"),
    "list[Event]": (Sequence, "a list of events"),
    "dict[str, Any]": (Mapping, "a mapping of features to values"),
}


@dataclass(frozen=True)
class Event:
    """An interaction of the requesting user, of the kind that the model was trained on."""

    item: str = field(metadata={HELP: "key or title of a document; unknown documents are skipped"})
    time: float | None = field(
        default=None, metadata={HELP: "in the unit of now; without times, list events oldest first"}
    )
    features: dict[str, Any] | None = field(default=None, metadata={HELP: "values of the features of events"})

    def __post_init__(self) -> None:
        """Raise ConfigError: a value of another type."""
        if self.item is None:
            raise ConfigError("item of an event is missing; give a document's key or title")
        _check_values(self, " of an event")


@dataclass(frozen=True)
class Request:
    """A query, and constraints on the documents returned.

    `features` override those of `user`. A feature's value is a string as typed by a user, a number, a list of strings,
    or a vector; absent features are missing values. An empty list of `events` is a user without events.
    """

    user: str | None = field(
        default=None, metadata={HELP: "user of the dataset; its features and events precede the given"}
    )
    features: dict[str, Any] | None = field(default=None, metadata={HELP: "query feature values"})
    events: list[Event] | None = field(default=None, metadata={HELP: "recent events of the user"})
    now: float | None = field(default=None, metadata={HELP: "later events are ignored, those of the user, too"})
    filter: str | None = field(
        default=None, metadata={HELP: "conditions that results must satisfy, such as 'year >= 1990'"}
    )
    exclude_seen: bool | None = field(
        default=None, metadata={HELP: "exclude documents of events; by default as the model's data.exclude_seen"}
    )
    top: int = field(default=10, metadata={HELP: "number of documents", BOUND: Bound(at_least=1)})
    document: str | None = field(default=None, metadata={HELP: "key of the query document, if queries are documents"})
    exclude: list[str] | None = field(
        default=None, metadata={HELP: "keys of documents that are no answers; unknown keys are skipped"}
    )
    context: dict[str, Any] | None = field(
        default=None, metadata={HELP: "features of the request (data.request), such as the wanted action"}
    )

    def __post_init__(self) -> None:
        """Raise ConfigError: a value of another type, or `top` below 1."""
        _check_values(self)


def value_type(declared: Field[Any]) -> str:
    """Return the type of a field's values other than None, as in its declaration."""
    return str(declared.type).removesuffix(" | None")


def parse_request(content: Mapping[str, Any]) -> Request:
    """Convert a JSON object to a Request. Raises ConfigError: an unknown key, or a value of another type."""
    _check_keys("the request", content, Request)
    events = content.get("events")
    if isinstance(events, list):
        for number, event in enumerate(events):
            if not isinstance(event, Mapping):
                raise _refused(f"events[{number}]", event, 'an object such as {"item": "i3"}')
            _check_keys(f"events[{number}]", event, Event)
        events = [Event(**{"item": None, **event}) for event in events]
    return Request(**{**content, "events": events})


def load_json(text: str | bytes) -> Any:
    """Parse a JSON text. Raises: ConfigError: a repeated key; ValueError, RecursionError: invalid JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):  # the values but the last would be lost
            key, number = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ConfigError(f"an object of the request has the key {key[:MAX_ERROR_CHARACTERS]!r} {number} times")
        return content

    return json.loads(text, object_pairs_hook=unique)


def _check_keys(where: str, content: Mapping[str, Any], kind: type) -> None:
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in content if key not in known]:
        key = str(unknown[0])[:MAX_ERROR_CHARACTERS]
        raise ConfigError(f"{where}: got the unknown key {key!r}; the keys are {', '.join(known)}")


def _check_values(values: Event | Request, owner: str = "") -> None:
    for declared in fields(values):
        value, kind, where = getattr(values, declared.name), value_type(declared), f"{declared.name}{owner}"
        if value is None and declared.default is None:
            continue
        if kind == "str":
            _check_text(where, value)
            continue
        python_type, needed = VALUE_TYPES[kind]
        if (
            not isinstance(value, python_type)
            or isinstance(value, str | bytes)
            or (isinstance(value, bool) and kind != "bool")
        ):
            raise _refused(where, value, needed)
        if kind == "float":
            try:
                is_finite = math.isfinite(value)
            except OverflowError:  # an integer beyond float64
                is_finite = False
            if not is_finite:
                raise _refused(where, value, "a finite number")
        elif kind == "list[Event]":
            if wrong := [event for event in value if not isinstance(event, Event)]:
                raise _refused(where, wrong[0], "events such as Event('i3', time=5)")
        elif kind in ("list[str]", "dict[str, Any]"):
            for text in value:
                _check_text(f"a value of {where}" if kind == "list[str]" else "the name of a feature", text)
        bound = declared.metadata.get(BOUND)
        if bound is not None and not bound.holds(value):
            raise _refused(where, value, str(bound))


def _check_text(where: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _refused(where, value, f"a text, such as {str(value)[:MAX_ERROR_CHARACTERS]!r}")


def _refused(where: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"{where} is {ascii(value)[:MAX_ERROR_CHARACTERS]}, needs {needed}")
