"""A command of ours in a process of its own, with its output in a log file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bigdssm.running.launcher import STARTED_BY

LOOK_S = 1.0


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it took."""

    line: tuple[str, ...]
    log: Path
    exit_code: int
    seconds: float
    cpu_seconds: float

    def check(self) -> None:
        """Raise CalledProcessError where it failed, which names the log."""
        if self.exit_code:
            raise subprocess.CalledProcessError(self.exit_code, [*self.line, f"# see {self.log}"])


def environment() -> dict[str, str]:
    """Return this process's environment for a command that it starts; a training in it ends where this process has."""
    return {**os.environ, STARTED_BY: str(os.getpid())}


def run_command(log: Path, command: str, *arguments: str, look: Callable[[], None] | None = None) -> Ended:
    """Run `bigdssm command …` to its end, its output behind what `log` holds; `look` is called every LOOK_S meanwhile.

    A `command` that ends in .py is a script's path.
    The process is ended where this one is interrupted, or `look` raises.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    program = (command,) if command.endswith(".py") else ("-m", "bigdssm.commands", command)
    line, started = (sys.executable, *program, *arguments), time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment())
        try:
            pid, status, used = os.wait4(process.pid, 0 if look is None else os.WNOHANG)
            while not pid:
                assert look is not None
                time.sleep(LOOK_S)
                look()
                pid, status, used = os.wait4(process.pid, os.WNOHANG)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(line, log, process.returncode, time.perf_counter() - started, used.ru_utime + used.ru_stime)
