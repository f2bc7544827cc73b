"""Command lines of launch/ in forks of a process with all imports, so that tests do not wait for torch.

`main` of the command runs as `python launch/STAGE.py …` does, with its own arguments, environment, output and end.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bigdssm.distributed import free_port
from tests import forks
from tests.faults import sitecustomize as faults

ROOT = Path(__file__).resolve().parents[2]


class Command:
    """`launch/STAGE.py …` on several ranks; `codes` are their exit codes, `log` their output."""

    def __init__(
        self, stage: str, *arguments: object, ranks: int = 1, env: Mapping[str, str] | None = None, fault: str = ""
    ) -> None:
        self._log = Path(os.environ["BIGDSSM_TEST_LOGS"]) / f"{time.monotonic_ns()}.log"
        port = free_port()
        self.ranks = []
        for rank in range(ranks):
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **of_rank} if ranks > 1 else {}
            variables = {key: str(value) for key, value in {**group, faults.VARIABLE: fault, **(env or {})}.items()}
            argv = [str(argument) for argument in arguments]
            process = forks.context.Process(target=_run, args=(stage, argv, variables, str(self._log)))
            process.start()
            self.ranks.append(process)

    def wait(self, timeout_s: float = 120.0) -> Command:
        """Wait for all ranks. Raises AssertionError with their output after a timeout."""
        until = time.monotonic() + timeout_s
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        if any(process.is_alive() for process in self.ranks):
            self.end()
            raise AssertionError(f"no end in {timeout_s:.0f} s:\n{self.log}")
        return self

    def end(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def wait_for(self, text: str, timeout_s: float = 60.0) -> Command:
        """Wait until the output contains `text`."""
        until = time.monotonic() + timeout_s
        while text not in self.log:
            if time.monotonic() > until or not any(process.is_alive() for process in self.ranks):
                self.end()
                raise AssertionError(f"{text!r} never came:\n{self.log}")
            time.sleep(0.02)
        return self

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.ranks]

    @property
    def code(self) -> int | None:
        """The first rank's."""
        return self.ranks[0].exitcode

    @property
    def pids(self) -> list[int]:
        return [int(process.pid or 0) for process in self.ranks]

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.log.splitlines() if line.startswith("error: ")]


def _run(stage: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(number, stream)
    os.environ.update(variables)
    os.chdir(ROOT)
    os.setsid()
    from bigdssm.commands._stage import run
    from bigdssm.training import trainer

    faults.inject(trainer)  # its module was imported before the fork
    sys.exit(run(stage, None, argv))  # type: ignore[arg-type]
