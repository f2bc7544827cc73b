"""Queries and documents as pairs: the features of both sides together, for what reads them at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
SIDES = ("query", "doc")


def together(query: Mapping[str, T], doc: Mapping[str, T]) -> dict[str, T]:
    """Return what both sides have, by side and name."""
    return {
        f"{side}.{name}": value for side, has in zip(SIDES, (query, doc), strict=True) for name, value in has.items()
    }


def apart(pairs: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Return what `together` has put together, by side."""
    return {
        side: {name.removeprefix(f"{side}."): value for name, value in pairs.items() if name.startswith(f"{side}.")}
        for side in SIDES
    }
