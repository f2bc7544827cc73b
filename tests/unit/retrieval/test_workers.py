"""Worker processes of a server: one that cannot serve stops all, one that could is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bigdssm.serving.workers import WorkersFailed, run_workers


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
    with pytest.raises(WorkersFailed, match="code 3 before it could serve"):
        run_workers(1, end_at_once, (tmp_path,), 1)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_worker_that_served_is_started_again_however_young_it_was(tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed):
        run_workers(1, end_once_ready, (tmp_path,), 1)
    assert len(list(tmp_path.iterdir())) == 3
