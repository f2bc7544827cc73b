"""The two shell scripts: syntax, and one-line errors for missing requirements."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("launch/quickstart.sh", "tests/run.sh")
PYTHONS = "tools/checks/pythons.sh"
TOOLS = ("bash", "sh", "dirname", "cat", "df", "awk", "sed", "grep", "mkdir", "rm", "tail")

pytestmark = pytest.mark.e2e


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the scripts and the package metadata, without .venv."""
    for name in (*SCRIPTS, "launch/setup_env.sh", "pyproject.toml", "README.md", "LICENSE", "bigdssm/__init__.py"):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "checkout"


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder for PATH with the tools that the scripts need, without Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    return folder


def fake_python(folder: Path, version: tuple[int, int], *, venv: bool = True) -> None:
    """Write a fake python3 that reports `version`, optionally without the venv module."""
    lie = f"import sys; sys.version_info = {(*version, 0)}; {'' if venv else 'sys.modules.update(ensurepip=None); '}"
    stub = folder / "python3"
    stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{lie}exec(sys.argv[1])" "$2"\n')
    stub.chmod(0o755)


def run_script(checkout: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BIGDSSM_", "PIP_")) and k != "VIRTUAL_ENV"}
    env = inherited | variables
    command = ["bash", str(checkout / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=checkout.parent)


def the_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the error message of a failed script."""
    assert result.returncode == 1, result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    return last


@pytest.mark.parametrize("script", [*SCRIPTS, PYTHONS, "launch/setup_env.sh", ".ci/run"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "-x", *SCRIPTS, PYTHONS, "launch/setup_env.sh", ".ci/run"], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_options(checkout: Path, script: str) -> None:
    shown = run_script(checkout, script, "--help")
    assert shown.returncode == 0
    assert f"bash {script}" in shown.stdout
    assert "set -e" not in shown.stdout
    assert "--nonsense" in the_error(run_script(checkout, script, "--nonsense"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_python(checkout: Path, bare_path: Path, script: str) -> None:
    assert "no python3 on PATH" in the_error(run_script(checkout, script, PATH=str(bare_path)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_old_python(checkout: Path, bare_path: Path, script: str) -> None:
    fake_python(bare_path, (3, 9))
    error = the_error(run_script(checkout, script, PATH=str(bare_path)))
    assert "Python 3.10 or newer is needed" in error
    assert "python3 is Python 3.9" in error


def test_no_venv_module(checkout: Path, bare_path: Path) -> None:
    fake_python(bare_path, (3, 10), venv=False)
    error = the_error(run_script(checkout, "launch/quickstart.sh", PATH=str(bare_path)))
    assert "without the venv module" in error
    assert "python3-venv" in error


def test_a_later_python_on_path_is_taken(checkout: Path, bare_path: Path) -> None:
    fake_python(bare_path, (3, 9))
    (bare_path / "python3.12").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bare_path / "python3.12").chmod(0o755)
    error = the_error(run_script(checkout, "tests/run.sh", PATH=str(bare_path), BIGDSSM_MIN_FREE_GB="100000000"))
    assert "free disk" in error  # the search for a Python succeeded


def test_a_named_python_that_will_not_do(checkout: Path) -> None:
    error = the_error(run_script(checkout, "tests/run.sh", BIGDSSM_PYTHON="/nowhere/python"))
    assert "BIGDSSM_PYTHON=/nowhere/python does not run" in error


def test_no_disk(checkout: Path) -> None:
    error = the_error(run_script(checkout, "launch/quickstart.sh", BIGDSSM_MIN_FREE_GB="100000000"))
    assert "free disk" in error
    assert not (checkout / ".venv").exists()


def test_a_folder_that_cannot_be_written(checkout: Path) -> None:
    (checkout / ".venv").write_text("in the way")
    error = the_error(run_script(checkout, "tests/run.sh", BIGDSSM_PYTHON=sys.executable))
    assert "cannot make" in error


def test_another_environment_is_not_emptied(checkout: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "file").touch()
    (checkout / ".venv").symlink_to(own)
    error = the_error(run_script(checkout, "tests/run.sh", BIGDSSM_PYTHON=sys.executable))
    assert ".venv is a link" in error and (own / "file").exists()
    (checkout / ".venv").unlink()
    own.rename(checkout / ".venv")
    error = the_error(run_script(checkout, "tests/run.sh", BIGDSSM_PYTHON=sys.executable))
    assert "has no pip" in error and (checkout / ".venv/file").exists(), "one of another tool"


@pytest.mark.slow
def test_no_registry(checkout: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    venv.create(checkout / ".venv", with_pip=True)
    (checkout / ".venv/mine").touch()
    error = the_error(run_script(checkout, "tests/run.sh", BIGDSSM_PYTHON=sys.executable, **nowhere))
    assert "registry" in error and (checkout / ".venv/mine").exists(), "an environment that works is updated in place"
    assert str(checkout / ".venv/pip.log") in error
    assert not (checkout / ".venv/.bigdssm-test").exists()


def test_bad_options_of_the_quickstart(checkout: Path) -> None:
    assert "--seed one" in the_error(run_script(checkout, "launch/quickstart.sh", "--seed", "one"))
    assert "no such file" in the_error(run_script(checkout, "launch/quickstart.sh", "--movielens", "nowhere"))
    assert "needs a value" in the_error(run_script(checkout, "launch/quickstart.sh", "--movielens"))
    assert "cannot be changed" in the_error(run_script(checkout, "launch/quickstart.sh", "run.dir=runs/mine"))


def test_an_up_to_date_environment_is_left_alone(checkout: Path) -> None:
    bin_folder = checkout / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_folder / "python").chmod(0o755)

    def call(function: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", f"set -euo pipefail; . launch/setup_env.sh; {function}"]
        env = os.environ | {"BIGDSSM_PYTHON": "/nowhere/python"}
        return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)

    (checkout / ".venv/.bigdssm-base").write_text(call("env_fingerprint .venv/bin/python").stdout)
    assert "up to date" in call("setup_env base").stdout
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "BIGDSSM_PYTHON=/nowhere/python does not run" in the_error(call("setup_env base"))  # starts installing


def test_each_python_is_tried_in_a_copy_of_the_tree(tmp_path: Path) -> None:
    """One that is not found, or whose packages are not installed in time, is reported and fails nothing."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    command = ["bash", str(ROOT / PYTHONS), "--quickstart", "--install-within", "1", "--into", str(tmp_path)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*command, version, "3.99"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, missing, late = done.stdout.splitlines()
    assert missing.split() == ["3.99", "interpreter", "not", "found", "0", "s"]
    assert late.startswith(f"{version} ") and "environment  not within 1 s" in late
    assert (tmp_path / version / "bigdssm/loader/stream.py").read_bytes() == (
        ROOT / "bigdssm/loader/stream.py"
    ).read_bytes()
    assert not (tmp_path / version / ".venv/.bigdssm-base").exists()
