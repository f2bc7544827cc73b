"""Copies of a run in an object store: complete checkpoints alone, from which a run resumes with the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import bigdssm
from bigdssm.commands.mirror_run import main
from tests.distributed import small_run
from tests.object_store import Bucket, emulated_bucket

pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
ROOT = Path(__file__).resolve().parents[2]
EIGHT = ["pretrain.steps=8", "pretrain.epochs=0", "pretrain.save_every_steps=2", "pretrain.keep_checkpoints=9"]
# A copy that waits, without an end, before the manifest of a checkpoint is copied.
STALLED = """
import sys, time
import s3fs
from bigdssm.commands.mirror_run import main
put = s3fs.S3FileSystem.put_file
def stalling(self, source, target, **options):
    if target.endswith("manifest.json"):
        print("before the manifest", flush=True)
        time.sleep(600)
    return put(self, source, target, **options)
s3fs.S3FileSystem.put_file = stalling
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with emulated_bucket(monkeypatch) as emulated:
        yield emulated


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("mirrored"))


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    bigdssm.pretrain(config, [f"run.dir={run}", *EIGHT])
    return run


def until(uninterrupted: Path, step: int, run: Path) -> Path:
    """Make `run` the folder of a run that is in the steps after `step`."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "pretrain/best")
    for later in range(step + 2, 9, 2):
        shutil.rmtree(run / f"pretrain/checkpoints/step-{later:08d}")
    return run


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "pretrain/best/model.safetensors")


def test_a_run_resumes_elsewhere_from_its_copy(
    config: Path, uninterrupted: Path, tmp_path: Path, bucket: Bucket
) -> None:
    """The machine is lost during the copy of step 4, before its manifest."""
    here, there, url = tmp_path / "here", tmp_path / "there", f"{bucket.url}/run"
    assert main(["push", str(until(uninterrupted, 2, here)), url]) == 0
    command = [sys.executable, "-c", STALLED, "push", str(until(uninterrupted, 4, here)), url]
    with subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, text=True) as copying:
        assert copying.stdout is not None and copying.stdout.readline() == "before the manifest\n"
        copying.kill()
    assert any("step-00000004" in name for name in bucket.files.find("bucket/run/pretrain/checkpoints"))
    assert main(["pull", url, str(there)]) == 0
    assert [path.name for path in (there / "pretrain/checkpoints").iterdir()] == ["step-00000002"]
    bigdssm.pretrain(config, [f"run.dir={there}", *EIGHT], resume=True)
    assert [record["step"] for record in small_run.records(there)] == list(range(1, 9))
    expected, found = weights(uninterrupted), weights(there)
    assert all(found[name].equal(expected[name]) for name in expected)
    (there / "pretrain/checkpoints/step-00000002").rename(tmp_path / "moved")
    assert main(["pull", url, str(there)]) == 0  # a folder with checkpoints is left as it is
    assert not (there / "pretrain/checkpoints/step-00000002").exists()


def test_old_copies_are_removed_and_a_damaged_one_is_refused(
    uninterrupted: Path, tmp_path: Path, bucket: Bucket
) -> None:
    url, checkpoints = f"{bucket.url}/run", "bucket/run/pretrain/checkpoints"
    for step in (2, 4, 6):
        assert main(["push", str(until(uninterrupted, step, tmp_path / "run")), url, "--keep", "1"]) == 0
    assert {name.split("/")[4] for name in bucket.files.find(checkpoints)} == {"step-00000006"}
    tensors = bucket.files.glob(f"{checkpoints}/step-00000006/*.safetensors")[0]
    bucket.files.pipe_file(tensors, bucket.files.cat_file(tensors)[:-1] + b"x")
    assert main(["pull", url, str(tmp_path / "there")]) == 4
    assert not (tmp_path / "there/pretrain/checkpoints/step-00000006").exists()


@pytest.mark.parametrize("arguments", [["push", "s3://a/b", "run"], ["pull", "run", "s3://a/b"], ["pull", "a", "b"]])
def test_a_wrong_order_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    order = "push RUN URL" if arguments[0] == "push" else "pull URL RUN"
    assert f"needs {order}" in capsys.readouterr().err
