"""`bigdssm serve` without the packages of the extra `serve`."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_missing_packages_are_named_with_their_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("fastapi", "prometheus_client", "uvicorn")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("bigdssm.commands.serve", "bigdssm.serving.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    serve = importlib.import_module("bigdssm.commands.serve")
    assert serve.main(["--model", "model", "--index", "index"]) == 2
    error = capsys.readouterr().err
    assert "serving needs fastapi and prometheus_client and uvicorn: pip install 'bigdssm[serve]'" in error
