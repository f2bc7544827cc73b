"""Checkpoints: atomic, verified, damage is reported, the newest valid one is used."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigdssm.checkpoints import checkpoint as checkpoint_module
from bigdssm.checkpoints.checkpoint import (
    TensorPiece,
    assign_blocks,
    even_share,
    find_checkpoint,
    open_tensors,
    verify,
    whole_tensor,
    write_share,
)
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.errors import CheckpointError
from bigdssm.utils import atomic


def pieces() -> list[TensorPiece]:
    return [
        whole_tensor("layer.weight", torch.arange(512.0).view(2, 256)),
        whole_tensor("exp_avg/layer.weight", torch.ones(2, 256)),
    ]


def save(
    store: CheckpointStore, step: int, between: Callable[[int], object] = lambda step: None, **options: object
) -> None:
    store.between_files = between  # type: ignore[assignment]
    common, rank_state = {"shared": torch.arange(3)}, {"cpu": torch.arange(4)}
    store.save(step, {"step": step}, common, rank_state, pieces(), **options)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 15):
        save(store, step)
    return store


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def test_the_newest_two_are_retained_and_read_back(store: CheckpointStore) -> None:
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["latest", "step-00000010", "step-00000015"]
    assert (store.folder / "latest").read_text() == "step-00000015"
    newest = store.newest_valid()
    assert newest is not None and newest.step == 15 and newest.state == {"step": 15}
    assert newest.rank_state is not None and torch.equal(newest.rank_state["cpu"], torch.arange(4))
    assert torch.equal(newest.common_tensors()["shared"], torch.arange(3))
    assert torch.equal(newest.reader()("exp_avg/layer.weight"), torch.ones(2, 256))
    assert list(newest.reader().weights()) == ["layer.weight"]
    assert torch.equal(open_tensors(newest.path)("layer.weight"), torch.arange(512.0).view(2, 256))
    assert torch.equal(load_file(newest.path / "tensors-00000.safetensors")["layer.weight"], torch.arange(512.0))
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
        (lambda step: (step / "rank-00000.safetensors").write_bytes(b"short"), "has 5 bytes"),
        (lambda step: (step / "manifest.json").unlink(), "not completed"),
        (lambda step: (step / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda step: edit(step / "manifest.json", '"step": 15', '"step": 14'), "does not match its checksum"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: object, words: str
) -> None:
    damage(store.folder / "step-00000015")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=words):
        verify(store.folder / "step-00000015")
    logging.getLogger("bigdssm").propagate = True
    newest = store.newest_valid()
    assert newest is not None and newest.step == 10
    assert words in caplog.text


def test_checkpoints_saved_after_damaged_ones_are_retained(store: CheckpointStore) -> None:
    """By step they are the oldest: if damaged ones counted, each would be removed as soon as it was written."""
    for step in (10, 15):
        flip(store.folder / f"step-{step:08d}" / "tensors-00000.safetensors")
    (store.folder / "step-of-somebody-else").mkdir()
    assert store.newest_valid() is None
    for step in (1, 2, 3):
        save(store, step)
    names = sorted(path.name for path in store.folder.iterdir())
    kept = ["damaged-step-00000010", "damaged-step-00000015", "latest", "step-00000002", "step-00000003"]
    assert names == [*kept, "step-of-somebody-else"]
    newest = store.newest_valid()
    assert newest is not None and newest.step == 3


@pytest.mark.parametrize(
    ("function", "calls", "exchanges"),
    [("os.replace", 3, False), ("_exchange", 0, True), ("shutil.rmtree", 0, True), ("shutil.rmtree", 0, False)],
    ids=["the old one moved away", "before the exchange", "the new one in its place", "the same without an exchange"],
)
def test_killed_while_a_step_is_saved_again(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, function: str, calls: int, exchanges: bool
) -> None:
    functions = {"os.replace": os.replace, "shutil.rmtree": shutil.rmtree, "_exchange": atomic._exchange}
    real, done = functions[function], []

    def killed(*paths: Path, **_: object) -> object:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(paths)
        return real(*paths)  # type: ignore[operator]

    with monkeypatch.context() as patch:
        if not exchanges:
            patch.setattr(atomic, "_exchange", lambda one, other: False)
        patch.setattr(f"bigdssm.utils.atomic.{function}", killed)
        with pytest.raises(KeyboardInterrupt):
            save(store, 15)
    assert list(store.folder.glob(".*.replaced"))
    newest = store.newest_valid()
    assert newest is not None and newest.step == 15
    assert not list(store.folder.glob(".*.replaced"))


def test_a_file_that_cannot_be_read_is_damage(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent.name == "step-00000015" and path.suffix == ".safetensors":
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        newest = store.newest_valid()
    assert newest is not None and newest.step == 10


def test_latest_is_never_needed(store: CheckpointStore) -> None:
    (store.folder / "latest").unlink()
    newest = store.newest_valid()
    assert newest is not None and newest.step == 15


def full_disk(step: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_the_existing_checkpoints(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(store, 20, between=full_disk)
    newest = store.newest_valid()
    assert newest is not None and newest.step == 15
    save(store, 20)
    assert not list(store.folder.glob(".*"))


def test_a_full_disk_in_the_middle_of_a_file(store: CheckpointStore) -> None:
    script = (
        "import resource, sys\nfrom tests.unit.checkpoints.test_store import *\n"
        "store = CheckpointStore(Path(sys.argv[1]), keep=2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))\nsave(store, 20)\n"
    )
    command = [sys.executable, "-c", script, str(store.folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert "could not write a checkpoint" in done.stderr and "File too large" in done.stderr
    newest = store.newest_valid()
    assert newest is not None and newest.step == 15


def test_a_background_save_holds_its_step_and_is_visible_when_complete(store: CheckpointStore) -> None:
    """Later changes by training are not in it, and it is not visible before all files are synced."""
    half, goes_on, tensor, state = threading.Event(), threading.Event(), torch.zeros(3), {"step": 20}

    def wait(step: int) -> None:
        half.set()
        goes_on.wait(60)

    store.between_files = wait
    store.save(
        20,
        state,
        {"average": tensor},
        {"cpu": tensor},
        [whole_tensor("weight", tensor)],
        in_background=True,
    )
    tensor += 1
    state["step"] = 21
    assert half.wait(60)
    assert (store.folder / "latest").read_text() == "step-00000015" and not store.has_failed()
    assert find_checkpoint(store.folder.parent, "latest").name == "step-00000015"
    goes_on.set()
    save(store, 25)  # waits for it
    shutil.rmtree(store.folder / "step-00000025")
    newest = store.newest_valid()
    assert newest is not None and newest.state == {"step": 20} and newest.rank_state is not None
    read = (newest.reader()("weight"), newest.common_tensors()["average"], newest.rank_state["cpu"])
    assert not any(values.any() for values in read)


def test_a_failed_background_save_raises_on_wait(store: CheckpointStore) -> None:
    save(store, 20, in_background=True, between=full_disk)
    threads = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    for thread in threads:
        thread.join(60)
    assert store.has_failed()
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(store, 25)
    assert not store.has_failed()
    save(store, 25)
    assert find_checkpoint(store.folder.parent, "latest").name == "step-00000025"


def test_leaving_the_store_waits_for_background_saves(store: CheckpointStore) -> None:
    slow = threading.Event()
    with pytest.raises(ValueError), store:
        save(store, 20, in_background=True, between=lambda step: slow.wait(0.3))
        raise ValueError
    assert find_checkpoint(store.folder.parent, "latest").name == "step-00000020"


def test_a_flipped_byte_anywhere_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "BLOCK", 64)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    save(store, 5)
    folder = store.folder / "step-00000005"
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for place in range(0, len(good), 37):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
                verify(folder)
        file.write_bytes(good)
    assert store.newest_valid() is not None


def test_every_tensor_is_shared_out_evenly_and_every_block_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "BLOCK", 64)
    tensors = [("a", torch.arange(7, dtype=torch.int64)), ("b", torch.randn(100, 3)), ("c", torch.ones(()).bool())]
    total = sum(tensor.nbytes for _, tensor in tensors)
    for world_size in (1, 2, 3, 5):
        parts = [even_share(tensors, rank, world_size) for rank in range(world_size)]
        for name, tensor in tensors:
            found = [piece for part in parts for piece in part if piece.name == name]
            assert torch.equal(torch.cat([piece.values for piece in found]), tensor.reshape(-1))
        assert all(abs(sum(p.values.nbytes for p in part) - total / world_size) <= 16 for part in parts)
        files = [write_share(tmp_path / f"{rank}", rank, part)[0] for rank, part in enumerate(parts)]
        for readers in (1, 2, 3, 7):
            blocks = [
                (share.file, number)
                for rank in range(readers)
                for share, first, last in assign_blocks(files, rank, readers)
                for number in range(first, last)
            ]
            assert blocks == [(share.file, number) for share in files for number in range(len(share.xxh3_128))]


def test_find_names_the_existing_checkpoints(store: CheckpointStore) -> None:
    assert find_checkpoint(store.folder.parent, "latest").name == "step-00000015"
    with pytest.raises(CheckpointError, match="step-00000010"):
        find_checkpoint(store.folder.parent, "step-3")
