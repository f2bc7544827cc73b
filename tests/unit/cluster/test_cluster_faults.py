"""Fault injection, loss alerts, early signals, and detection of ended launchers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigdssm.cli import run_main
from bigdssm.cluster.launcher import LauncherMonitor, parent_of, state_of
from bigdssm.cluster.monitor import SpikeAlert
from bigdssm.cluster.signals import STOPPED_EARLY_MESSAGE, StopRequest
from bigdssm.errors import Preempted
from bigdssm.utils.log import default_logging
from tests.faults import sitecustomize as faults

# a rank that prints its lost ancestor, started by a process named like DeepSpeed's launcher under a runner
RANK = """
import sys, time
from bigdssm.cluster.launcher import LauncherMonitor
launcher = LauncherMonitor()
print(launcher.exited_ancestor(), flush=True)
until = time.monotonic() + 20
while launcher.exited_ancestor() is None and time.monotonic() < until:
    time.sleep(0.05)
print(launcher.exited_ancestor(), flush=True)
"""
EARLY_SIGNAL = """
import os, signal, time
from bigdssm.cluster.signals import StopRequest
StopRequest()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
DEEPSPEED_LAUNCH = "import subprocess, sys; subprocess.call(sys.argv[2:])"


@dataclass(frozen=True)
class Output:
    loss: torch.Tensor


@dataclass(frozen=True)
class Step:
    step: int


class Trainer:
    """A trainer without steps."""

    def __init__(self) -> None:
        self.store = SimpleNamespace()

    def train(self) -> SimpleNamespace:
        return self.store


def loss_function(encoded: object, batch: object) -> Output:
    return Output(torch.tensor(2.0))


def train_step(engine: object, batch: object, plan: object, loss_function: Any) -> torch.Tensor:
    return loss_function(None, batch).loss


def with_faults() -> SimpleNamespace:
    """Return a module like that of the trainer, with the faults of the environment."""
    module = SimpleNamespace(Trainer=type("OwnTrainer", (Trainer,), {}), train_step=train_step)
    faults.inject(module)  # type: ignore[arg-type]
    return module


def loss_of(module: SimpleNamespace, step: int) -> torch.Tensor:
    return module.train_step("engine", Step(step), "plan", loss_function)


def test_faults_are_read_and_refused() -> None:
    assert faults.parse("kill@3:1") == faults.Fault("kill", 3, 1)
    assert faults.parse(" term-runner@0 ") == faults.Fault("term-runner", 0, 0)
    for wrong in ("kill", "kill@x", "explode@3", "kill@3:"):
        with pytest.raises(ValueError, match="needs kind@step"):
            faults.parse(wrong)


def test_only_this_ranks_faults_strike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "nan@3:1,raise@4,spike@5:1")
    monkeypatch.setenv("RANK", "1")
    module = with_faults()
    assert [loss_of(module, step).item() for step in (2, 4, 5)] == [2.0, 2.0, 200.0]
    assert loss_of(module, 3).isnan()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="injected by"):
        loss_of(with_faults(), 4)


def test_without_faults_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    module = with_faults()
    assert module.train_step is train_step and module.Trainer.train is Trainer.train


def test_a_full_disk_strikes_in_its_checkpoint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "disk-full@8")
    store = with_faults().Trainer().train()
    store.between_files(4)
    with pytest.raises(OSError, match="No space left on device"):
        store.between_files(8)


def test_a_spike_is_logged_with_its_rows_and_noise_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alert = SpikeAlert(tmp_path, 3, 4)
    rows = torch.arange(20)
    torch.manual_seed(0)
    noise = 4.0 + 0.3 * torch.randn(500)
    for step, loss in enumerate(noise.tolist()):
        alert.after_step(step, loss, rows)
    alert.after_step(500, float("nan"), rows)
    assert not (tmp_path / "alerts-00003.jsonl").exists()
    alert.after_step(501, 9.0, rows)
    alert.after_step(502, 4.1, rows)
    (record,) = [json.loads(line) for line in (tmp_path / "alerts-00003.jsonl").read_text().splitlines()]
    assert (record["step"], record["loss"], record["row_ids"]) == (501, 9.0, list(range(20)))
    assert record["usual"] == pytest.approx(4.0, abs=0.1)


def test_a_loss_after_losses_of_zero_is_a_spike(tmp_path: Path) -> None:
    alert = SpikeAlert(tmp_path, 0, 1)
    for step in range(500):
        alert.after_step(step, 0.0, torch.arange(2))
    alert.after_step(500, 0.5, torch.arange(2))
    (record,) = [json.loads(line) for line in (tmp_path / "alerts-00000.jsonl").read_text().splitlines()]
    assert (record["loss"], record["usual"]) == (0.5, 0.0)


def test_a_constant_loss_that_moves_a_little_is_no_spike(tmp_path: Path) -> None:
    alert = SpikeAlert(tmp_path, 0, 1)
    for step in range(50):
        alert.after_step(step, 1.0, torch.arange(2))
    alert.after_step(50, 1.2, torch.arange(2))
    alert.after_step(51, 1.3, torch.arange(2))
    assert [json.loads(line)["step"] for line in (tmp_path / "alerts-00000.jsonl").read_text().splitlines()] == [51]


def test_alerts_are_truncated_to_the_resumed_checkpoint(tmp_path: Path) -> None:
    """Including those of removed ranks: two ranks resume a run of three."""
    for rank in range(3):
        lines = [json.dumps({"step": step, "loss": 9.0}) for step in (7, 8, 9)]
        (tmp_path / f"alerts-{rank:05d}.jsonl").write_text("\n".join(lines) + '\n{"step": 10, "lo')
    for rank in range(2):
        SpikeAlert(tmp_path, rank, 2, step=8)
    for rank in range(3):
        lines = (tmp_path / f"alerts-{rank:05d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [7, 8]


def test_a_signal_between_steps_is_remembered() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        StopRequest()
        stop = StopRequest()
        stop.defer_signals()
        assert not stop.any_rank_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.any_rank_requested()
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("rank", "message"), [("0", f"{STOPPED_EARLY_MESSAGE}\n"), ("1", "")])
def test_a_signal_before_the_first_step_is_logged_by_one_rank(rank: str, message: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", EARLY_SIGNAL],
        env=os.environ | {"RANK": rank},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (Preempted.exit_code, message)


@pytest.mark.parametrize("ends", ["launcher", "runner"])
def test_a_rank_sees_launcher_and_runner_end(ends: str) -> None:
    rank = [sys.executable, "-c", RANK]
    launch = [sys.executable, "-c", DEEPSPEED_LAUNCH, "deepspeed.launcher.launch", *rank]
    runner = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, time; subprocess.Popen({launch!r}); time.sleep(60)"],
        cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert runner.stdout is not None
    with runner.stdout as output:
        assert output.readline() == "None\n"
        children = Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()
        launcher = int(children[0])
        pid = launcher if ends == "launcher" else runner.pid
        os.kill(pid, signal.SIGKILL)
        if ends == "launcher":
            expected = f"the launcher (pid {launcher})\n"
        else:
            runner.wait()
            expected = f"the deepspeed runner (pid {runner.pid})\n"
        assert output.readline() == expected
    runner.kill()
    runner.wait()


def test_no_process_is_watched_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    launcher = LauncherMonitor()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launcher.exited_ancestor() is None
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    launcher = LauncherMonitor()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launcher.exited_ancestor() is not None


def test_states_of_processes() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert state_of(child.pid) in ("S", "R", "D") and parent_of(child.pid) == os.getpid()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert state_of(child.pid) == "Z"
    child.wait()
    assert state_of(child.pid) is None


def test_a_stop_on_request_is_no_error(capsys: Any) -> None:
    def stopped() -> None:
        raise Preempted("stopped on request after step 3, saved; go on with --resume auto")

    assert run_main(stopped) == 75
    assert capsys.readouterr().err == "stopped on request after step 3, saved; go on with --resume auto\n"


def test_a_program_without_logging_sees_the_lines_of_a_command(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger("bigdssm")
    for logger in (root, logging.getLogger()):
        monkeypatch.setattr(logger, "handlers", [])
    before = root.level, root.propagate
    with default_logging():
        root.info("step 1")
    assert capsys.readouterr().err == "[0] step 1\n"
    assert (root.level, root.propagate, root.handlers) == (*before, [])
