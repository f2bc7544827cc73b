"""Where a process spends its time: seconds by name, of spans that may stand in each other.

A span's seconds are those outside the spans in it; one inside another goes by both names, `loss/communication`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Clock:
    """The one clock of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.since = 0.0

    def charge(self) -> None:
        """Count the time since the last call for the innermost open span."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else its work would count for whoever waits for it
        now = time.perf_counter()
        if self.open:
            name = "/".join(self.open)
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


_clock = _Clock()


@contextmanager
def span(name: str) -> Iterator[None]:
    """Count the time within under `name`."""
    _clock.charge()
    _clock.open.append(name)
    try:
        yield
    finally:
        _clock.charge()
        _clock.open.pop()


def taken() -> dict[str, float]:
    """Return the seconds of every name since the last call, in the order in which they were first met."""
    _clock.charge()
    seconds, _clock.seconds = _clock.seconds, {}
    return seconds
