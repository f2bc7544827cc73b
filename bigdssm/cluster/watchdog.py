"""The watchdog of a rank: ends it when another rank has died or hangs, and stops the run when its launcher is gone.

Two threads, neither of which needs the main thread. One exchanges beats over the process group's store: it writes this
rank's, and reads that of the next rank (a ring, so that the cost does not grow with the ranks). The other judges, and
never waits for anything: the store may be on a host that hangs.

    a process is gone or stopped    its beats end; on the same machine /proc says so, too
    a main thread is stuck          beats come, but what they say does not change: the rank that is furthest behind
    the store does not answer       rank 0 keeps it, unless the launcher does

Whoever finds a fault writes the verdict, every rank logs it with its own stacks and leaves with PeerError's exit code.
Nothing is saved: the ranks cannot agree on a state any more.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from bigdssm import distributed
from bigdssm.cluster.launcher import Launcher, state_of
from bigdssm.cluster.run_folder import STOP_NOW
from bigdssm.distributed import Board
from bigdssm.errors import PeerError
from bigdssm.utils.log import get_logger

BEATS_PER_TIMEOUT, LONGEST_BEAT_S = 10, 5.0
GONE_S = 3.0  # after the end of a process is seen: its peers' collectives fail first, which says more
BROKEN_STORE_S = 10.0
STARTING_S = 900.0  # without progress before the first step: imports, opening a dataset, reading a checkpoint
LEAVING_S = 15.0  # that a main thread has for leaving by itself
VERDICT, SURVEYOR = "verdict", "surveyor"
NOTING_S = 2.0  # for the note of the end: the file system may be what hangs
STOPPED_EXIT_CODE = 143  # what shells give for SIGTERM
STOPPED = "stopped on request, ended without saving; --resume auto goes on from the last checkpoint"

logger = get_logger(__name__)


@dataclass(frozen=True)
class Peer:
    """Another rank's process."""

    rank: int
    host: str
    pid: int
    machine: str  # equal where one's process ids mean something to the other

    def __str__(self) -> str:
        """Return for example `rank 1 (pid 4711 on node7)`."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Watchdog:
    """Watches the other ranks from `__enter__` to `__exit__`, both of them collectives where all goes well.

    Within it the error of a collective that another rank has left becomes a PeerError that names this rank.
    """

    def __init__(
        self, timeout_s: float, launcher: Launcher, stop_file: Path, at_end: Callable[[int, str], None] | None = None,
        ask: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """`timeout_s` may pass without a sign of life, and without progress; `stop_file` asks the run to stop.

        `at_end` is told code and reason where the watchdog ends the process, of which nothing else then knows. `ask`
        asks this rank to stop, by default with SIGTERM.
        """
        self._ask = ask or _send_sigterm
        self._timeout_s, self._launcher, self._stop_file, self._at_end = timeout_s, launcher, stop_file, at_end
        self._interval_s = min(LONGEST_BEAT_S, timeout_s / BEATS_PER_TIMEOUT)
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._store_is_rank_0s = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._keeps_store = self._store_is_rank_0s and self._rank == 0 and self._world_size > 1  # for others
        self._phase, self._moves, self._moved_at = "starting", 0, time.monotonic()
        self._heard_at = self._exchanged_at = time.monotonic()
        self._broken_at: float | None = None
        self._faults_since: dict[tuple[int, str], float] = {}
        self._verdict: dict[str, Any] | None = None
        self._to_say: dict[str, Any] | None = None
        self._survey: dict[int, dict[str, Any]] | None = None
        self._survey_wanted = self._asked_to_stop = False
        self._leaving_until: float | None = None
        self._to_kill: int | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._main_thread = threading.main_thread().ident

    def __enter__(self) -> Watchdog:
        """Begin. A collective."""
        me = Peer(self._rank, socket.gethostname(), os.getpid(), _machine())
        self._peers: list[Peer] = distributed.all_gather_object(me)
        self._near = [
            peer for peer in self._peers
            if peer.machine == me.machine and peer.rank != me.rank and state_of(peer.pid) is not None
        ]  # fmt: skip
        self._next = self._peers[(self._rank + 1) % self._world_size]
        # torchrun's store may outlive the ranks that it starts again: a verdict on the dead must not end those
        self._board = Board(f"watchdog-{distributed.broadcast_object(uuid.uuid4().hex)}")
        self._threads = [
            threading.Thread(target=target, name=f"watchdog-{target.__name__}", daemon=True)
            for target in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End; where an error passes, leave its sentence to the others. Raises PeerError for what they caused."""
        self._leaving_until = time.monotonic() + LEAVING_S
        if error is None:
            try:
                distributed.barrier()  # whoever is through must not look like one that has died
            except RuntimeError as late:
                error = late
        if error is None:
            self._close()
        elif distributed.is_peer_failure(error):
            blamed = self._blame()
            self._close()
            raise PeerError(blamed) from error
        else:
            self._say(f"rank {self._rank} stopped: {_sentence(error)}", wait_for_main=True)
            self._close()

    def beat(self, phase: str) -> None:
        """Say that the main thread got on, and what it does now."""
        self._phase, self._moved_at = phase, time.monotonic()
        self._moves += 1

    def leave(self, code: int, reason: str) -> None:
        """Tell the other ranks and the run's folder that this process is about to end, in a few seconds at most."""
        self._say(f"rank {self._rank} stopped: {reason}", wait_for_main=True)
        self._note_end(code, reason)
        self._let_all_read()

    # --- the exchanging thread ---

    def _exchange(self) -> None:
        number, before = 0, ""
        while not self._closed.is_set():
            try:
                number += 1
                self._board.write(f"beat/{self._rank}", json.dumps({"number": number, **self._own_state()}))
                heard = self._board.read(f"beat/{self._next.rank}") or ""
                if heard != before:
                    before, self._heard_at = heard, time.monotonic()
                if self._to_say is not None:
                    self._board.write_once(VERDICT, json.dumps(self._to_say))
                verdict = self._board.read(VERDICT)
                self._verdict = json.loads(verdict) if verdict else None
                if self._survey_wanted and self._survey is None and self._may_survey():
                    notes = {peer.rank: self._board.read(f"beat/{peer.rank}") for peer in self._peers}
                    self._survey = {rank: json.loads(note) for rank, note in notes.items() if note}
                self._exchanged_at, self._broken_at = time.monotonic(), None
            except RuntimeError:
                self._broken_at = self._broken_at or time.monotonic()
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _may_survey(self) -> bool:
        """Return True on the first rank that asks, whose verdict serves all; in time on the others, where none came.

        Where one rank hangs all of them want to know why at once: ranks that each read every rank's note would ask the
        store a square of their number. One that does not wait for the others is not among the first: it may be what
        hangs, and a rank that waits shows where all do.
        """
        if self._own_state()["waits"]:
            self._board.write_once(SURVEYOR, str(self._rank))
            if self._board.read(SURVEYOR) == str(self._rank):
                return True
        return time.monotonic() - self._moved_at > self._allowed_s() + 4 * self._interval_s

    def _allowed_s(self) -> float:
        """Return how long the main thread may make no progress."""
        return self._timeout_s if self._moves else max(self._timeout_s, STARTING_S)

    def _own_state(self) -> dict[str, Any]:
        where, waits = _position(sys._current_frames().get(self._main_thread or 0))
        return {"moves": self._moves, "phase": self._phase, "where": where, "waits": waits}

    # --- the judging thread ---

    def _judge(self) -> None:
        tick_s = min(1.0, self._interval_s)
        before = time.monotonic()
        while not self._closed.wait(tick_s):
            now = time.monotonic()
            if now - before > tick_s + max(2.0, 2 * self._interval_s):  # it was this process that was stopped
                self._moved_at = self._heard_at = self._exchanged_at = now
                self._faults_since.clear()
            before = now
            self._watch_launcher()
            verdict = self._verdict
            if verdict and verdict.get("wait_for_main") and self._leaving_until is None:
                self._leaving_until = now + LEAVING_S
            if self._leaving_until is not None:
                if now > self._leaving_until:
                    self._end(verdict or _verdict("the main thread could not leave by itself"))
            elif verdict:
                self._end(verdict)
            elif fault := self._fault(now):
                self._condemn(fault)

    def _fault(self, now: float) -> str | None:
        """Return what is wrong with another rank, in one sentence, or None."""
        timeout_s = self._timeout_s
        # a little earlier than what beats say of a stopped rank 0: that nothing is heard from the store
        near = self._near_fault(now, stopped_s=timeout_s - 2 * self._interval_s, gone_s=GONE_S)
        if near:
            return near
        if self._broken_at and now - self._broken_at > BROKEN_STORE_S and self._store_is_rank_0s and self._rank:
            return f"{self._peers[0]} has ended: the store that it kept for all ranks is gone"
        if now - self._exchanged_at > timeout_s:
            keeper = f"{self._peers[0]} keeps it" if self._store_is_rank_0s else "the launcher keeps it"
            return f"the store of all ranks gave no answer for {timeout_s:.0f} s; {keeper}, and is stopped or cut off"
        # counted up to the last answer of the store: without one, silence says nothing of the next rank
        if self._exchanged_at - self._heard_at > timeout_s and self._world_size > 1:
            return (
                f"{self._next} gave no sign of life for {timeout_s:.0f} s: its process or host is stopped, or cut off"
            )
        # a little later than the others: where one is dead, all main threads are stuck
        allowed_s = self._allowed_s()
        if now - self._moved_at > allowed_s + 3 * self._interval_s:
            if self._survey is None and now - self._moved_at < allowed_s + 5 * self._interval_s:
                self._survey_wanted = True
                self._wake.set()
                return None
            return self._stuck_fault(self._survey or {self._rank: self._own_state()})
        return None

    def _near_fault(self, now: float, stopped_s: float, gone_s: float) -> str | None:
        """Return what /proc says of a rank on this machine once it has said so for long enough, or None."""
        for peer in self._near:
            state = state_of(peer.pid)
            kind = "gone" if state in (None, "Z", "X") else "stopped" if state in ("T", "t") else ""
            for other in {"gone", "stopped"} - {kind}:
                self._faults_since.pop((peer.rank, other), None)
            if kind:
                since = self._faults_since.setdefault((peer.rank, kind), now)
                if kind == "gone" and now - since >= gone_s:
                    return f"{peer} has ended without a word: killed, or out of memory"
                if kind == "stopped" and now - since >= stopped_s:
                    self._to_kill = peer.pid if state == "T" else None
                    return f"{peer} is stopped (SIGSTOP or a debugger), for {now - since:.0f} s by now"
        return None

    def _stuck_fault(self, survey: dict[int, dict[str, Any]]) -> str:
        """Return who holds up the others: of the ranks furthest behind, one that does not wait for others itself."""
        behind = sorted(survey, key=lambda rank: (survey[rank]["moves"], survey[rank]["waits"], rank))[0]
        state = survey[behind]
        others = "; ".join(
            f"rank {rank}: {survey[rank]['phase']}" for rank in sorted(survey)[:8] if rank != behind
        )  # fmt: skip
        return (
            f"{self._peers[behind]} lives but its main thread is stuck: no progress for {self._timeout_s:.0f} s in "
            f"{state['phase']}, at {state['where']}" + (f" ({others})" if others else "")
        )

    def _watch_launcher(self) -> None:
        """Ask the run to stop where the launcher is lost, or a file asks."""
        if self._asked_to_stop:
            return
        reason = self._launcher.lost()
        if reason:
            logger.warning("%s above rank %d has ended; the run saves and stops", reason, self._rank)
        elif self._rank == 0 and self._stop_file.exists():
            saving = self._stop_file.read_text(encoding="utf-8").strip() != STOP_NOW
            self._stop_file.unlink(missing_ok=True)
            if not saving:
                self._condemn(STOPPED, STOPPED_EXIT_CODE)
            logger.warning("asked to stop by %s; the run saves first", self._stop_file)
        else:
            return
        self._asked_to_stop = True
        self._ask()

    # --- ending ---

    def _blame(self) -> str:
        """Return which rank made a collective of this rank fail, as far as it can be found out in a short time."""
        until = time.monotonic() + min(LEAVING_S / 2, self._timeout_s)
        found = None
        while found is None and self._verdict is None and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.2)
            now = time.monotonic()
            found = self._near_fault(now, stopped_s=self._timeout_s, gone_s=0.5)
            if found is None and self._exchanged_at - self._heard_at > 3 * self._interval_s:
                found = f"{self._next} gives no sign of life any more"
            if found is None and self._broken_at is not None and self._store_is_rank_0s and self._rank:
                found = f"{self._peers[0]} has ended: the store that it kept for all ranks is gone"
        if self._verdict is not None:
            return str(self._verdict["text"])
        found = found or "another rank has left the run; its own message says why"
        self._say(found, wait_for_main=True)
        return found

    def _condemn(self, sentence: str, code: int = PeerError.exit_code) -> None:
        self._say(sentence, wait_for_main=False, code=code)
        self._end(self._verdict or _verdict(sentence, code=code))

    def _say(self, sentence: str, wait_for_main: bool, code: int = PeerError.exit_code) -> None:
        """Write the verdict, unless another rank was first, and wait shortly until it stands."""
        self._to_say = _verdict(sentence, wait_for_main, code)
        until = time.monotonic() + 2.0
        while self._verdict is None and self._broken_at is None and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.05)

    def _close(self) -> None:
        self._closed.set()
        self._wake.set()
        if self._verdict is not None:
            self._let_all_read()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _end(self, verdict: dict[str, Any]) -> None:
        """Say the verdict with all stacks of this process, and end it whatever the main thread does."""
        if verdict["code"] == STOPPED_EXIT_CODE:
            if self._rank == 0:
                sys.stderr.write(f"{verdict['text']}\n")
                sys.stderr.flush()
            self._note_end(verdict["code"], verdict["text"])
        else:
            sys.stderr.write(f"error: {verdict['text']}; rank {self._rank} ends without saving, its stacks:\n")
            sys.stderr.flush()
            self._note_end(verdict["code"], f"{verdict['text']}; ended without saving")
            faulthandler.dump_traceback(all_threads=True)
        self._let_all_read()
        if self._to_kill is not None and state_of(self._to_kill) == "T":  # launchers wait 30 s for it to heed SIGTERM
            os.kill(self._to_kill, signal.SIGKILL)
        os._exit(verdict["code"])

    def _note_end(self, code: int, reason: str) -> None:
        if self._at_end is not None:
            noting = threading.Thread(target=self._at_end, args=(code, reason), daemon=True)
            noting.start()
            noting.join(NOTING_S)

    def _let_all_read(self) -> None:
        """Keep the store, which goes with this rank, until all have read the verdict."""
        if self._keeps_store:
            time.sleep(min(LONGEST_BEAT_S, 2 * self._interval_s))


def _send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _verdict(text: str, wait_for_main: bool = False, code: int = PeerError.exit_code) -> dict[str, Any]:
    return {"text": text, "wait_for_main": wait_for_main, "code": code}


def _machine() -> str:
    """Return what is the same for two processes where one may look up the other's process id."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return boot.read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # nobody's but one's own


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """Return where a thread is, as `file.py:line function`, and whether it waits in a collective.

    One that waits for another thread of this process, such as the one that writes a checkpoint, is where that one is.
    """
    if frame is None:
        return "nowhere", False
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename == threading.__file__:
        if caller.f_code.co_name == "join" and (other := sys._current_frames().get(caller.f_locals["self"].ident)):
            return _position(other)
        caller = caller.f_back
    code = frame.f_code
    where = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"
    return where, f"torch{os.sep}distributed" in code.co_filename


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Exception) and hasattr(error, "exit_code") else f"{type(error).__name__}: {text}"
