"""Search requests: one type for the Python API, the command line and the server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from bigdssm.errors import ConfigError

MAX_ERROR_CHARACTERS = 80


@dataclass(frozen=True)
class Event:
    """An interaction of the requesting user."""

    item: str  # key or title of a document
    time: float | None = None  # in the unit of `Request.now`; without times, events are listed oldest first
    action: str | None = None  # reserved: histories contain items only

    def __post_init__(self) -> None:
        """Raise ConfigError: a value of another type."""
        if self.item is None:
            raise ConfigError("item of an event is missing; give a document's key or title")
        _check_text("item of an event", self.item)
        _check_number("time of an event", self.time)
        _check_text("action of an event", self.action)


@dataclass(frozen=True)
class Request:
    """A query, and constraints on the documents returned.

    `user` loads the features and events of a user of the dataset; `features` override them and `events` follow them.
    Absent features are missing values.
    """

    user: str | None = None
    features: dict[str, Any] | None = None  # a string as typed by a user, a number, a list of strings, or a vector
    events: list[Event] | None = None  # of the history; an empty list: a user without events
    now: float | None = None  # later events are ignored
    filter: str | None = None  # see filters.py
    exclude_seen: bool | None = None  # exclude documents of events; None: the model's data.exclude_seen
    top: int = 10
    document: str | None = None  # key of the query document, if queries are documents

    def __post_init__(self) -> None:
        """Raise ConfigError: a value of another type."""
        for name in ("user", "filter", "document"):
            _check_text(name, getattr(self, name))
        _check_number("now", self.now)
        if self.features is not None and not isinstance(self.features, Mapping):
            raise _refused("features", self.features, "a mapping of features to values")
        for name in self.features or ():
            _check_text("the name of a feature", name)
        if self.events is not None:
            if isinstance(self.events, str | bytes) or not isinstance(self.events, Sequence):
                raise _refused("events", self.events, "a list of events")
            if wrong := [event for event in self.events if not isinstance(event, Event)]:
                raise _refused("events", wrong[0], "events such as Event('i3', time=5)")
        if self.exclude_seen is not None and not isinstance(self.exclude_seen, bool | np.bool_):
            raise _refused("exclude_seen", self.exclude_seen, "true or false")
        if isinstance(self.top, bool) or not isinstance(self.top, Integral):
            raise _refused("top", self.top, "a whole number")


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


def check_utf8(texts: Iterable[str]) -> None:
    """Raise ConfigError if a text holds a lone surrogate (JSON's "\\ud800"), which UTF-8 cannot encode."""
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{ascii(text)[:MAX_ERROR_CHARACTERS]} is not valid UTF-8")


def _check_keys(where: str, content: Mapping[str, Any], kind: type) -> None:
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in content if key not in known]:
        key = str(unknown[0])[:MAX_ERROR_CHARACTERS]
        raise ConfigError(f"{where}: got the unknown key {key!r}; the keys are {', '.join(known)}")


def _check_text(where: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise _refused(where, value, f"a text, such as {str(value)[:MAX_ERROR_CHARACTERS]!r}")


def _check_number(where: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refused(where, value, "a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        finite = False
    if not finite:
        raise _refused(where, value, "a finite number")


def _refused(where: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"{where} is {ascii(value)[:MAX_ERROR_CHARACTERS]}, needs {needed}")
