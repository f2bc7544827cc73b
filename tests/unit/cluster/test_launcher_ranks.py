"""Ranks that a command starts by itself: their number, environment, signals, and the exit code of all of them."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

from bigdssm.cluster import launcher
from bigdssm.cluster.launcher import LauncherMonitor, run_ranks
from bigdssm.cluster.signals import StopRequest
from bigdssm.commands import _stage, pretrain
from bigdssm.errors import ConfigError

CODES = "import os, sys; code = int(sys.argv[1:][int(os.environ['RANK'])])\n"
END = CODES + "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)"
HEAR = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
time.sleep(60)
"""


def ran(script: str, *arguments: object, stop: StopRequest | None = None, ranks: int = 2) -> int:
    command = [sys.executable, "-S", "-c", script, *map(str, arguments)]
    return run_ranks(command, ranks, stop or StopRequest(handle_signals=False), LauncherMonitor())


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((2, 2), 2), ((6, 1), 1), ((6, 4), 4), ((6, -9), 6), ((75, 6), 75), ((6, 6), 6)]
)
def test_the_exit_code_is_that_of_the_rank_that_ended_the_run(codes: tuple[int, int], code: int) -> None:
    assert ran(END, *codes) == code


def test_a_request_to_stop_reaches_all_ranks(tmp_path: Path) -> None:
    stop = StopRequest(handle_signals=False)

    def ask() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        stop.request()

    asking = threading.Thread(target=ask)
    asking.start()
    assert ran(HEAR, tmp_path, stop=stop) == 75
    asking.join()
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "KILL_AFTER_FAILURE_S", 0.2)
    began = time.monotonic()
    assert ran(CODES + "import time; sys.exit(code) if code else time.sleep(60)", 0, 3) == 3
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("gpus", "cores", "requested", "ranks", "accelerator", "threads"),
    [
        (0, 2, None, 1, "cpu", None),
        (0, 16, None, 4, "cpu", "4"),
        (0, 2, 2, 2, "cpu", "1"),
        (4, 16, None, 4, None, "4"),
        (16, 64, None, 6, None, "10"),  # data.lanes
    ],
)
def test_the_number_of_ranks_and_their_threads(
    tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch, gpus: int, cores: int, requested: int | None, ranks: int,
    accelerator: str | None, threads: str | None,
) -> None:  # fmt: skip
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    arguments = argparse.Namespace(
        config=tiny_interactions.config, overrides=["data.lanes=6", "pretrain.rows_global=60"], ranks=requested
    )
    assert _stage._prepare_ranks(arguments) == ranks
    assert (os.environ.get("DS_ACCELERATOR"), os.environ.get("OMP_NUM_THREADS")) == (accelerator, threads)


def test_more_ranks_than_gpus_are_refused(tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="--ranks 3: this machine has 2 GPUs"):
        _stage._prepare_ranks(argparse.Namespace(config=tiny_interactions.config, overrides=[], ranks=3))


def test_ranks_of_a_launcher_are_not_started_again(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_stage, "StopRequest", lambda: StopRequest(handle_signals=False))
    assert pretrain.main(["--config", "none.yaml", "--ranks", "3"]) == 2
    assert "--ranks 3: the launcher has started 2" in capsys.readouterr().err
