"""Checkpoints: whole or not there, verified, damage named, the newest good one used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from bigdssm.checkpoint import CheckpointStore, find, verify
from bigdssm.errors import CheckpointError


def write_engine(path: Path) -> None:
    (path / "deepspeed").mkdir()
    (path / "deepspeed" / "weights.pt").write_bytes(bytes(range(256)) * 8)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 15):
        store.save(step, {"step": step}, {"cpu": torch.arange(4)}, write_engine)
    return store


def test_the_newest_two_are_kept_and_read_back(store: CheckpointStore) -> None:
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["latest", "step-00000010", "step-00000015"]
    assert (store.folder / "latest").read_text() == "step-00000015"
    newest = store.newest_good()
    assert newest is not None and newest.step == 15 and newest.state == {"step": 15}
    assert torch.equal(newest.rank_state(0)["cpu"], torch.arange(4))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda step: flip(step / "deepspeed" / "weights.pt"), "weights.pt is damaged"),
        (lambda step: (step / "deepspeed" / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda step: (step / "rank-00000.pt").write_bytes(b"short"), "has 5 bytes"),
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


def test_latest_is_never_needed(store: CheckpointStore) -> None:
    (store.folder / "latest").unlink()
    newest = store.newest_good()
    assert newest is not None and newest.step == 15


def test_a_failed_save_leaves_what_was_there(store: CheckpointStore) -> None:
    def full_disk(path: Path) -> None:
        write_engine(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        store.save(20, {"step": 20}, {}, full_disk)
    newest = store.newest_good()
    assert newest is not None and newest.step == 15
    store.save(20, {"step": 20}, {}, write_engine)
    assert not list(store.folder.glob(".*"))


def test_find_names_what_there_is(store: CheckpointStore) -> None:
    assert find(store.folder.parent, "latest").name == "step-00000015"
    with pytest.raises(CheckpointError, match="step-00000010"):
        find(store.folder.parent, "step-3")
