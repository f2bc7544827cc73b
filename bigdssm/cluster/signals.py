"""Asking a run to stop: SIGTERM or SIGINT on any rank becomes one decision of all ranks between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import ClassVar

from bigdssm.errors import Preempted
from bigdssm.utils.log import is_first_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EARLY = "stopped on request before the first step, with nothing to save; the same command starts again"


class StopRequest:
    """Remembers a signal until the ranks next agree; one that comes before the first step ends the rank at once.

    Python gives the main thread its signals between two instructions of its own: one that sorts, or waits for other
    ranks or loader processes, never gets there, and an exception would pass through code that catches all. So it is a
    thread that hears the early ones and ends the process.
    """

    _tell: ClassVar[int] = -1  # where the system writes signals for the thread of the newest one

    def __init__(self, hear_signals: bool = True) -> None:
        """Take over SIGTERM and SIGINT of this process, or leave them to the caller: then only `ask` asks."""
        self._asked = False
        self._has_state = False
        self.at_end: Callable[[int, str], None] | None = None  # told code and reason before the thread ends the process
        self._hears_signals = hear_signals
        if hear_signals:
            self._take_over()

    def _take_over(self) -> None:
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        if signal.set_wakeup_fd(tell, warn_on_full_buffer=False) == StopRequest._tell != -1:
            os.close(StopRequest._tell)  # ends the thread of the one before
        StopRequest._tell = tell
        for number in SIGNALS:
            signal.signal(number, self._remember)
        threading.Thread(target=self._end_early, args=(heard,), name="signals", daemon=True).start()

    def ask(self) -> None:
        """Ask the run to stop, from any thread."""
        if self._hears_signals:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._asked = True

    def wait_for_steps(self) -> None:
        """From now on there is something to save: a signal waits for the ranks to agree."""
        self._has_state = True

    @property
    def asked(self) -> bool:
        """Return whether this rank was asked to stop."""
        return self._asked

    def agreed(self) -> bool:
        """Return True on every rank where any rank was asked to stop. A collective."""
        from bigdssm import distributed  # torch takes seconds to import, in which signals are to be heard already

        return distributed.any_rank(self._asked)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _end_early(self, heard: int) -> None:
        while number := os.read(heard, 1):
            if number[0] in SIGNALS and not self._has_state:
                if is_first_rank():  # a launcher ends all ranks: one sentence is enough
                    sys.stderr.write(f"{EARLY}\n")
                    sys.stderr.flush()
                if self.at_end is not None:
                    self.at_end(Preempted.exit_code, EARLY)
                os._exit(Preempted.exit_code)
        os.close(heard)
