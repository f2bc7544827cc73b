"""Copies of folders to URLs: a marker that was copied last is removed first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from bigdssm.utils.urls import exists, upload_folder


def test_a_copy_that_is_being_replaced_is_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data", "marker"):
        (tmp_path / name).write_text("content")
    url = "memory://copies/a"
    upload_folder(tmp_path, url, last="marker")
    assert exists(f"{url}/marker")
    files = fsspec.filesystem("memory")

    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("the machine is lost")

    monkeypatch.setattr(type(files), "put_file", fail)
    with pytest.raises(FileNotFoundError):
        upload_folder(tmp_path, url, last="marker")
    assert not exists(f"{url}/marker") and exists(f"{url}/data")
