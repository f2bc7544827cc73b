"""What a product asks for: one type for the Python API, the command line and the server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from bigdssm.errors import ConfigError

SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Event:
    """Something that the asking user did."""

    item: str  # a document, by its key or its title
    time: float | None = None  # in the unit of `Request.now`; without times events are given oldest first
    action: str | None = None  # what was done; histories know items alone, so no model reads it yet

    def __post_init__(self) -> None:
        """Raise ConfigError: a value of another type."""
        if self.item is None:
            raise ConfigError("item of an event is missing; name a document")
        _check_text("item of an event", self.item)
        _check_number("time of an event", self.time)
        _check_text("action of an event", self.action)


@dataclass(frozen=True)
class Request:
    """A query, and which documents may answer it.

    `user` brings what the dataset knows of a user: features, and events that lie before those given here. Features that
    are given stand in the place of the user's; what nobody gives is missing.
    """

    user: str | None = None
    features: dict[str, Any] | None = None  # a string as a person types it, or a number, a list of strings, a vector
    events: list[Event] | None = None  # what a history is made of; an empty list is a user without any
    now: float | None = None  # events after it are not known yet
    filter: str | None = None  # see filters.py
    exclude_seen: bool | None = None  # whether documents of events may come back; none: as data.exclude_seen says
    top: int = 10
    document: str | None = None  # the key of the document that the query is, where queries are documents

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


def request_of(content: Mapping[str, Any]) -> Request:
    """Return the request that JSON holds. Raises ConfigError: a key that there is not, or a value of another type."""
    _check_keys("the request", content, Request)
    events = content.get("events")
    if isinstance(events, list):
        for number, event in enumerate(events):
            if not isinstance(event, Mapping):
                raise _refused(f"events[{number}]", event, 'an object such as {"item": "i3"}')
            _check_keys(f"events[{number}]", event, Event)
        events = [Event(**{"item": None, **event}) for event in events]
    return Request(**{**content, "events": events})


def check_encoded(texts: Iterable[str]) -> None:
    """Raise ConfigError where a text holds half a character, as JSON's "\\ud800" does, or bytes that are no UTF-8."""
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{ascii(text)[:SHOWN_CHARACTERS]} is no text in UTF-8")


def _check_keys(where: str, content: Mapping[str, Any], kind: type) -> None:
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in content if key not in known]:
        raise ConfigError(f"{where} has no key {str(unknown[0])[:SHOWN_CHARACTERS]!r}; the keys are {', '.join(known)}")


def _check_text(where: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise _refused(where, value, f"a text, such as {str(value)[:SHOWN_CHARACTERS]!r}")


def _check_number(where: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refused(where, value, "a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        finite = False
    if not finite:
        raise _refused(where, value, "a finite number")


def _refused(where: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"{where} is {ascii(value)[:SHOWN_CHARACTERS]}, needs {needed}")
