"""Training runs started from the command line, with faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigdssm.distributed import free_port
from tests.faults import sitecustomize as faults

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "BIGDSSM_TEST_RUN"  # variable with the run folder, inherited by all processes of a run


def environment(fault: str = "", **variables: str) -> dict[str, str]:
    found = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **faults.variables(fault), **variables}
    if "PATH" not in variables:
        found["PATH"] = f"{BIN}{os.pathsep}{found['PATH']}"
    return found


def launcher(name: str, port: str | None = None) -> list[str]:
    """Return the launcher command for two ranks on this machine, or that of Python for --ranks."""
    port = port or free_port()
    if name == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port]
    if name == "--ranks":
        return [sys.executable]
    return [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port]


class Run:
    """A running `launch/pretrain.py`; its run folder `folder` is in the environment of its processes."""

    def __init__(
        self, folder: Path, config: Path, *arguments: str, command: list[str] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self._log = folder, folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
        self.started = time.monotonic()
        marked = {**(variables or environment()), MARK: str(folder)}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*(command or launcher("deepspeed")), "launch/pretrain.py", "--config", str(config),
                 f"run.dir={folder}", *arguments],
                cwd=ROOT, env=marked, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.log.splitlines() if line.startswith("error: ")]

    def wait(self, timeout_s: float = 240.0) -> int:
        """Return the exit code of the launcher."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the run did not end in {timeout_s:.0f} s:\n{self.log}") from None

    def wait_for(self, text: str, timeout_s: float = 120.0) -> None:
        """Wait until the log contains `text`."""
        until = time.monotonic() + timeout_s
        while text not in self.log:
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"{text!r} never came:\n{self.log}")
            time.sleep(0.05)

    def wait_for_orphans(self, timeout_s: float) -> float:
        """Return the seconds until all processes of the run have ended. Raises AssertionError after `timeout_s`."""
        started = time.monotonic()
        while left := self.pids():
            if time.monotonic() - started > timeout_s:
                self.end()
                raise AssertionError(f"processes {left} are left after {timeout_s:.0f} s:\n{self.log}")
            time.sleep(0.1)
        return time.monotonic() - started

    def pids(self) -> list[int]:
        """Return the processes of the run, fork servers and loader processes included: those with its environment."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if f"{MARK}={self.folder}".encode() in variables:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def events(self, stage: str = "pretrain") -> list[dict[str, Any]]:
        lines = (self.folder / stage / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def checkpoints(self) -> list[str]:
        return sorted(
            path.name for path in (self.folder / "pretrain" / "checkpoints").glob("*")
        )  # none before the first
