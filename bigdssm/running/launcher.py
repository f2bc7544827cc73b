"""Whether the launcher above this rank still lives: a rank whose launcher is gone would train on, watched by nobody."""

from __future__ import annotations

import os
from pathlib import Path

DEEPSPEED_LAUNCHER = b"deepspeed.launcher.launch"


class Launcher:
    """The processes above this one whose end should end the run; none where no launcher started it.

    Under torchrun that is the parent. DeepSpeed has two: the runner that was called and the launcher it starts, which
    outlives a runner that was killed or got SIGTERM.
    """

    def __init__(self) -> None:
        """Remember who stands above this process; as early as possible, for only a change is noticed."""
        self._parent = os.getppid()
        self._deepspeed = DEEPSPEED_LAUNCHER in _command(self._parent)
        self._watched = self._deepspeed or "TORCHELASTIC_RUN_ID" in os.environ
        self._above = parent_of(self._parent) if self._deepspeed else None

    def lost(self) -> str | None:
        """Return what has ended, or None where all is as it was."""
        if not self._watched:
            return None
        if os.getppid() != self._parent:
            return f"the launcher (pid {self._parent})"
        if self._above is not None and parent_of(self._parent) != self._above:
            return f"the deepspeed runner (pid {self._above})"
        return None


def parent_of(pid: int) -> int | None:
    """Return the parent of a process of this machine, None where there is no such process."""
    fields = _fields(pid)
    return int(fields[1]) if fields else None


def state_of(pid: int) -> str | None:
    """Return the state letter of a process (R, S, D; T stopped, Z ended), None where there is no such process."""
    fields = _fields(pid)
    return fields[0] if fields else None


def _fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; what stands before may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
