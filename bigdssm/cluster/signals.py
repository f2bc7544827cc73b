"""Stop requests: between two steps the ranks agree whether any of them has received SIGTERM or SIGINT."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import ClassVar

from bigdssm.errors import Preempted
from bigdssm.utils.log import is_first_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED_EARLY_MESSAGE = "stopped on request before the first step, nothing to save; run the same command again"


class StopRequest:
    """Stores a signal until the next step synchronization; before the first step a signal ends the process at once.

    Python runs signal handlers between two bytecode instructions of the main thread: they are delayed indefinitely
    while the main thread sorts, or waits for other ranks or loader processes, and an exception could be caught by other
    code. Therefore a separate thread receives early signals and ends the process.
    """

    # Write end of the pipe to the signal thread of the latest instance; Python writes signal numbers (set_wakeup_fd).
    _write_end: ClassVar[int] = -1

    def __init__(self, handle_signals: bool = True) -> None:
        """Install handlers for SIGTERM and SIGINT; without `handle_signals` only `request` has an effect."""
        self.requested = False  # a stop of this rank
        self._has_state = False
        self.on_early_exit: Callable[[int, str], None] | None = None  # called with (code, reason)
        self._handles_signals = handle_signals
        if not handle_signals:
            return
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        if signal.set_wakeup_fd(write_end, warn_on_full_buffer=False) == StopRequest._write_end != -1:
            os.close(StopRequest._write_end)  # ends the thread of the previous instance
        StopRequest._write_end = write_end
        for number in SIGNALS:
            signal.signal(number, lambda *_: setattr(self, "requested", True))
        threading.Thread(target=self._end_early, args=(read_end,), name="signals", daemon=True).start()

    def request(self) -> None:
        """Request a stop, from any thread."""
        if self._handles_signals:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.requested = True

    def defer_signals(self) -> None:
        """Defer signals to the next step synchronization: from now on there is state to save."""
        self._has_state = True

    def any_rank_requested(self) -> bool:
        """Return True on every rank if a stop of any rank was requested. All ranks must call it."""
        from bigdssm import distributed  # importing torch takes seconds; handlers must be installed first

        return distributed.any_rank(self.requested)

    def _end_early(self, read_end: int) -> None:
        while number := os.read(read_end, 1):
            if number[0] in SIGNALS and not self._has_state:
                if is_first_rank():  # a launcher ends all ranks: print the message once
                    sys.stderr.write(f"{STOPPED_EARLY_MESSAGE}\n")
                    sys.stderr.flush()
                if self.on_early_exit is not None:
                    self.on_early_exit(Preempted.exit_code, STOPPED_EARLY_MESSAGE)
                os._exit(Preempted.exit_code)
        os.close(read_end)
