"""Asking a run to stop: SIGTERM or SIGINT on any rank becomes one decision of all ranks between two steps."""

from __future__ import annotations

import signal
from types import FrameType

from bigdssm import distributed


class StopRequest:
    """Remembers a signal until the ranks next agree."""

    def __init__(self) -> None:
        """Take over SIGTERM and SIGINT of this process."""
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def agreed(self) -> bool:
        """Return True on every rank where any rank was asked to stop. A collective."""
        return distributed.any_rank(self._asked)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
