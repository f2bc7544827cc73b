"""Checkpoints: whole or not there, verified, damage named, the newest good one used."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from bigdssm.artifacts import checkpoint
from bigdssm.artifacts.checkpoint import CheckpointStore, find, verify
from bigdssm.errors import CheckpointError


def share() -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.arange(512.0), "exp_avg/layer.weight": torch.ones(512)}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 15):
        store.save(step, {"step": step}, {"shared": torch.arange(3)}, {"cpu": torch.arange(4)}, share)
    return store


def test_the_newest_two_are_kept_and_read_back(store: CheckpointStore) -> None:
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["latest", "step-00000010", "step-00000015"]
    assert (store.folder / "latest").read_text() == "step-00000015"
    newest = store.newest_good()
    assert newest is not None and newest.step == 15 and newest.state == {"step": 15}
    assert torch.equal(newest.rank_state(0)["cpu"], torch.arange(4))
    assert torch.equal(newest.common_tensors()["shared"], torch.arange(3))
    assert torch.equal(newest.reader()("exp_avg/layer.weight"), torch.ones(512))
    assert list(newest.reader().weights()) == ["layer.weight"]
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        newest.reader()("other")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda step: flip(step / "tensors-00000.safetensors"), "tensors-00000.safetensors is damaged"),
        (lambda step: (step / "tensors-00000.safetensors").unlink(), "tensors-00000.safetensors is missing"),
        (lambda step: (step / "common.safetensors").unlink(), "common.safetensors is missing"),
        (lambda step: (step / "rank-00000.safetensors").write_bytes(b"short"), "has 5 bytes"),
        (lambda step: (step / "manifest.json").unlink(), "never finished"),
        (lambda step: (step / "manifest.json").write_text("{"), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: object, words: str
) -> None:
    damage(store.folder / "step-00000015")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=words):
        verify(store.folder / "step-00000015")
    logging.getLogger("bigdssm").propagate = True
    newest = store.newest_good()
    assert newest is not None and newest.step == 10
    assert words in caplog.text


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, {"step": step}, {}, {}, share)


def test_what_a_run_saves_behind_damaged_ones_is_kept(store: CheckpointStore) -> None:
    """By step they are the oldest: where damaged ones counted, each would be dropped as soon as it was written."""
    for step in (10, 15):
        flip(store.folder / f"step-{step:08d}" / "tensors-00000.safetensors")
    (store.folder / "step-of-somebody-else").mkdir()
    assert store.newest_good() is None
    for step in (1, 2, 3):
        save(store, step)
    names = sorted(path.name for path in store.folder.iterdir())
    kept = ["damaged-step-00000010", "damaged-step-00000015", "latest", "step-00000002", "step-00000003"]
    assert names == [*kept, "step-of-somebody-else"]
    newest = store.newest_good()
    assert newest is not None and newest.step == 3


@pytest.mark.parametrize(
    ("function", "calls"),
    [("os.replace", 1), ("shutil.rmtree", 0)],
    ids=["the old one moved away", "the new one in its place"],
)
def test_killed_while_a_step_is_saved_again(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, function: str, calls: int
) -> None:
    real, done = {"os.replace": os.replace, "shutil.rmtree": shutil.rmtree}[function], []

    def killed(*paths: Path, **_: object) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(paths)
        real(*paths)  # type: ignore[operator]

    with monkeypatch.context() as patch:
        patch.setattr(f"bigdssm.atomic.{function}", killed)
        with pytest.raises(KeyboardInterrupt):
            save(store, 15)
    assert list(store.folder.glob(".*.replaced"))
    newest = store.newest_good()
    assert newest is not None and newest.step == 15
    assert not list(store.folder.glob(".*.replaced"))


def test_a_file_that_cannot_be_read_is_damage(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.file_checksum

    def broken(path: Path, *between: int) -> str:
        if path.parent.name == "step-00000015":
            raise OSError(5, "Input/output error")
        return whole(path, *between)

    with monkeypatch.context() as patch:
        patch.setattr("bigdssm.artifacts.checkpoint.file_checksum", broken)
        newest = store.newest_good()
    assert newest is not None and newest.step == 10


def test_latest_is_never_needed(store: CheckpointStore) -> None:
    (store.folder / "latest").unlink()
    newest = store.newest_good()
    assert newest is not None and newest.step == 15


def test_a_failed_save_leaves_what_was_there(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bigdssm.artifacts.checkpoint.save_file", full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            store.save(20, {"step": 20}, {}, {}, share)
    newest = store.newest_good()
    assert newest is not None and newest.step == 15
    store.save(20, {"step": 20}, {}, {}, share)
    assert not list(store.folder.glob(".*"))


def test_find_names_what_there_is(store: CheckpointStore) -> None:
    assert find(store.folder.parent, "latest").name == "step-00000015"
    with pytest.raises(CheckpointError, match="step-00000010"):
        find(store.folder.parent, "step-3")
