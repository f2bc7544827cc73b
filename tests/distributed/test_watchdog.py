"""Ranks whose peers die, stop or hang: they end in time, with one sentence that names who it was."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import watched

ROOT = Path(__file__).resolve().parents[2]


class Ranks:
    """Processes of tests/distributed/watched.py; `deadline_s` counts from when all have started."""

    def __init__(self, kind: str, victim: int, world_size: int = 3) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.watched", kind, *map(str, (victim, rank, world_size, port))],
                cwd=ROOT, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "started\n"

    def wait(self, deadline_s: float) -> tuple[list[int], list[str]]:
        """Return the exit codes and the stderr outputs by rank."""
        until = time.monotonic() + deadline_s
        try:
            written = [p.communicate(timeout=max(0.1, until - time.monotonic()))[1] for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], written


def sentences(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


NO_SIGN = rf"rank 1 \(pid \d+ on \S+\) sent no heartbeat for {watched.TIMEOUT_S:.0f} s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "victim", "victims_code", "expected"),
    [
        ("kill", 1, -9, r"rank 1 \(pid \d+ on \S+\) has ended without an error message"),
        pytest.param("idle-kill", 0, -9, r"rank 0 \(pid \d+ on \S+\) has ended", marks=pytest.mark.slow),
        ("stop", 0, -9, r"rank 0 \(pid \d+ on \S+\) has been stopped"),
        pytest.param("stop", 2, -9, r"rank 2 \(pid \d+ on \S+\) has been stopped", marks=pytest.mark.slow),
        ("stop-apart", 1, None, NO_SIGN),
        pytest.param("stop-apart", 0, None, r"rank 0 \(pid .*(not responded|no heartbeat)", marks=pytest.mark.slow),
        pytest.param("kill-apart", 1, -9, r"rank 1 \(pid \d+ on \S+\) no longer sends", marks=pytest.mark.slow),
        (
            "hang",
            2,
            6,
            r"rank 2 \(pid \d+ on \S+\) is alive but .* is stuck: .* in step 10, at .*watched.py",
        ),
        ("raise", 1, 1, r"rank 1 stopped: ValueError: a row without end"),
    ],
)
def test_the_other_ranks_end_in_time_and_name_the_failed_rank(
    kind: str, victim: int, victims_code: int | None, expected: str
) -> None:
    ranks = Ranks(kind, victim)
    started = time.monotonic()
    if victims_code is None:  # nobody ends a stopped process on another machine
        others = [process for rank, process in enumerate(ranks.processes) if rank != victim]
        while any(process.poll() is None for process in others) and time.monotonic() - started < 30:
            time.sleep(0.1)
        assert ranks.processes[victim].poll() is None
        ranks.processes[victim].kill()
    codes, written = ranks.wait(30)
    assert time.monotonic() - started < 4 * watched.TIMEOUT_S + 10
    assert codes == [(victims_code or -9) if rank == victim else 6 for rank in range(3)]
    for rank, text in enumerate(written):
        if rank != victim:
            assert len(sentences(text)) == 1, text
            assert re.search(expected, sentences(text)[0]), text
    if "stop" in kind:  # the rank that reported it shows where it waits
        assert any("in all_reduce" in text for text in written)
    if kind == "hang":  # also ranks whose collective another one ends before they read the verdict
        found = [("in meet" in text, "in all_reduce" in text) for text in written]
        assert found == [(rank == victim, rank != victim) for rank in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["late", "none"])
def test_a_late_rank_stops_no_other_rank(kind: str) -> None:
    codes, written = Ranks(kind, 1).wait(30)
    assert codes == [0, 0, 0], written
    assert not any(sentences(text) for text in written)


@pytest.mark.slow
def test_a_run_suspended_on_all_ranks_continues() -> None:
    ranks = Ranks("none", 0)
    time.sleep(0.5)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks.processes:
            process.send_signal(number)
        time.sleep(2 * watched.TIMEOUT_S if number == signal.SIGSTOP else 0)
    codes, written = ranks.wait(30)
    assert codes == [0, 0, 0], written
