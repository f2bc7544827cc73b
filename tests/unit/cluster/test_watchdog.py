"""Faults that the watchdog reports, by the times of heartbeats; tests/distributed/test_watchdog.py uses real ranks."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bigdssm.cluster.launcher import LauncherMonitor, state_of
from bigdssm.cluster.watchdog import DEAD_PROCESS_DELAY_S, Peer, Watchdog
from bigdssm.errors import PeerError

TIMEOUT_S = 10.0


@pytest.fixture
def watchdog() -> Watchdog:
    """Rank 1 of 3 on separate machines; last progress, store response and neighbour's heartbeat at second 100."""
    dog = Watchdog(TIMEOUT_S, LauncherMonitor(), Path("no such file"))
    dog._rank, dog._world_size, dog._store_is_rank_0s = 1, 3, True
    dog._peers = [Peer(rank, f"node{rank}", 7, f"machine {rank}") for rank in range(3)]
    dog._near, dog._next = [], dog._peers[2]
    dog._moves, dog._moved_at, dog._exchanged_at, dog._heartbeat_at = 5, 100.0, 100.0, 100.0
    return dog


def test_a_silent_store_is_blamed_on_its_host_not_on_the_neighbour(watchdog: Watchdog) -> None:
    watchdog._heartbeat_at = 99.0  # a heartbeat arrives shortly before the store's response
    assert watchdog._fault(109.9) is None, "10.9 s without a heartbeat, but also without a response of the store"
    fault = watchdog._fault(110.1)
    assert fault is not None and fault.startswith("the process group's store, on rank 0 (pid 7")
    watchdog._store_is_rank_0s = False
    assert "store, on the launcher, has not responded for 10 s" in str(watchdog._fault(110.1))


def test_a_neighbour_missing_from_the_store_is_blamed(watchdog: Watchdog) -> None:
    watchdog._exchanged_at = watchdog._moved_at = 109.9
    assert watchdog._fault(110.0) is None
    watchdog._exchanged_at = watchdog._moved_at = 110.1
    assert str(watchdog._fault(110.2)).startswith("rank 2 (pid 7 on node2) sent no heartbeat for 10 s")


def test_rank_0_is_blamed_for_a_broken_store(watchdog: Watchdog) -> None:
    watchdog._broken_at = 100.0
    assert watchdog._fault(109.9) is None
    assert "rank 0 (pid 7 on node0) has ended" in str(watchdog._fault(110.01))


def test_a_dead_rank_0_is_blamed_for_its_silent_store(watchdog: Watchdog) -> None:
    ended = subprocess.Popen(["true"])  # a zombie until wait()
    watchdog._near = [Peer(0, "node0", ended.pid, "machine 0")]
    while state_of(ended.pid) != "Z":
        time.sleep(0.01)
    assert watchdog._fault(110.1) is None, "10.1 s without a response of the store, but its host may have ended"
    assert str(watchdog._fault(110.1 + DEAD_PROCESS_DELAY_S)).startswith(f"rank 0 (pid {ended.pid} on node0) has ended")
    ended.wait()


def test_a_rank_whose_collective_ends_with_a_hanging_rank_logs_where_it_waited(
    watchdog: Watchdog, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_reduce() -> None:
        raise RuntimeError("Gloo: connection closed by peer")

    def run(verdict: dict[str, object]) -> str:
        watchdog._verdict, watchdog._threads = verdict, []  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="Gloo") as broken:
            all_reduce()
        with pytest.raises(PeerError, match="rank 2 is stuck"):
            watchdog.__exit__(broken.type, broken.value, broken.tb)
        return capsys.readouterr().err

    stuck = {"text": "rank 2 is stuck", "code": PeerError.exit_code}
    written = run({**stuck, "wait_for_main": False})
    assert written.startswith("rank 1 waited at:") and "in all_reduce" in written
    assert run({**stuck, "wait_for_main": True}) == "", "the rank ends by its own error"


class BackendError(torch.distributed.DistBackendError):
    """An error of the communication library by itself."""


@pytest.mark.parametrize(
    ("error", "verdict", "expected"),
    [
        # no rank is known to be gone: the library's own error stays, and is what the other ranks get
        (BackendError("NCCL error: No route to host"), None, "BackendError: NCCL error: No route to host"),
        # another rank was first with its own failure
        (BackendError("NCCL error: No route to host"), 1, "BackendError: NCCL error: No route to host"),
        (RuntimeError("Gloo: Connection closed by peer"), None, "PeerError: another rank has closed its connections"),
        (
            BackendError("NCCL error: remote"),
            PeerError.exit_code,
            "PeerError: rank 2 is gone; the collective of rank 1",
        ),
    ],
)
def test_only_a_rank_that_is_gone_is_named_for_a_failed_collective(
    watchdog: Watchdog, error: Exception, verdict: int | None, expected: str
) -> None:
    watchdog._threads, watchdog._search_s = [], 0.1  # type: ignore[assignment]
    watchdog._heartbeat_at = watchdog._exchanged_at = time.monotonic()
    if verdict is not None:
        watchdog._verdict = {"text": "rank 2 is gone", "code": verdict, "wait_for_main": True}
    try:
        try:
            raise error
        except Exception as raised:
            watchdog.__exit__(type(raised), raised, raised.__traceback__)
            raise
    except Exception as final:
        found = f"{type(final).__name__}: {final}"
    assert found.startswith(expected)
    assert str(error) in found
    assert watchdog._to_publish is not None or verdict is not None
    if watchdog._to_publish is not None:
        assert str(error) in watchdog._to_publish["text"] or "closed its connections" in watchdog._to_publish["text"]
        assert watchdog._to_publish["code"] == (PeerError.exit_code if "PeerError" in found else 1)


def test_a_single_rank_has_no_peer_to_name(watchdog: Watchdog) -> None:
    watchdog._world_size = 1
    error = BackendError("NCCL error: No route to host, connection reset by peer")
    started = time.monotonic()
    assert watchdog._find_cause(error) is None
    assert time.monotonic() - started < 1.0


def test_the_slowest_rank_outside_a_collective_is_blamed(watchdog: Watchdog) -> None:
    """All ranks wait in the collective of step 5 except rank 2, which never reached it."""

    def state(moves: int, waits: bool) -> dict[str, object]:
        return {"moves": moves, "phase": f"step {moves}", "where": "loop.py:3 _train", "waits": waits}

    watchdog._exchanged_at = watchdog._heartbeat_at = 114.0
    assert watchdog._fault(113.1) is None and watchdog._needs_survey, "it first requests a survey of all ranks"
    watchdog._survey = {0: state(5, True), 1: state(5, True), 2: state(5, False)}
    fault = str(watchdog._fault(113.2))
    assert "rank 2 (pid 7 on node2) is alive but its main thread is stuck: no progress for 10 s in step 5, at" in fault
    watchdog._survey = {0: state(5, True), 1: state(4, True), 2: state(5, False)}
    assert "rank 1 (pid 7 on node1) is alive" in str(watchdog._fault(113.3))


def test_one_rank_surveys_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one rank hangs, all others detect it at the same time; each heartbeat is read by one of them."""
    values: dict[str, str] = {}
    reads: list[str] = []

    class OneStore:
        def write(self, key: str, value: str) -> None:
            values[key] = value

        def write_once(self, key: str, value: str) -> None:
            values.setdefault(key, value)

        def read(self, key: str) -> str | None:
            reads.append(key)
            return values.get(key)

    def exchange_once(dog: Watchdog) -> None:
        monkeypatch.setattr(dog._wake, "wait", lambda seconds: dog._closed.set())
        dog._closed.clear()
        dog._exchange()

    monkeypatch.setattr(Watchdog, "_own_state", lambda dog: {"waits": dog._rank != 0})  # rank 0 hangs
    num_ranks, dogs = 40, []
    for rank in range(num_ranks):
        dog = Watchdog(TIMEOUT_S, LauncherMonitor(), Path("no such file"))
        dog._rank, dog._store = rank, OneStore()  # type: ignore[assignment]
        dog._peers = [Peer(other, f"node{other}", 7, f"machine {other}") for other in range(num_ranks)]
        dog._next = dog._peers[(rank + 1) % num_ranks]
        dog._moves, dog._needs_survey = 5, True
        dog._moved_at = time.monotonic() - TIMEOUT_S - 3.5 * dog._interval_s
        values[f"beat/{rank}"] = json.dumps({"moves": 5, "phase": "step 5", "where": "", "waits": True})
        dogs.append(dog)
    for dog in dogs:
        exchange_once(dog)
    assert [dog._rank for dog in dogs if dog._survey is not None] == [1]
    assert sorted(dogs[1]._survey or ()) == list(range(num_ranks))
    assert len(reads) <= 4 * num_ranks
    dogs[7]._moved_at -= dogs[7]._interval_s
    exchange_once(dogs[7])
    assert dogs[7]._survey is not None, "rank 1 wrote no verdict"


def test_a_main_thread_that_joins_another_reports_its_location(watchdog: Watchdog) -> None:
    """Otherwise all ranks would report the same position when one cannot write its checkpoint shard."""
    done: list[bool] = []

    def writes_forever() -> None:
        while not done:
            time.sleep(0.01)

    writing = threading.Thread(target=writes_forever)
    waiting = threading.Thread(target=writing.join)
    writing.start(), waiting.start()
    watchdog._main_thread = waiting.ident
    try:
        assert str(watchdog._own_state()["where"]).endswith("writes_forever")
    finally:
        done.append(True)
        waiting.join()


def test_no_garbage_is_collected_while_the_interpreter_reads_frames(
    watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    monkeypatch.setattr(sys, "_current_frames", lambda: enabled.append(gc.isenabled()) or {})
    assert gc.isenabled() and watchdog._own_state()["where"] == "nowhere"
    assert enabled == [False] and gc.isenabled()


FORKS = """
import gc, os, sys, threading
from bigdssm.cluster import watchdog

def read_frames():
    while True:
        watchdog._frames()

sys.setswitchinterval(1e-5)
reader = threading.Thread(target=read_frames, daemon=True)
reader.start()
for _ in range(50):
    child = os.fork()
    if not child:
        os._exit(0 if gc.isenabled() and watchdog._frames() else 1)
    assert os.waitpid(child, 0)[1] == 0
assert reader.is_alive()
"""


def test_a_loader_process_that_starts_during_a_heartbeat_collects_garbage() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_before_the_first_step_a_rank_may_take_its_time(watchdog: Watchdog) -> None:
    watchdog._moves, watchdog._exchanged_at, watchdog._heartbeat_at = 0, 999.0, 999.0
    watchdog._survey = {}
    assert watchdog._fault(999.0) is None


def test_a_request_by_file_becomes_the_signal_that_stops_a_run(
    watchdog: Watchdog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    watchdog._stop_file = tmp_path / "stop"
    watchdog._stop_file.write_text("save\n")
    watchdog._watch_launcher()
    assert not sent and watchdog._stop_file.exists(), "only rank 0 reads it"
    watchdog._rank = 0
    watchdog._watch_launcher()
    assert sent == [(os.getpid(), signal.SIGTERM)] and not watchdog._stop_file.exists()
    watchdog._stop_file.write_text("save\n")
    watchdog._watch_launcher()
    assert len(sent) == 1, "once is enough"
    watchdog._stop_requested = False
    watchdog._stop_file = tmp_path  # cannot be read
    watchdog._watch_launcher()
    assert len(sent) == 1
