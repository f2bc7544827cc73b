"""Where a process spends its time: seconds by name, of spans that may stand in each other.

A span's seconds are those outside the spans in it; one inside another goes by both names, `loss/communication`. Where
CUDA works, a span is what lies between its beginning and its end in the device's stream, by the device's clock: its
kernels count for it whenever they run, a wait of the host only as long as the device stood idle for it. Nothing waits
for the device before `taken`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_MOST_UNREAD = 4096


class _Mark(NamedTuple):
    """A moment of the host, and the same place in the device's stream."""

    host_s: float
    event: torch.cuda.Event | None

    @classmethod
    def now(cls) -> _Mark:
        event = None
        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return cls(time.perf_counter(), event)

    def seconds_to(self, later: _Mark) -> float:
        if self.event is None or later.event is None:
            return later.host_s - self.host_s
        return self.event.elapsed_time(later.event) / 1e3


class _Clock:
    """The one clock of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self._since = _Mark(0.0, None)
        self._unread: list[tuple[str, _Mark, _Mark]] = []

    def charge(self) -> None:
        """Count the time since the last call for the innermost open span."""
        now = _Mark.now()
        if self.open:
            self._unread.append(("/".join(self.open), self._since, now))
        self._since = now
        if now.event is None or len(self._unread) >= _MOST_UNREAD:
            self.read()

    def read(self) -> None:
        """Add up what was charged; waits for the device where it has not come so far."""
        if self._since.event is not None:
            self._since.event.synchronize()
        for name, begin, end in self._unread:
            self.seconds[name] = self.seconds.get(name, 0.0) + begin.seconds_to(end)
        self._unread.clear()


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
    """Return the seconds of every name since the last call, in the order in which they first ended."""
    _clock.charge()
    _clock.read()
    seconds, _clock.seconds = _clock.seconds, {}
    return seconds
