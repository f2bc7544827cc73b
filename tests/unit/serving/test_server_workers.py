"""Worker processes: one that fails to start stops the server; one that ends later is restarted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigdssm.serving.server import WorkersFailed, run_workers


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def end_at_once(folder: Path, ready: Callable[[], None]) -> None:
    (folder / str(os.getpid())).touch()
    os._exit(3)


def end_once_ready(folder: Path, ready: Callable[[], None]) -> None:
    (folder / str(os.getpid())).touch()
    if len(list(folder.iterdir())) < 3:
        ready()
    os._exit(3)


def test_a_worker_that_cannot_serve_ends_the_server(tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed, match="code 3 before it was ready"):
        run_workers(1, end_at_once, (tmp_path,), 1)
    assert len(list(tmp_path.iterdir())) == 1


def serve_once(folder: Path, ready: Callable[[], None]) -> None:
    """The first serves until the fourth starts; those in between fail to start."""
    place = len(list(folder.iterdir()))
    (folder / str(os.getpid())).touch()
    if place in (0, 3):
        ready()
    while place == 0 and len(list(folder.iterdir())) < 4:
        time.sleep(0.05)
    os._exit(3)


def test_a_worker_that_cannot_serve_is_tried_again_while_another_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bigdssm.serving.server.RETRY_S", 0.1)
    started = []
    start = multiprocessing.get_context("spawn").Process.start

    def one_by_one(process: Any) -> None:
        start(process)
        started.append(process)
        until = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < len(started):
            assert time.monotonic() < until
            time.sleep(0.02)

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", one_by_one)
    with pytest.raises(WorkersFailed):
        run_workers(2, serve_once, (tmp_path,), 1)
    assert len(started) >= 4 and "the others keep serving" in caplog.text


def test_a_worker_that_served_is_started_again_however_young_it_was(tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed):
        run_workers(1, end_once_ready, (tmp_path,), 1)
    assert len(list(tmp_path.iterdir())) == 3
