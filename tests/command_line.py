"""Runs the files of tools/ as commands, within the process of the tests."""

from __future__ import annotations

import importlib.util
import logging
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Tools:
    """Runs commands in this process, to import torch only once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, name: str, *arguments: object) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr of `python tools/<name>.py <arguments>`."""
        path = str(next((ROOT / "tools").rglob(f"{name}.py")))
        self._monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        self._monkeypatch.setenv("COLUMNS", "100")
        logger = logging.getLogger("bigdssm")
        before = list(logger.handlers), logger.level, logger.propagate
        self._capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(path, run_name="__main__")
        finally:
            logger.handlers[:], logger.level, logger.propagate = before
        captured = self._capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    def ran(self, name: str, *arguments: object) -> str:
        """Return the stdout of a command that succeeds."""
        code, out, err = self.run(name, *arguments)
        assert code == 0, err
        return out

    def refused(self, expected: int, name: str, *arguments: object) -> str:
        """Return the error message of a command that fails with the exit code `expected`."""
        code, out, err = self.run(name, *arguments)
        assert (code, out) == (expected, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
