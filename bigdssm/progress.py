"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called as progress(what is being done, how much is done, how much there is or None: unknown)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Show nothing."""
