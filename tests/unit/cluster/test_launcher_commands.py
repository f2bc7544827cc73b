"""Commands in subprocesses: log and resource use are recorded, and they end with the process that waits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigdssm.cluster.launcher import run_command


def test_output_and_time_of_a_command_are_recorded(tmp_path: Path) -> None:
    log = tmp_path / "made" / "log"
    ended = run_command(log, "inspect_shards", "--help")
    ended.check()
    once = log.read_text()
    assert "--verify" in once and ended.seconds > 0 and ended.cpu_seconds > 0.01
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero exit status 2") as failed:
        run_command(log, "inspect_shards", "--nonsense").check()
    assert failed.value.cmd[-1] == f"# see {log}"
    assert log.read_text().startswith(once) and "are required: dataset" in log.read_text()


def test_an_interrupted_command_is_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remembered(*arguments: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **keywords))
        return started[-1]

    def interrupt(pid: int, options: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remembered)
    monkeypatch.setattr(os, "wait4", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_command(tmp_path / "log", "estimate", "--help")
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)
