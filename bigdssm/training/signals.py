"""Asking a run to stop: SIGTERM or SIGINT on any rank becomes one decision of all ranks between two steps."""

from __future__ import annotations

import signal
from types import FrameType

from bigdssm import distributed
from bigdssm.errors import Preempted


class StopRequest:
    """Remembers a signal until the ranks next agree; one that comes before the first step ends the rank at once."""

    def __init__(self) -> None:
        """Take over SIGTERM and SIGINT of this process."""
        self._asked = False
        self._has_state = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def wait_for_steps(self) -> None:
        """From now on there is something to save: a signal waits for the ranks to agree."""
        self._has_state = True

    def agreed(self) -> bool:
        """Return True on every rank where any rank was asked to stop. A collective."""
        return distributed.any_rank(self._asked)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._has_state:
            raise Preempted("asked to stop before the first step; nothing was to be saved")
