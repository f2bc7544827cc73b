"""Lock of a stage folder, its start and end records, and stop requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigdssm.cluster import run_folder
from bigdssm.cluster.run_folder import FolderLock, find_running, is_locked, lock_holder, read_events, request_stop
from bigdssm.commands import stop_run
from bigdssm.errors import CheckpointError, Preempted
from bigdssm.utils.log import MetricsWriter

HOLDER = """
import sys, time
from pathlib import Path
from bigdssm.cluster.run_folder import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A stage folder in which another process trains."""
    folder = tmp_path / "run" / "pretrain"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_with_the_holder_of_the_folder(
    held: tuple[Path, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, process = held
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.2)
    with pytest.raises(CheckpointError, match=rf"in use by pid {process.pid} on .*, since 2.*; stop that run"):
        FolderLock(folder).__enter__()
    assert is_locked(folder) and find_running(folder.parent) == folder
    assert (lock_holder(folder) or {})["pid"] == process.pid


def test_a_killed_run_leaves_the_folder_free(held: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = held
    process.kill()
    process.wait()
    assert not is_locked(folder)
    with FolderLock(folder):
        assert (lock_holder(folder) or {})["pid"] == os.getpid()
    assert lock_holder(folder) is None
    with pytest.raises(CheckpointError, match=r"no stage of .* is running; bigdssm watch_run"):
        find_running(folder.parent)
    with pytest.raises(CheckpointError, match="is neither a run folder nor a stage folder"):
        find_running(folder.parent / "none")


def test_the_end_is_noted_with_its_exit_code(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        pass
    with pytest.raises(Preempted), FolderLock(tmp_path):
        raise Preempted("stopped on\nrequest")
    with pytest.raises(ValueError), FolderLock(tmp_path):
        raise ValueError
    ends = [(event["exit_code"], event["reason"]) for event in read_events(tmp_path)]
    assert ends == [(0, "finished"), (75, "stopped on request"), (1, "ValueError")]


def test_an_unanswered_stop_request_remains_and_saves_by_default(
    held: tuple[Path, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, process = held
    for options, request in (([], "save\n"), (["--now"], "now\n")):
        assert stop_run.main([str(folder), "--timeout-s", "0.3", *options]) == CheckpointError.exit_code
        assert f"pid {process.pid} " in (error := capsys.readouterr().err) and "has not stopped within 0 s" in error
        assert (folder / run_folder.STOP_FILE).read_text() == request
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert request_stop(folder, saving=True, timeout_s=1.0)["reason"] == "ended without saving"


def test_an_old_request_does_not_stop_the_next_run(tmp_path: Path) -> None:
    (tmp_path / run_folder.STOP_FILE).write_text("save")
    with FolderLock(tmp_path):
        assert not (tmp_path / run_folder.STOP_FILE).exists()


def test_a_record_after_a_truncated_line_is_retained(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start", "st')
    writer = MetricsWriter(tmp_path / "events.jsonl")
    writer.write({"event": "end"})
    writer.close()
    assert read_events(tmp_path) == [{"event": "end"}]


def test_the_checksum_of_the_code_sees_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bigdssm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "loop.py").write_text("a = 1\n")
    monkeypatch.setattr(sys.modules["bigdssm"], "__file__", str(package / "__init__.py"))
    before = run_folder.code_checksum()
    assert run_folder.code_checksum() == before
    (package / "loop.py").write_text("a = 2\n")
    assert run_folder.code_checksum() != before
