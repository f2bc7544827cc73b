"""Stage folder of a run: exclusive lock, start and end records, logs of row ids."""

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
from bigdssm.utils.atomic import path_in_errors
from bigdssm.utils.hashing import code_checksum
from bigdssm.utils.log import MetricsWriter, get_logger, read_records, truncate_rank_records

RUNNING_FILE, EVENTS_FILE, STOP_FILE = "running.json", "events.jsonl", "stop"
RUN_ID_FILE = "run_id"
STOP_NOW = "now"  # content of the stop file: stop without saving
LOCK_WAIT_S = 5.0  # time for a stopping run to release the lock
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy", "pyarrow")

logger = get_logger(__name__)
CONSUMED, SKIPPED = "row_ids", "skipped_rows"


class FolderLock:
    """Lock of a stage folder, held by rank 0 during training; the system releases it when the process ends.

    A POSIX record lock: unlike flock it is not shared with forked loader processes, which outlive a killed rank.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RUNNING_FILE
        self._file: Any = None
        self._recording = threading.Lock()
        self._open = False  # locked, and no end recorded yet
        self.result: dict[str, Any] = {}  # of a stage that finished; part of the end record

    def __enter__(self) -> "FolderLock":
        """Acquire the lock.

        All ranks must call it. Raises CheckpointError if another process holds it.
        """
        error: BigDSSMError | None = None
        if distributed.is_main():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="utf-8")
            error = self._acquire()
        distributed.raise_together(error)
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}, self._file)
            self._file.flush()
            self._open = True
            (self._path.parent / STOP_FILE).unlink(missing_ok=True)  # a request to an earlier run
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Record how the run ended, and release the lock."""
        if self._file is not None:
            code = error.exit_code if isinstance(error, BigDSSMError) else int(error is not None)
            self.end(code, "finished" if error is None else " ".join(str(error).split()) or type(error).__name__)
            self._file.truncate(0)
            self._file.close()

    def end(self, code: int, reason: str) -> None:
        """Record how the run ended, once, if this process holds the lock; from any thread."""
        with self._recording:
            if self._open:
                self._open = False
                try:
                    result = self.result if code == 0 else {}
                    _append_event(self._path.parent, {"event": "end", "exit_code": code, "reason": reason, **result})
                except OSError as problem:  # not raised: it would hide the error that ended the run
                    logger.warning("could not record the end in %s: %s", self._path.parent / EVENTS_FILE, problem)

    def _acquire(self) -> CheckpointError | None:
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError as problem:
                if problem.errno not in (errno.EACCES, errno.EAGAIN):
                    logger.warning(
                        "%s: file locking is not supported (%s); do not start a second run in this folder",
                        self._path,
                        problem,
                    )
                    return None
            if time.monotonic() > until:
                holder = lock_holder(self._path.parent) or {}
                return CheckpointError(
                    f"{self._path.parent} is in use by pid {holder.get('pid', '?')} on {holder.get('host', '?')}, "
                    f"since {holder.get('started', '?')}; stop that run (bigdssm stop_run) or choose another run.dir"
                )
            time.sleep(0.2)


def run_identity(folder: Path, saved: str | None) -> str:
    """Return the run id of a stage folder, which every checkpoint stores.

    All ranks must call it. If the folder has no id, its id becomes `saved` (the id in its newest checkpoint) if given,
    else a new one.
    """
    run_id = ""
    if distributed.is_main():
        path = folder / RUN_ID_FILE
        run_id = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        if not re.fullmatch("[0-9a-f]{32}", run_id):  # lost or damaged
            run_id = saved or uuid.uuid4().hex
            atomic.write_text(path, f"{run_id}\n")
    return distributed.broadcast_object(run_id)


def lock_holder(folder: Path) -> dict[str, Any] | None:
    """Return host, pid and start time of the process that holds a stage folder's lock, None without one.

    The file outlives a killed run: only `is_locked` shows whether the process is still running.
    """
    try:
        content: dict[str, Any] = json.loads((folder / RUNNING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the lock of a stage folder. Do not call it in the process that holds it."""
    try:
        with (folder / RUNNING_FILE).open("a+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as problem:
        return problem.errno in (errno.EACCES, errno.EAGAIN)
    return False


def find_running(run: Path) -> Path:
    """Return the locked stage folder: `run` or a stage in it. Raises CheckpointError: none is locked."""
    folders = (run, run / "pretrain", run / "sft")
    for folder in folders:
        if is_locked(folder):
            return folder
    if any((folder / EVENTS_FILE).exists() for folder in folders):
        raise CheckpointError(f"no stage of {run} is running; bigdssm watch_run {run} prints how the last one ended")
    raise CheckpointError(f"{run} is neither a run folder nor a stage folder: it has no {EVENTS_FILE}")


def request_stop(folder: Path, saving: bool, timeout_s: float) -> dict[str, Any]:
    """Request a stop of the run in a stage folder, from any machine with the folder; return its end event.

    Raises CheckpointError if the run has not ended after `timeout_s`; the request remains.
    """
    ends = len(read_events(folder))
    (folder / STOP_FILE).write_text("save\n" if saving else f"{STOP_NOW}\n", encoding="utf-8")
    until = time.monotonic() + timeout_s
    while is_locked(folder):
        if time.monotonic() > until:
            holder = lock_holder(folder) or {}
            raise CheckpointError(
                f"the run in {folder} (pid {holder.get('pid', '?')} on {holder.get('host', '?')}) has not stopped "
                f"within {timeout_s:.0f} s; it stops after its current step and checkpoint"
            )
        time.sleep(0.2)
    events = read_events(folder)
    ended = len(events) > ends and events[-1]["event"] == "end"
    return events[-1] if ended else {"event": "end", "exit_code": None, "reason": "ended without saving"}


def record_start(folder: Path, step: int, total_steps: int) -> None:
    """Append a start event to `events.jsonl`: time, hosts, number of ranks, step and versions.

    All ranks must call it.
    """
    hosts = distributed.all_gather_object(socket.gethostname())
    if distributed.is_main():
        start = {
            "step": step,
            "total_steps": total_steps,
            "ranks": len(hosts),
            "hosts": sorted(set(hosts)),
            "pid": os.getpid(),
        }
        _append_event(folder, {"event": "start", **start, "versions": versions()})


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Read the start and end events of a stage, oldest first; a killed run has no end event."""
    return read_records(folder / EVENTS_FILE, "event")


def _append_event(folder: Path, event: dict[str, Any]) -> None:
    writer = MetricsWriter(folder / EVENTS_FILE)
    writer.write({"time": _now(), **event})
    writer.close()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages, and a checksum of this package's source."""
    result = {"python": platform.python_version(), "bigdssm": bigdssm.__version__, "code": code_checksum()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "none"
    return result


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class RowLog:
    """Log of row ids: `<name>-<rank>.jsonl` in a stage folder, one {"step": s, "row_ids": […]} per line.

    Steps count from 1, as in metrics.jsonl and in the log lines.
    """

    def __init__(self, folder: Path, name: str, rank: int, world_size: int, step: int) -> None:
        """Truncate the log to the first `step` steps; rank 0 also truncates the logs of removed ranks."""
        self.path = truncate_rank_records(folder, name, rank, world_size, lambda record: record["step"] <= step)

    def write(self, step: int, row_ids: Tensor) -> None:
        """Append the rows of one step. Raises OSError, which names the file."""
        with path_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "row_ids": row_ids.tolist()}) + "\n")
