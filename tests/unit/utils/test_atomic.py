"""Atomic writes: complete or absent, synced before the rename, and no temporary files left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import check_file_to_write
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import BigDSSMError, ConfigError
from bigdssm.retrieval.vectors import read_meta
from bigdssm.utils import atomic


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of synced files in order, and the negative inodes of renamed files."""
    calls: list[int] = []
    sync, replace = os.fsync, os.replace

    def recorded_sync(number: int) -> None:
        calls.append(os.fstat(number).st_ino)
        sync(number)

    def recorded_replace(old: Path, new: Path) -> None:
        calls.append(-old.stat().st_ino)
        replace(old, new)

    monkeypatch.setattr("os.fsync", recorded_sync)
    monkeypatch.setattr("os.replace", recorded_replace)
    return calls


def fill(folder: Path, text: str) -> None:
    with atomic.new_folder(folder) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text(text)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, synced: list[int]) -> None:
    atomic.write_json(tmp_path / "a.json", {"größe": [1]})
    inode = (tmp_path / "a.json").stat().st_ino
    assert synced == [inode, -inode]
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n "größe": [\n  1\n ]\n}\n'


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, synced: list[int]) -> None:
    fill(tmp_path / "made", "new")
    file, folder = ((tmp_path / "made" / name).stat().st_ino for name in ("inner/file", ""))
    assert synced.index(file) < synced.index(-folder)


@pytest.mark.parametrize("write", [atomic.new_file, atomic.new_folder])
def test_a_failed_write_leaves_the_existing_content(tmp_path: Path, write: Callable[..., object]) -> None:
    made = tmp_path / "made"
    made.write_text("old") if write is atomic.new_file else fill(made, "old")
    with pytest.raises(KeyboardInterrupt), write(made) as aside:  # type: ignore[attr-defined]
        (aside / "more" if aside.is_dir() else aside).write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (made / "inner" / "file" if made.is_dir() else made).read_text() == "old"


def test_a_file_replaces_no_folder_or_pipe(tmp_path: Path) -> None:
    fill(tmp_path / "made", "old")
    os.mkfifo(tmp_path / "pipe")
    for name in ("made", "pipe"):
        with pytest.raises(ConfigError, match=f"{name} exists and is no regular file"):
            atomic.write_text(tmp_path / name, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "pipe"]


def test_leftovers_of_a_killed_writer_are_removed_or_restored(tmp_path: Path) -> None:
    (tmp_path / ".made.unfinished").mkdir()
    (tmp_path / ".made.unfinished" / "stale").touch()
    fill(tmp_path / "made", "old")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["inner"]
    (tmp_path / "made").rename(tmp_path / ".made.replaced")  # killed between the two renames
    atomic.recover(tmp_path / "made")
    assert (tmp_path / "made" / "inner" / "file").read_text() == "old"
    fill(tmp_path / ".made.replaced", "older")  # killed before the last removal
    fill(tmp_path / "made", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "inner" / "file").read_text() == "new"


def test_a_folder_always_has_its_name_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "made", "old")
    renamed = os.replace

    def replace(old: Path, new: Path) -> None:
        renamed(old, new)
        assert (tmp_path / "made" / "inner" / "file").read_text() == "old"

    monkeypatch.setattr("os.replace", replace)
    fill(tmp_path / "made", "new")
    monkeypatch.undo()
    assert (tmp_path / "made" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    (tmp_path / ".made.replaced").mkdir()  # killed after the exchange
    fill(tmp_path / "made", "newest")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_is_replaced_by_two_renames_where_no_exchange_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda *paths: False)
    fill(tmp_path / "made", "old")
    fill(tmp_path / "made", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    (tmp_path / "made").rename(tmp_path / ".made.replaced")
    for read in (read_meta, load_model_folder, Dataset.open):
        with pytest.raises(
            BigDSSMError, match=r"\.made\.replaced is its earlier version, left by a kill: rename it to made"
        ):
            read(tmp_path / "made")


def test_an_error_of_the_system_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: .*\.a\.txt\.unfinished"):
        atomic.write_text(tmp_path / "a.txt", "text")


@pytest.mark.parametrize("attributes", [True, False])
def test_a_command_replaces_its_own_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: bool
) -> None:
    def missing(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not attributes:
        monkeypatch.setattr("os.setxattr", missing)
        monkeypatch.setattr("os.getxattr", missing)
    out = tmp_path / "out.json"
    check_file_to_write("--out", out, "report", overwrite=False)
    out.touch()
    check_file_to_write("--out", out, "report", overwrite=False)  # empty: nothing is lost
    out.write_text("the user's")
    for command, written in (("report", False), ("evaluate", True), ("report", True)):
        with pytest.raises(ConfigError, match=r"out\.json exists, and is not the file .*overwrite"):
            check_file_to_write("--out", out, command, overwrite=False)
        check_file_to_write("--out", out, command, overwrite=True)
        if written:
            atomic.write_text(out, command)
            assert atomic.is_written_by(out, command)  # also after a kill that comes now
            check_file_to_write("--out", out, command, overwrite=False)
    out.write_text("changed by the user")
    with pytest.raises(ConfigError, match="overwrite"):
        check_file_to_write("--out", out, "report", overwrite=False)


def test_files_of_others_in_a_folder_are_retained(tmp_path: Path) -> None:
    made = tmp_path / "made"
    fill(made, "old")
    (made / "inner" / "notes").write_text("the user's")
    (made / "mine").mkdir()
    (made / "mine" / "link").symlink_to("nowhere")
    (made / "part-7").touch()
    with atomic.new_folder(made, own=("part-*", "inner/file")) as aside:
        (aside / "part-1").touch()
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*") if not path.is_dir()) == [
        "inner/notes", "mine/link", "part-1",
    ]  # fmt: skip
