"""The guarantees of docs/faults.md under the usual launchers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigdssm.distributed import free_port
from tests.distributed import small_run
from tests.e2e.runs import BIN, ROOT, Run, environment, launcher

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.alone]

KUBERNETES_GRACE_S = 30.0
NEVER_ENDING = ("pretrain.steps=100000", "pretrain.log_every_steps=1000000")
STEADY = (
    "pretrain.save_every_steps=4", "pretrain.keep_checkpoints=3", "debug.log_row_ids=true", "data.num_workers=1",
    "engine.peer_timeout_s=60",  # less than `Run.wait`: a hang is reported first
    "model.query.history.dropout=0.1", "model.doc.dropout=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("survival"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run folder; checks that no process of a run in it remains."""
    yield tmp_path / "run"
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"run.dir={tmp_path}".encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.mark.parametrize(
    ("name", "fault", "codes"),
    [
        ("deepspeed", "term-runner@9", {143, -15}),
        ("deepspeed", "term-launcher@9:1", {1}),
        ("deepspeed", "kill-launcher@9:1", {0}),  # DeepSpeed's runner treats a killed launcher as a success
        ("torchrun", "term@9:1", {1}),  # torchrun returns 1 for any failure
        ("torchrun", "kill-launcher@9", {137, -9}),
        ("--ranks", "kill-launcher@9:1", {-9}),
    ],
)
def test_a_stop_signal_to_any_process_saves_and_ends_all_ranks_in_time(
    config: Path, folder: Path, name: str, fault: str, codes: set[int]
) -> None:
    arguments = (*NEVER_ENDING, "data.num_workers=1", "engine.peer_timeout_s=60")
    arguments += ("--ranks", "2") if name == "--ranks" else ()
    run = Run(folder, config, *arguments, command=launcher(name), variables=environment(fault))
    run.wait_for("BIGDSSM_TEST_FAULT: ")
    struck = time.monotonic()
    assert run.wait() in codes, run.log
    run.wait_for_orphans(KUBERNETES_GRACE_S)
    assert time.monotonic() - struck < KUBERNETES_GRACE_S
    assert [(event["event"], event.get("exit_code")) for event in run.events()] == [("start", None), ("end", 75)]
    step = int(re.findall(r"stopped on request after step (\d+), saved", run.log)[0])
    assert run.checkpoints() == ["latest", f"step-{step:08d}"]


def test_a_stop_signal_to_one_rank_gives_the_documented_exit_code(config: Path, folder: Path) -> None:
    run = Run(folder, config, *NEVER_ENDING, variables=environment("term@9:1"))
    assert run.wait() == 75, run.log
    run.wait_for_orphans(1)


def test_a_stopped_rank_ends_the_run_within_its_timeout(config: Path, folder: Path) -> None:
    arguments = (*NEVER_ENDING, "engine.peer_timeout_s=10")
    run = Run(folder, config, *arguments, variables=environment("stop@9:0"))
    run.wait_for("BIGDSSM_TEST_FAULT: stop")
    struck = time.monotonic()
    assert run.wait() in (6, 247), run.log  # the launcher returns the code of the first rank to end
    run.wait_for_orphans(5)
    assert time.monotonic() - struck < 10 + 15
    assert re.search(r"rank 0 \(pid \d+ on \S+\) has been stopped", run.errors[0])
    assert "in all_gather" in run.log or "in all_reduce" in run.log  # the stacks
    assert run.checkpoints() == []


def test_torchrun_restarts_dead_ranks(config: Path, folder: Path) -> None:
    arguments = ("pretrain.steps=200", "pretrain.save_every_steps=5", "--resume", "auto")
    endpoint = f"127.0.0.1:{free_port()}"
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    variables = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    run = Run(folder, config, *arguments, command=command, variables=variables)
    run.wait_for("wrote the checkpoint")
    os.kill(run.events()[0]["pid"], signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert [(event["event"], event.get("exit_code")) for event in run.events()] == [
        ("start", None), ("start", None), ("end", 0)
    ]  # fmt: skip
    assert run.events()[1]["step"] >= 5 and max(run.checkpoints()) == "step-00000200"


EXPECTED = [  # fault, exit codes, sentence, step of the newest checkpoint
    ("kill@6:1", {6, 247}, r"rank 1 \(pid \d+ on \S+\) has ended without an error message", 4),
    ("kill-save@8:1", {6, 247}, r"rank 1 \(pid \d+ on \S+\) has ended without an error message", 4),
    ("disk-full@8:1", {4, 6}, "could not write a checkpoint in .*No space left.*the last valid one is kept", 4),
    ("term@17", {75}, "stopped on request after step 18, saved", 18),
]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_goes_through_damage_of_every_kind_to_the_same_bits(config: Path, folder: Path) -> None:
    """Killed in a step or a save, disk full; then a flipped byte, truncated and lost files, no `latest`."""
    command, steady = launcher("--ranks"), (*STEADY, "pretrain.steps=20", "--ranks", "2")
    whole = Run(folder.with_name("whole"), config, *steady, command=command)
    assert whole.wait() == 0, whole.log
    arguments = (*steady, "--resume", "auto")
    for fault, codes, sentence, step in EXPECTED:
        # in the background, the checkpoint of step 4 could be unfinished at step 6
        waiting = ["engine.async_checkpoints=false"] if fault.startswith("kill@") else []
        run = Run(folder, config, *arguments, *waiting, command=command, variables=environment(fault))
        assert run.wait() in codes, run.log
        assert re.search(sentence, run.log), run.log
        assert max(run.checkpoints()) == f"step-{step:08d}"
    checkpoints = folder / "pretrain" / "checkpoints"
    assert run.checkpoints() == ["latest", "step-00000012", "step-00000016", "step-00000018"]
    flip_a_byte(checkpoints / "step-00000018/tensors-00001.safetensors")
    (checkpoints / "step-00000016/tensors-00000.safetensors").write_bytes(b"short")
    (checkpoints / "latest").unlink()
    run = Run(folder, config, *arguments, command=command, variables=environment("raise@14"))
    assert run.wait() in (1, 6), run.log
    assert "a block is truncated or does not match its checksum; trying the previous checkpoint" in run.log
    assert re.search(r"tensors-00000.safetensors has 5 bytes, was \d+; trying the previous checkpoint", run.log)
    assert f"continues from {checkpoints / 'step-00000012'}" in run.log
    (checkpoints / "step-00000012" / "rank-00000.safetensors").unlink()
    (checkpoints / "latest").write_text("")
    (checkpoints / "step-00000099").mkdir()
    run = Run(folder, config, *arguments, command=command)
    assert run.wait() == 0, run.log
    assert "step-00000099 has no manifest.json" in run.log and "rank-00000.safetensors is missing" in run.log
    assert "continues from" not in run.log  # no valid checkpoint: a new start
    assert_same_bits(folder, whole.folder)


def assert_same_bits(folder: Path, whole: Path) -> None:
    first, second = (load_file(run / "pretrain" / "best" / "model.safetensors") for run in (folder, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("row_ids-00000.jsonl", "row_ids-00001.jsonl"):
        assert (folder / "pretrain" / name).read_text() == (whole / "pretrain" / name).read_text()


def test_one_run_a_folder_and_a_stop_from_outside(config: Path, folder: Path) -> None:
    first = Run(folder, config, *NEVER_ENDING)
    first.wait_for("from step 0")
    second = Run(folder, config, *NEVER_ENDING, "--resume", "auto")
    assert second.wait() in (4, 6), second.log
    refused = [line for line in second.errors if "is in use by pid" in line]
    assert refused and "stop that run (bigdssm stop_run)" in refused[0], second.log
    assert first.process.poll() is None
    stop = [sys.executable, "tools/stop_run.py", str(folder)]
    done = subprocess.run(stop, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "saved; continue with --resume auto" in done.stdout, done.stderr
    assert first.wait(30) == 75, first.log
    again = subprocess.run(stop, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 4 and "is running; bigdssm watch_run" in again.stderr
    third = Run(folder, config, *NEVER_ENDING, "--resume", "auto")
    third.wait_for("continues from")
    third.wait_for("steps of 96 rows on")
    done = subprocess.run([*stop, "--now"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ended without saving" in done.stdout, done.stderr
    assert third.wait(60) == 143
    third.wait_for_orphans(5)


def test_a_busy_master_port_gives_a_one_line_error(config: Path, folder: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        run = Run(folder, config, command=launcher("deepspeed", port))
        assert run.wait(90) == 2, run.log
    assert f"the master port at 127.0.0.1:{port} is in use; pass a free one to the launcher" in run.errors[0]
    run.wait_for_orphans(5)
    assert not folder.exists()


def test_nothing_is_compiled(config: Path, folder: Path, tmp_path: Path) -> None:
    """Two ranks without a compiler and without compiled extensions, also with an offloaded optimizer."""
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("python", "python3"):
        (bare / tool).symlink_to(BIN / tool)
    extensions = tmp_path / "extensions"
    variables = environment(
        PATH=str(bare), TORCH_EXTENSIONS_DIR=str(extensions), CC="/nowhere/cc", CXX="/nowhere/c++", HOME=str(tmp_path)
    )
    run = Run(folder, config, "pretrain.steps=3", "engine.offload_optimizer=true", variables=variables)
    assert run.wait() == 0, run.log
    assert not list(extensions.rglob("*.so")) and not list((tmp_path / ".cache").rglob("*.so"))
