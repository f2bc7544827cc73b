"""A stage folder: one run at a time, its lock, its start records, and its log of row ids."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import platform
import re
import socket
import threading
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

import bigdssm
from bigdssm import distributed
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.utils import atomic
from bigdssm.utils.atomic import naming
from bigdssm.utils.hashing import code_checksum
from bigdssm.utils.log import MetricsWriter, cut_back_of_rank, get_logger, read_records

RUNNING_FILE, EVENTS_FILE, STOP_FILE = "running.json", "events.jsonl", "stop"
RUN_ID_FILE = "run_id"
STOP_NOW = "now"  # in the stop file: without saving
LOCK_WAIT_S = 5.0  # a run that was asked to stop may be about to end
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy", "pyarrow")

logger = get_logger(__name__)


class FolderLock:
    """Held by rank 0 while it trains in a stage folder; the system lets go of it when the process ends, however.

    A POSIX record lock: unlike flock it is not shared with forked loader processes, which outlive a killed rank.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RUNNING_FILE
        self._file: Any = None
        self._noting = threading.Lock()
        self._open = False  # held, and no end noted yet

    def __enter__(self) -> FolderLock:
        """Take the lock. A collective. Raises CheckpointError where another process has it."""
        error: BigDSSMError | None = None
        if distributed.is_main():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="utf-8")
            error = self._taken()
        distributed.raise_together(error)
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}, self._file)
            self._file.flush()
            self._open = True
            (self._path.parent / STOP_FILE).unlink(missing_ok=True)  # of somebody who waited for an earlier run
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Note how the run ended, and let go of the folder."""
        if self._file is not None:
            code = error.exit_code if isinstance(error, BigDSSMError) else int(error is not None)
            self.end(code, "finished" if error is None else " ".join(str(error).split()) or type(error).__name__)
            self._file.truncate(0)
            self._file.close()

    def end(self, code: int, reason: str) -> None:
        """Note how the run ended, where it is this process that holds the folder, and once; from any thread."""
        with self._noting:
            if self._open:
                self._open = False
                try:
                    _note(self._path.parent, {"event": "end", "exit_code": code, "reason": reason})
                except OSError as problem:  # a full disk: what ended the run says more
                    logger.warning("could not note the end in %s: %s", self._path.parent / EVENTS_FILE, problem)

    def _taken(self) -> CheckpointError | None:
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError as problem:
                if problem.errno not in (errno.EACCES, errno.EAGAIN):
                    logger.warning("%s: no locks here (%s); mind that no two runs share it", self._path, problem)
                    return None
            if time.monotonic() > until:
                holder = running(self._path.parent) or {}
                return CheckpointError(
                    f"{self._path.parent} is in use by pid {holder.get('pid', '?')} on {holder.get('host', '?')}, "
                    f"since {holder.get('started', '?')}; stop that run (bigdssm stop_run) or choose another run.dir"
                )
            time.sleep(0.2)


def run_identity(folder: Path, saved: str | None) -> str:
    """Return the identity of the run in a stage folder, which each of its checkpoints carries. A collective.

    A folder without one takes `saved`, the identity in its newest checkpoint, or a new one.
    """
    found = ""
    if distributed.is_main():
        path = folder / RUN_ID_FILE
        found = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        if not re.fullmatch("[0-9a-f]{32}", found):  # lost, or damaged
            found = saved or uuid.uuid4().hex
            atomic.write_text(path, f"{found}\n")
    return distributed.broadcast_object(found)


def running(folder: Path) -> dict[str, Any] | None:
    """Return host, pid and start of the run that trains in a stage folder, None where none does.

    Reading it tells nothing of a run that was killed: only taking the lock does.
    """
    try:
        content: dict[str, Any] = json.loads((folder / RUNNING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def is_locked(folder: Path) -> bool:
    """Return whether another process trains in a stage folder. Never call it in the process that holds the lock."""
    try:
        with (folder / RUNNING_FILE).open("a+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as problem:
        return problem.errno in (errno.EACCES, errno.EAGAIN)
    return False


def find_running(run: Path) -> Path:
    """Return the stage folder in which a run trains now: `run` itself, or a stage in it. Raises CheckpointError."""
    for folder in (run, run / "pretrain", run / "sft"):
        if is_locked(folder):
            return folder
    raise CheckpointError(f"nothing trains in {run}, as far as this machine can see; is it the run's folder?")


def request_stop(folder: Path, saving: bool, timeout_s: float) -> dict[str, Any]:
    """Ask the run in a stage folder to stop, from any machine that sees the folder; return the event of its end.

    Raises CheckpointError where it still trains after `timeout_s`; the request then stands.
    """
    ends = len(read_events(folder))
    (folder / STOP_FILE).write_text("save\n" if saving else f"{STOP_NOW}\n", encoding="utf-8")
    until = time.monotonic() + timeout_s
    while is_locked(folder):
        if time.monotonic() > until:
            holder = running(folder) or {}
            raise CheckpointError(
                f"the run in {folder} (pid {holder.get('pid', '?')} on {holder.get('host', '?')}) was asked to stop "
                f"and has not in {timeout_s:.0f} s; it does after its step and checkpoint"
            )
        time.sleep(0.2)
    events = read_events(folder)
    ended = len(events) > ends and events[-1]["event"] == "end"
    return events[-1] if ended else {"event": "end", "exit_code": None, "reason": "ended without saving"}


def record_start(folder: Path, step: int, total_steps: int) -> None:
    """Append this start to `events.jsonl`: when, where, on how many ranks, from which step, with which versions."""
    hosts = distributed.all_gather_object(socket.gethostname())
    if distributed.is_main():
        who = {
            "step": step,
            "total_steps": total_steps,
            "ranks": len(hosts),
            "hosts": sorted(set(hosts)),
            "pid": os.getpid(),
        }
        _note(folder, {"event": "start", **who, "versions": versions()})


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the starts and ends of a stage's runs, oldest first; a run that was killed has no end."""
    return read_records(folder / EVENTS_FILE, "event")


def _note(folder: Path, event: dict[str, Any]) -> None:
    writer = MetricsWriter(folder / EVENTS_FILE)
    writer.write({"time": _now(), **event})
    writer.close()


@functools.cache
def versions() -> dict[str, str]:
    """Return what computes: Python, the packages, and a checksum of this package's own source."""
    found = {"python": platform.python_version(), "bigdssm": bigdssm.__version__, "code": code_checksum()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


CONSUMED, SKIPPED = "row_ids", "skipped_rows"


class RowLog:
    """`<name>-<rank>.jsonl` in a stage folder, from its first line on: {"step": s, "row_ids": […]} a line."""

    def __init__(self, folder: Path, name: str, rank: int, world_size: int, next_step: int) -> None:
        """Cut the log back to the steps before `next_step`; rank 0 cuts those of ranks that are no more, too."""
        self.path = cut_back_of_rank(folder, name, rank, world_size, lambda record: record["step"] < next_step)

    def write(self, step: int, row_ids: Tensor) -> None:
        """Append one step. Raises OSError, which names the file."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "row_ids": row_ids.tolist()}) + "\n")
