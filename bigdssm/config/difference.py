"""Where two configs differ."""

from __future__ import annotations

from typing import Any


def first_difference(before: Any, now: Any, key: str = "") -> str | None:
    """Return `dotted.key was …, is …` for the first place in which two plain config containers differ, or None."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else f"{key} was {before}, is {now}"
    for name in {**before, **now}:
        found = first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        if found:
            return found
    return None
