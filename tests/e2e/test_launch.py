"""Both stages from the command line: alone, on ranks, under torchrun or deepspeed; by file and by module."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bigdssm.distributed import free_port
from tests.distributed import small_run
from tests.e2e.runs import BIN, ROOT, environment

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("launch"))


def on_a_terminal(*command: str | Path, fault: str = "") -> tuple[int, str]:
    """Return the exit code and the output of a command on a terminal of 120 columns."""
    ours, terminal = pty.openpty()
    words = [str(part) for part in command]
    variables = environment(fault, COLUMNS="120", TERM="xterm")
    process = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=terminal, stderr=terminal)
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # how Linux tells that the last writer has ended
        while read := os.read(ours, 65_536):
            written += read
    os.close(ours)
    return process.wait(60), written.decode(errors="replace")


def start(*command: str | Path, fault: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment(fault), capture_output=True, text=True, timeout=240
    )


def deepspeed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return start(BIN / "deepspeed", "--num_gpus", "2", "--master_port", free_port(), *arguments)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]


def test_a_bad_key_is_reported_once_for_all_ranks(config: Path, tmp_path: Path) -> None:
    done = deepspeed("launch/pretrain.py", "--config", config, f"run.dir={tmp_path}/run", "pretrain.rows_globl=1")
    assert done.returncode == 2
    assert len(errors(done)) == 1
    assert "rows_globl" in errors(done)[0] and "did you mean pretrain.rows_global?" in errors(done)[0]
    assert not (tmp_path / "run").exists()


def test_validate_makes_a_batch_and_writes_nothing(config: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "bigdssm.commands.pretrain")
    done = start(*command, "--config", config, f"run.dir={tmp_path}/run", "--validate")
    assert done.returncode == 0, done.stderr
    assert "pretrain is valid" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pretraining_under_torchrun_then_fine_tuning_under_deepspeed(config: Path, tmp_path: Path) -> None:
    run_dir = f"run.dir={tmp_path}/run"
    tracked = "run.trackers=[tensorboard]"
    torchrun = (BIN / "torchrun", "--nproc-per-node", "2", "--master-port", free_port())
    done = start(*torchrun, "launch/pretrain.py", "--config", config, run_dir, tracked)
    assert done.returncode == 0, done.stderr
    pretrain = tmp_path / "run" / "pretrain"
    assert len(small_run.records(tmp_path / "run")) == 12
    assert list(pretrain.glob("tensorboard/**/events.*"))
    assert (pretrain / "best" / "model.safetensors").is_file()
    done = deepspeed("--module", "bigdssm.commands.sft", "--config", config, run_dir)
    assert done.returncode == 0, done.stderr
    assert "sft finished" in done.stderr
    assert len(small_run.records(tmp_path / "run", "sft")) == 4


def test_the_command_starts_ranks_and_ends_as_they_do(config: Path, tmp_path: Path) -> None:
    command = (BIN / "bigdssm", "pretrain", "--ranks", "2", "--config", config, f"run.dir={tmp_path}/run")
    code, written = on_a_terminal(
        *command, "pretrain.validate_every_steps=2", fault="term-launcher@5:1"
    )  # SIGTERM to it
    assert code == 75, written
    assert re.search(r"loss \d\.\d{4}  [\d,]+ rows/s  best NDCG@10 0\.\d{4}", written), written
    assert "  lr " not in written, "lines of health in addition to the bar"
    assert len(re.findall(r"stopped on request after step \d, saved; continue with --resume auto", written)) == 1
    assert not re.search("error|launch.py|real_accelerator", written)
    done = start(*command, "pretrain.validate_every_steps=2", "--resume", "auto", fault="kill@9:1")
    assert done.returncode == 6, done.stderr
    assert (
        "  lr " in done.stderr
        and "rank 1 was ended by SIGKILL" in done.stderr
        and "on 2 ranks, from step" in done.stderr
    )
