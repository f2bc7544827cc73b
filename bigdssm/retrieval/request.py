"""What a product asks for: one type for the Python API, the command line and the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bigdssm.errors import ConfigError


@dataclass(frozen=True)
class Event:
    """Something that the asking user did."""

    item: str  # a document, by its key or its display name
    time: float | None = None  # in the unit of `Request.now`; without times events are given oldest first
    action: str | None = None  # what was done; histories know items alone, so no model reads it yet


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
    exclude_seen: bool | None = None  # whether documents of events may come back; none: as data.repeats says
    top: int = 10
    document: str | None = None  # the key of the document that the query is, where queries are documents


@dataclass(frozen=True)
class _Content:
    """Where OmegaConf checks a mapping against Request."""

    request: Request = field(default_factory=Request)


def request_of(content: Mapping[str, Any]) -> Request:
    """Return the request that JSON holds. Raises ConfigError: a key that there is not, or a value of another type."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(_Content), {"request": content})
        made = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the request'}: {str(error).splitlines()[0]}") from None
    assert isinstance(made, _Content)
    return made.request
