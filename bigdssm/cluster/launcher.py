"""Detect this rank's launcher, start ranks on this machine, and run commands in subprocesses."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from bigdssm.cluster.signals import STOPPED_EARLY_MESSAGE, StopRequest
from bigdssm.errors import ConfigError, PeerError, Preempted
from bigdssm.utils.log import get_logger

DEEPSPEED_LAUNCHER = b"deepspeed.launcher.launch"
STARTED_BY = "BIGDSSM_STARTED_BY"  # pid of the process (run_ranks, tools.evidence) that started this one
KILL_AFTER_FAILURE_S = 30.0  # limit for the other ranks to end after a failure; then they are killed
RENDEZVOUS = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # required in addition to RANK and WORLD_SIZE

logger = get_logger(__name__)


class LauncherMonitor:
    """The ancestor processes of a rank: if one of them exits, the run must stop.

    torchrun: the parent. DeepSpeed: the runner and its child, the launcher, which survives if the runner is killed or
    receives SIGTERM. Also the process that started the run (`STARTED_BY`). No process is monitored if a single rank was
    started directly.
    """

    def __init__(self) -> None:
        """Record the ancestors of this process; create the instance early: only later changes are detected."""
        self._parent = os.getppid()
        self._deepspeed = False
        with suppress(OSError):  # it may have ended
            self._deepspeed = DEEPSPEED_LAUNCHER in Path(f"/proc/{self._parent}/cmdline").read_bytes()
        self._watched = self._deepspeed or "TORCHELASTIC_RUN_ID" in os.environ
        self._above = parent_of(self._parent) if self._deepspeed else None
        starter = os.environ.get(STARTED_BY, "")
        self._starter = int(starter) if _is_number(starter) and not _has_ended(int(starter)) else None

    def exited_ancestor(self) -> str | None:
        """Return a description of the ancestor that has ended, or None."""
        if self._starter is not None and _has_ended(self._starter):
            return f"the parent command (pid {self._starter})"
        if not self._watched:
            return None
        if os.getppid() != self._parent:
            return f"the launcher (pid {self._parent})"
        if self._above is not None and parent_of(self._parent) != self._above:
            return f"the deepspeed runner (pid {self._above})"
        return None


def rank_and_world_size() -> tuple[int, int]:
    """Read rank and world size from the environment; (0, 1) if unset. Raises ConfigError."""
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
    if rank == "" and world_size == "1":
        return 0, 1
    if not (_is_number(rank) and _is_number(world_size) and int(rank) < int(world_size)):
        raise ConfigError(
            f"RANK={rank} WORLD_SIZE={world_size}: needs a rank from 0 to WORLD_SIZE - 1; unset both, or start all "
            "ranks with a launcher"
        )
    return int(rank), int(world_size)


def is_rank() -> bool:
    """Return True in a process that a launcher has started as a rank."""
    return os.environ.get("RANK", "") != ""


def check_launch() -> int:
    """Validate the launch environment and return the world size. Raises ConfigError."""
    _, world_size = rank_and_world_size()
    if not is_rank():
        return world_size
    given = {name: os.environ.get(name, "") for name in RENDEZVOUS}
    numbers = (given["LOCAL_RANK"], given["MASTER_PORT"])
    if not given["MASTER_ADDR"] or not all(map(_is_number, numbers)) or int(given["MASTER_PORT"]) > 65_535:
        got = " ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"{got} with RANK={os.environ['RANK']}: needs the local rank and the address and port of rank 0; unset "
            "RANK, or start all ranks with deepspeed, torchrun, or as in launch/slurm.sbatch"
        )
    return world_size


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def parent_of(pid: int) -> int | None:
    """Return the parent pid of a process on this machine, None if there is no such process."""
    fields = _fields(pid)
    return int(fields[1]) if fields else None


def children_of(pid: int) -> list[int]:
    """Return the pids of the child processes of a process on this machine, of any of its threads."""
    pids: list[int] = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*/children")):
        with suppress(OSError):  # the thread has ended
            pids += map(int, thread.read_text().split())
    return pids


def state_of(pid: int) -> str | None:
    """Return the state letter of a process (R, S, D; T stopped, Z ended), None if there is no such process."""
    fields = _fields(pid)
    return fields[0] if fields else None


def _has_ended(pid: int) -> bool:
    return state_of(pid) in (None, "Z")


def _fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the command name, which may contain spaces; the first is the state."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def share_cores(ranks: int) -> None:
    """Divide the cores of this machine among ranks to be started, unless OMP_NUM_THREADS is set."""
    from joblib import cpu_count

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // ranks)))


def run_ranks(command: Sequence[str], ranks: int, stop: StopRequest, launcher: LauncherMonitor) -> int:
    """Run `command` on all ranks of a run on this machine; return the exit code of the run.

    This is the smallest positive exit code other than PeerError's. Without one: Preempted's if a stop killed all ranks
    before they installed signal handlers, PeerError's if a rank failed or was killed, else 0. A stop request, or the
    end of this process's launcher, is forwarded to all ranks as SIGTERM.
    """
    from bigdssm.distributed import free_port  # imports torch, which takes seconds

    group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes: list[subprocess.Popen[bytes]] = []
    stopping, failed_at = False, float("inf")
    stop.defer_signals()  # from now on signals are forwarded to the ranks
    try:
        for rank in range(ranks):
            variables = {**group, "RANK": rank, "LOCAL_RANK": rank}
            env = {**environment(), **{name: str(value) for name, value in variables.items()}}
            processes.append(subprocess.Popen(command, env=env))
        while None in [process.poll() for process in processes]:
            if not stopping and (stop.requested or launcher.exited_ancestor()):
                stopping = True
                for process in processes:
                    process.terminate()
            if any(process.returncode not in (None, 0, Preempted.exit_code) for process in processes):
                failed_at = min(failed_at, time.monotonic())
                if time.monotonic() > failed_at + KILL_AFTER_FAILURE_S:
                    break
            time.sleep(0.1)
        codes = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode is not None}
    finally:
        for process in processes:
            process.kill()  # no effect on an ended process
            process.wait()
    for rank, code in codes.items():
        if code < 0 and not stopping:
            logger.error("rank %d was ended by %s", rank, Signals(-code).name)
    if reasons := [code for code in codes.values() if code > 0 and code != PeerError.exit_code]:
        return min(reasons)
    if stopping and all(code < 0 for code in codes.values()):  # stopped before they installed signal handlers
        logger.info(STOPPED_EARLY_MESSAGE)
        return Preempted.exit_code
    return PeerError.exit_code if any(codes.values()) else 0


@dataclass(frozen=True)
class FinishedCommand:
    """Exit code, log and resource use of a finished command."""

    line: tuple[str, ...]
    log: Path
    exit_code: int
    seconds: float
    cpu_seconds: float

    def check(self) -> None:
        """Raise CalledProcessError, which names the log, if the command failed."""
        if self.exit_code:
            raise subprocess.CalledProcessError(self.exit_code, [*self.line, f"# see {self.log}"])


def environment() -> dict[str, str]:
    """Return the environment for a subprocess; training in it stops when this process ends."""
    return {**os.environ, STARTED_BY: str(os.getpid())}


def run_command(log: Path, command: str, *arguments: str) -> FinishedCommand:
    """Run `bigdssm command …` in a subprocess, and append its output to `log`.

    A `command` that ends in .py is the path of a script. The subprocess is terminated if this process is interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    program = (command,) if command.endswith(".py") else ("-m", "bigdssm.commands", command)
    line, started = (sys.executable, *program, *arguments), time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment())
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return FinishedCommand(line, log, process.returncode, time.perf_counter() - started, used.ru_utime + used.ru_stime)
