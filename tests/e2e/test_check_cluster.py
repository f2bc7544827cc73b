"""The check of a cluster: two ranks of this machine, and the sentence of each failure."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigdssm import distributed
from bigdssm.cluster.run_folder import RUNNING_FILE
from bigdssm.commands import check_cluster
from bigdssm.commands.check_cluster import check_folder, facts_of, version_error
from bigdssm.errors import ConfigError, PeerError
from tests.distributed.spawn import run_ranks

ROOT = Path(__file__).resolve().parents[2]
HERE = torch.device("cpu")


@pytest.mark.e2e
@pytest.mark.slow
def test_the_launcher_checks_two_ranks(tmp_path: Path) -> None:
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    port = ["--master_port", str(distributed.free_port())]
    command = [*deepspeed, *port, "launch/check_cluster.py", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 1: " in done.stdout and "all-reduce: " in done.stdout
    assert f"{tmp_path}: shared by all ranks, with locks and atomic renames" in done.stdout
    assert not list(tmp_path.iterdir())


def test_other_versions_are_named() -> None:
    facts = facts_of(HERE)
    older = replace(facts, host="node2", versions={**facts.versions, "torch": "1.0"})
    assert version_error([facts, facts]) is None
    error = version_error([facts, facts, older])
    assert error is not None
    assert f"torch is 1.0 on node2 (rank 2) and {facts.versions['torch']} on {facts.host} (rank 0)" in str(error)


def on_a_folder(rank: int, world_size: int, folder: str, fault: str) -> str:
    """Check a folder with a fault on rank 1; return the error."""
    if fault == "not shared" and rank == 1:
        folder += "-elsewhere"
    if fault == "no locks":
        check_cluster.is_locked = lambda trial: False
    if fault == "no atomic renames":
        check_cluster.write_json = lambda file, content: file.write_text("{")
    try:
        check_folder(Path(folder))
    except ConfigError as error:
        return str(error)
    except PeerError:
        return "peer"
    return ""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("", ""),
        ("not shared", "has no file that rank 0 has written there"),
        ("no locks", "does not show the lock of rank 0"),
        ("no atomic renames", "shows an incomplete file"),
    ],
)
def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, fault: str, words: str) -> None:
    errors = run_ranks(on_a_folder, 2, (str(tmp_path / "shared"), fault))
    assert words in errors[1] and bool(errors[1]) == bool(fault)
    assert not list((tmp_path / "shared").glob(f"*/{RUNNING_FILE}"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="needs a folder in which rank 0 can write"):
        check_folder(tmp_path / "file")
