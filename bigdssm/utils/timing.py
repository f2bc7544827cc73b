"""Time profile of a process: seconds per named span; spans may be nested.

A span's seconds exclude those of nested spans; a nested span is named by its path, `loss/communication`. With CUDA, a
span is measured between two events in the device's stream: its kernels count whenever they run, waits of the host only
while the device is idle. Only `pop_seconds` synchronizes with the device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MOST_UNREAD = 4096


_Mark = tuple[float, torch.cuda.Event | None]
"""A host time, and an event at the same point in the device's stream."""


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self._since: _Mark = (0.0, None)
        self._unread: list[tuple[str, _Mark, _Mark]] = []

    def charge(self) -> None:
        """Assign the time since the last call to the innermost open span."""
        event = None
        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        now = time.perf_counter(), event
        if self.open:
            self._unread.append(("/".join(self.open), self._since, now))
        self._since = now
        if event is None or len(self._unread) >= _MOST_UNREAD:
            self.read()

    def read(self) -> None:
        """Add up the assigned times; synchronizes with the device."""
        if self._since[1] is not None:
            self._since[1].synchronize()
        for name, (begin_s, begin), (end_s, end) in self._unread:
            elapsed_s = end_s - begin_s
            if begin is not None and end is not None:
                elapsed_s = begin.elapsed_time(end) / 1e3
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed_s
        self._unread.clear()


_clock = _Clock()


@contextmanager
def span(name: str) -> Iterator[None]:
    """Measure the time of a block as `name`; a context manager."""
    _clock.charge()
    _clock.open.append(name)
    try:
        yield
    finally:
        _clock.charge()
        _clock.open.pop()


def pop_seconds() -> dict[str, float]:
    """Return the seconds per span since the last call, ordered by the spans' first end."""
    _clock.charge()
    _clock.read()
    seconds, _clock.seconds = _clock.seconds, {}
    return seconds
