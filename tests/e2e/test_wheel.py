"""The installed package: built as a wheel, in a separate environment outside the sources."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TRIED = """
import inspect
from importlib.resources import files
from pathlib import Path

import bigdssm
assert Path(bigdssm.__file__).is_relative_to({environment!r}), bigdssm.__file__
assert callable(bigdssm.fps_loss)
for name in bigdssm.__all__:
    getattr(bigdssm, name)

from bigdssm.export import onnx_loading
from bigdssm.features.base import FEATURES
assert len(inspect.getsource(onnx_loading)) > 100
for cls in FEATURES.classes.values():
    assert all(inspect.getsource(code) for code in cls.onnx_code)
for suffix, held in (("html", "<html"), ("css", "body {{"), ("js", "use strict")):
    assert held in files("bigdssm.serving").joinpath("page." + suffix).read_text()
"""


def test_a_wheel_is_complete(tmp_path: Path) -> None:
    sources, elsewhere, environment = tmp_path / "sources", tmp_path / "elsewhere", tmp_path / "environment"
    elsewhere.mkdir()
    shutil.copytree(ROOT / "bigdssm", sources / "bigdssm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=elsewhere, env=variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    here = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []  # otherwise pip downloads it
    run(*pip, "wheel", "--no-deps", *here, "--wheel-dir", tmp_path, sources)
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", next(tmp_path.glob("*.whl")))
    packages = next((environment / "lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # dependencies

    command = environment / "bin" / "bigdssm"
    said = run(command, "--help")
    for tool in ("make_shards", "pretrain", "sft", "embed", "build_index", "search"):
        assert f"\n  {tool} " in said
    assert "usage: bigdssm embed" in run(command, "embed", "--help")
    assert "--resume" in run(python, "-m", "bigdssm.commands.pretrain", "--help")
    run(python, "-c", TRIED.format(environment=str(environment)))
