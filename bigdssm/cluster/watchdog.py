"""Watchdog of a rank: ends the process if another rank died or hangs, stops the run if its launcher ended.

Two threads, both independent of the main thread. The exchange thread writes this rank's heartbeat to the process
group's store and reads that of the next rank (a ring: constant cost per rank). The check thread never blocks, because
the store may be on a host that hangs.

    process gone or stopped         its heartbeats end; on the same machine /proc also shows it
    main thread stuck               heartbeats arrive without progress: the rank furthest behind is at fault
    store does not respond          rank 0 hosts it, unless the launcher does

The first rank that detects a fault writes the verdict; every rank logs it with its stack traces and exits with
PeerError's exit code. Nothing is saved: the ranks can no longer synchronize.
"""

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from bigdssm import distributed
from bigdssm.cluster.launcher import LauncherMonitor, state_of
from bigdssm.cluster.run_folder import STOP_NOW
from bigdssm.distributed import SharedStore
from bigdssm.errors import PeerError
from bigdssm.utils.log import get_logger

HEARTBEATS_PER_TIMEOUT, LONGEST_HEARTBEAT_S = 10, 5.0
# delay before a dead process is reported: its peers' failed collectives give a more specific error
DEAD_PROCESS_DELAY_S = 3.0
BROKEN_STORE_S = 10.0
STARTUP_TIMEOUT_S = 900.0  # limit before the first step: imports, opening a dataset, reading a checkpoint
EXIT_TIMEOUT_S = 15.0  # limit for the main thread to exit by itself
VERDICT, SURVEYOR = "verdict", "surveyor"
END_RECORD_S = 2.0  # limit for the end record: the file system may hang
OWN_FAILURE_CODE = 1  # of ranks whose collective failed without a rank that is gone: another start would fail, too
STOPPED_EXIT_CODE = 143  # the exit code of SIGTERM in shells
STOPPED = "stopped on request, ended without saving; --resume auto continues from the last checkpoint"

logger = get_logger(__name__)

_collector_lock = threading.Lock()  # also held during a fork: the new process must not inherit a disabled collector
os.register_at_fork(
    before=_collector_lock.acquire, after_in_parent=_collector_lock.release, after_in_child=_collector_lock.release
)


@dataclass(frozen=True)
class Peer:
    """The process of another rank."""

    rank: int
    host: str
    pid: int
    machine: str  # equal for processes that share a pid namespace

    def __str__(self) -> str:
        """Return for example `rank 1 (pid 4711 on node7)`."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Watchdog:
    """Monitors the other ranks between `__enter__` and `__exit__`.

    Both are collectives, `__exit__` only if the block raised no error.

    Within the block, the error of a collective that another rank has left becomes a PeerError that names that rank. The
    error remains as it is if no other rank is known to be gone: the backend, or the network, has then failed.
    """

    def __init__(
        self, timeout_s: float, launcher: LauncherMonitor, stop_file: Path,
        on_exit: Callable[[int, str], None] | None = None, request_stop: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Configure the watchdog; `__enter__` starts it.

        Args:
            timeout_s: limit without a heartbeat, and without progress
            stop_file: its existence requests a stop of the run
            on_exit: called with exit code and reason before the watchdog ends the process
            request_stop: requests a stop of this rank, by default with SIGTERM
        """
        self._request_stop = request_stop or (lambda: os.kill(os.getpid(), signal.SIGTERM))
        self._timeout_s, self._launcher, self._stop_file, self._on_exit = timeout_s, launcher, stop_file, on_exit
        self._interval_s = min(LONGEST_HEARTBEAT_S, timeout_s / HEARTBEATS_PER_TIMEOUT)
        self._search_s = max(min(EXIT_TIMEOUT_S / 2, timeout_s), 4 * self._interval_s)
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._store_is_rank_0s = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._phase, self._moves, self._moved_at = "starting", 0, time.monotonic()
        self._heartbeat_at = self._exchanged_at = time.monotonic()
        self._broken_at: float | None = None
        self._faults_since: dict[tuple[int, str], float] = {}
        self._verdict: dict[str, Any] | None = None
        self._to_publish: dict[str, Any] | None = None
        self._survey: dict[int, dict[str, Any]] | None = None
        self._needs_survey = self._stop_requested = self._ending = False
        self._leaving_until: float | None = None
        self._to_kill: int | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._main_thread = threading.main_thread().ident

    def __enter__(self) -> "Watchdog":
        """Start the threads. All ranks must call it."""
        me = Peer(self._rank, socket.gethostname(), os.getpid(), _machine())
        self._peers: list[Peer] = distributed.all_gather_object(me)
        self._near = [
            peer for peer in self._peers
            if peer.machine == me.machine and peer.rank != me.rank and state_of(peer.pid) is not None
        ]  # fmt: skip
        self._next = self._peers[(self._rank + 1) % self._world_size]
        # torchrun's store may outlive restarted ranks: an old verdict must not end the new ones
        self._store = SharedStore(f"watchdog-{distributed.broadcast_object(uuid.uuid4().hex)}")
        self._threads = [
            threading.Thread(target=target, name=f"watchdog-{target.__name__}", daemon=True)
            for target in (self._exchange, self._check)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop the threads; send an error of this rank to the others. Raises PeerError: another rank caused it."""
        self._leaving_until = time.monotonic() + self._search_s + EXIT_TIMEOUT_S
        late: RuntimeError | None = None
        if error is None:
            try:
                distributed.barrier()  # other ranks would report a rank that exits early as dead
            except RuntimeError as failed:
                error = late = failed
        if error is None:
            self._close()
            return
        cause = self._find_cause(error) if distributed.is_collective_failure(error) else None
        if self._ending:
            time.sleep(EXIT_TIMEOUT_S)  # the check thread ends the process
        if cause is not None:
            if self._verdict and not self._verdict["wait_for_main"] and self._verdict["code"] == PeerError.exit_code:
                # another rank ended by this verdict before the check thread logged the stack traces of this one
                sys.stderr.write(f"rank {self._rank} waited at:\n")
                traceback.print_tb(tb)
            self._close()
            raise PeerError(f"{cause}; the collective of rank {self._rank} failed: {_sentence(error)}") from error
        code = OWN_FAILURE_CODE if distributed.is_collective_failure(error) else PeerError.exit_code
        self._publish(f"rank {self._rank} stopped: {_sentence(error)}", wait_for_main=True, code=code)
        self._close()
        if late is not None:
            raise late

    def record_progress(self, phase: str) -> None:
        """Record progress of the main thread; `phase` describes its current work."""
        self._phase, self._moved_at = phase, time.monotonic()
        self._moves += 1

    def leave(self, code: int, reason: str) -> None:
        """Announce the end of this process to the other ranks and in the run folder, within a few seconds."""
        self._publish(f"rank {self._rank} stopped: {reason}", wait_for_main=True)
        self._record_end(code, reason)
        self._await_readers()

    # --- exchange thread ---

    def _exchange(self) -> None:
        number, before = 0, ""
        while not self._closed.is_set():
            try:
                number += 1
                self._store.write(f"beat/{self._rank}", json.dumps({"number": number, **self._own_state()}))
                heartbeat = self._store.read(f"beat/{self._next.rank}") or ""
                if heartbeat != before:
                    before, self._heartbeat_at = heartbeat, time.monotonic()
                if self._to_publish is not None:
                    self._store.write_once(VERDICT, json.dumps(self._to_publish))
                verdict = self._store.read(VERDICT)
                self._verdict = json.loads(verdict) if verdict else None
                if self._needs_survey and self._survey is None and self._may_survey():
                    heartbeats = {peer.rank: self._store.read(f"beat/{peer.rank}") for peer in self._peers}
                    self._survey = {rank: json.loads(text) for rank, text in heartbeats.items() if text}
                self._exchanged_at, self._broken_at = time.monotonic(), None
            except RuntimeError:
                self._broken_at = self._broken_at or time.monotonic()
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _may_survey(self) -> bool:
        """Return True on the first rank that requests a survey; on the others only after a further delay.

        All ranks detect a hang at the same time: if each read every heartbeat, the load on the store would be quadratic
        in the number of ranks. A rank outside a collective comes last, because it may be the one that hangs.
        """
        if self._own_state()["waits"]:
            self._store.write_once(SURVEYOR, str(self._rank))
            if self._store.read(SURVEYOR) == str(self._rank):
                return True
        return time.monotonic() - self._moved_at > self._allowed_s() + 4 * self._interval_s

    def _allowed_s(self) -> float:
        """Return the time limit of the main thread without progress."""
        return self._timeout_s if self._moves else max(self._timeout_s, STARTUP_TIMEOUT_S)

    def _own_state(self) -> dict[str, Any]:
        where, waits = _position(_frames().get(self._main_thread or 0))
        return {"moves": self._moves, "phase": self._phase, "where": where, "waits": waits}

    # --- check thread ---

    def _check(self) -> None:
        tick_s = min(1.0, self._interval_s)
        before = time.monotonic()
        while not self._closed.wait(tick_s):
            now = time.monotonic()
            if now - before > tick_s + max(2.0, 2 * self._interval_s):  # this process itself was stopped
                self._moved_at = self._heartbeat_at = self._exchanged_at = now
                self._faults_since.clear()
            before = now
            self._watch_launcher()
            verdict = self._verdict
            if verdict and verdict.get("wait_for_main") and self._leaving_until is None:
                self._leaving_until = now + EXIT_TIMEOUT_S
            if self._leaving_until is not None:
                if now > self._leaving_until:
                    self._end(verdict or _verdict("the main thread did not exit by itself"))
            elif verdict:
                self._end(verdict)
            elif fault := self._fault(now):
                self._end_run(fault)

    def _fault(self, now: float) -> str | None:
        """Return the fault of another rank as a sentence, or None."""
        timeout_s = self._timeout_s
        # checked before the heartbeat limit: otherwise a stopped rank 0 is reported as a failed store
        near = self._near_fault(now, stopped_s=timeout_s - 2 * self._interval_s, gone_s=DEAD_PROCESS_DELAY_S)
        if near or self._faults_since:  # one that is not yet certain would explain the others
            return near
        if self._broken_at and now - self._broken_at > BROKEN_STORE_S and self._store_is_rank_0s and self._rank:
            return f"{self._peers[0]} has ended: the store that it hosted for all ranks is gone"
        if now - self._exchanged_at > timeout_s:
            host = str(self._peers[0]) if self._store_is_rank_0s else "the launcher"
            return (
                f"the process group's store, on {host}, has not responded for {timeout_s:.0f} s: that process is "
                "stopped or its host is unreachable"
            )
        # up to the last response of the store: later, missing heartbeats are no evidence against the next rank
        if self._exchanged_at - self._heartbeat_at > timeout_s and self._world_size > 1:
            return (
                f"{self._next} sent no heartbeat for {timeout_s:.0f} s: the process is stopped or its host is "
                "unreachable"
            )
        # last, because a dead rank also blocks all main threads
        allowed_s = self._allowed_s()
        if now - self._moved_at > allowed_s + 3 * self._interval_s:
            if self._survey is None and now - self._moved_at < allowed_s + 5 * self._interval_s:
                self._needs_survey = True
                self._wake.set()
                return None
            # of the ranks furthest behind, one that is not in a collective blocks the others
            survey = self._survey or {self._rank: self._own_state()}
            behind = min(survey, key=lambda rank: (survey[rank]["moves"], survey[rank]["waits"], rank))
            others = "; ".join(
                f"rank {rank}: {survey[rank]['phase']}" for rank in sorted(survey)[:8] if rank != behind
            )  # fmt: skip
            return (
                f"{self._peers[behind]} is alive but its main thread is stuck: no progress for {allowed_s:.0f} s in "
                f"{survey[behind]['phase']}, at {survey[behind]['where']}" + (f" ({others})" if others else "")
            )
        return None

    def _near_fault(self, now: float, stopped_s: float, gone_s: float) -> str | None:
        """Return the fault of a rank on this machine that /proc has shown for long enough, or None."""
        for peer in self._near:
            state = state_of(peer.pid)
            kind = "gone" if state in (None, "Z", "X") else "stopped" if state in ("T", "t") else ""
            for other in {"gone", "stopped"} - {kind}:
                self._faults_since.pop((peer.rank, other), None)
            if kind:
                since = self._faults_since.setdefault((peer.rank, kind), now)
                if kind == "gone" and now - since >= gone_s:
                    return f"{peer} has ended without an error message: killed, or out of memory"
                if kind == "stopped" and now - since >= stopped_s:
                    self._to_kill = peer.pid if state == "T" else None
                    return f"{peer} has been stopped (SIGSTOP or a debugger) for {now - since:.0f} s"
        return None

    def _watch_launcher(self) -> None:
        """Request a stop if the launcher ended or the stop file exists."""
        if self._stop_requested:
            return
        reason = self._launcher.exited_ancestor()
        if reason:
            logger.warning("rank %d: %s has ended; a checkpoint is saved before the run stops", self._rank, reason)
        elif self._rank == 0:
            try:
                request = self._stop_file.read_text(encoding="utf-8").strip()
            except OSError:  # no such file, or a stale network folder: this thread must go on
                return
            with suppress(OSError):
                self._stop_file.unlink()
            if request == STOP_NOW:
                self._end_run(STOPPED, STOPPED_EXIT_CODE)
            logger.warning("stop requested by %s; a checkpoint is saved before the run stops", self._stop_file)
        else:
            return
        self._stop_requested = True
        self._request_stop()

    # --- ending ---

    def _find_cause(self, error: BaseException) -> str | None:
        """Return a sentence about the rank that made a collective of this rank fail, None if none is known to be gone.

        Takes four heartbeats at most: a rank on another machine is known to be gone after three.
        """
        if self._world_size == 1:
            return None
        until = time.monotonic() + self._search_s
        cause = None
        while cause is None and self._verdict is None and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.2)
            now = time.monotonic()
            cause = self._near_fault(now, stopped_s=self._timeout_s, gone_s=0.5)
            if cause is None and self._exchanged_at - self._heartbeat_at > 3 * self._interval_s:
                cause = f"{self._next} no longer sends heartbeats"
            if cause is None and self._broken_at is not None and self._store_is_rank_0s and self._rank:
                cause = f"{self._peers[0]} has ended: the store that it hosted for all ranks is gone"
        if self._verdict is not None:
            return None if self._verdict["code"] == OWN_FAILURE_CODE else str(self._verdict["text"])
        if cause is None and distributed.is_closed_by_peer(error):
            cause = "another rank has closed its connections; see the log of that rank"
        if cause is not None:
            self._publish(cause, wait_for_main=True)
        return cause

    def _end_run(self, sentence: str, code: int = PeerError.exit_code) -> None:
        self._publish(sentence, wait_for_main=False, code=code)
        self._end(self._verdict or _verdict(sentence, code=code))

    def _publish(self, sentence: str, wait_for_main: bool, code: int = PeerError.exit_code) -> None:
        """Write the verdict, unless another rank was first, and wait briefly for the store to confirm it."""
        self._to_publish = _verdict(sentence, wait_for_main, code)
        until = time.monotonic() + 2.0
        while self._verdict is None and self._broken_at is None and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.05)

    def _close(self) -> None:
        self._closed.set()
        self._wake.set()
        if self._verdict is not None:
            self._await_readers()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _end(self, verdict: dict[str, Any]) -> None:
        """Print the verdict and all stack traces, and end the process regardless of the main thread."""
        self._ending = True
        if verdict["code"] == STOPPED_EXIT_CODE:
            if self._rank == 0:
                sys.stderr.write(f"{verdict['text']}\n")
                sys.stderr.flush()
            self._record_end(verdict["code"], verdict["text"])
        else:
            sys.stderr.write(f"error: {verdict['text']}; rank {self._rank} ends without saving, its stack traces:\n")
            sys.stderr.flush()
            self._record_end(verdict["code"], f"{verdict['text']}; ended without saving")
            faulthandler.dump_traceback(all_threads=True)
        self._await_readers()
        if self._to_kill is not None and state_of(self._to_kill) == "T":  # a stopped process ignores SIGTERM
            os.kill(self._to_kill, signal.SIGKILL)
        os._exit(verdict["code"])

    def _record_end(self, code: int, reason: str) -> None:
        if self._on_exit is not None:
            thread = threading.Thread(target=self._on_exit, args=(code, reason), daemon=True)
            thread.start()
            thread.join(END_RECORD_S)

    def _await_readers(self) -> None:
        """Keep the store, which ends with this process, long enough for all ranks to read the verdict."""
        if self._store_is_rank_0s and self._rank == 0 and self._world_size > 1:
            time.sleep(min(LONGEST_HEARTBEAT_S, 2 * self._interval_s))


def _sentence(error: BaseException) -> str:
    """Return the text of an error in one line, with its class unless it is a sentence for users."""
    text = " ".join(str(error).split())
    is_for_users = isinstance(error, Exception) and hasattr(error, "exit_code")
    return text if is_for_users else f"{type(error).__name__}: {text}"


def _verdict(text: str, wait_for_main: bool = False, code: int = PeerError.exit_code) -> dict[str, Any]:
    return {"text": text, "wait_for_main": wait_for_main, "code": code}


def _machine() -> str:
    """Return an identifier of the pid namespace: processes with equal ones can look up each other's pids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return boot.read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # unique


def _frames() -> dict[int, FrameType]:
    """Return the current frame of every thread, read with the garbage collector disabled.

    Before Python 3.11.12 the interpreter holds its lock on the list of threads while it allocates the result. If a
    collection in between releases the GIL, a thread that starts or ends waits for that lock while it holds the GIL, and
    the process hangs.
    Source: https://github.com/python/cpython/issues/106883
    """
    with _collector_lock:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if was_enabled:
                gc.enable()


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """Return a thread's position, as `file.py:line function`, and whether it waits in a collective.

    For a thread that joins another one, such as the checkpoint writer, the position of the joined thread.
    """
    if frame is None:
        return "nowhere", False
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename == threading.__file__:
        if caller.f_code.co_name == "join" and (other := _frames().get(caller.f_locals["self"].ident)):
            return _position(other)
        caller = caller.f_back
    code = frame.f_code
    where = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"
    return where, f"torch{os.sep}distributed" in code.co_filename
