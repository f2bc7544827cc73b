"""Temporary worktrees of a commit, and processes that run tests in them without importing torch again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEST_TIMEOUT_S = 300
TEST_LIBRARIES = (  # of pytest's plugins and of most tests
    "pytest", "hypothesis", "_hypothesis_pytestplugin", "schemathesis.pytest.plugin", "pytest_timeout", "xdist.plugin",
    "transformers.modeling_utils", "transformers.models.bert.modeling_bert", "fastapi.testclient",
)  # fmt: skip
MARK = "BIGDSSM_MUTATED_TREE"  # variable of all processes of a tree


@contextmanager
def trees(commit: str, number: int) -> Iterator[list[Path]]:
    """Yield `number` temporary worktrees of a commit."""
    folder = Path(tempfile.mkdtemp(prefix="bigdssm-mutations-"))
    copies = [folder / str(i) for i in range(number)]
    try:
        for copy in copies:
            subprocess.run(["git", "worktree", "add", "-q", "--detach", str(copy), commit], cwd=HERE, check=True)
        yield copies
    finally:
        for copy in copies:
            subprocess.run(["git", "worktree", "remove", "--force", str(copy)], cwd=HERE, check=False)
        shutil.rmtree(folder, ignore_errors=True)


class Tree:
    """A worktree, and a process that runs tests in it in forks, without importing torch again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder, folder.with_suffix(".log")
        variables = {
            **os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", MARK: str(folder),
        }  # fmt: skip
        pipe = subprocess.PIPE
        command = [sys.executable, str(HERE / "warm.py"), *TEST_LIBRARIES]
        self._warm = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables, cwd=folder)

    @property
    def log(self) -> str:
        """The output of the last command."""
        return self._log.read_text(errors="replace")

    def run(self, tests: Sequence[str]) -> tuple[int, list[str]]:
        """Return pytest's exit code and the failed tests; a single test stops at its first failure."""
        first = ["-x"] if len(tests) == 1 else []
        pytest = [str(Path(sys.executable).parent / "pytest"), "-q", "-p", "no:cacheprovider", "-rfE", *first]
        code = self.execute([*pytest, "--timeout", str(TEST_TIMEOUT_S), *tests])
        return code, re.findall(r"^(?:FAILED|ERROR) (\S+)", self.log, re.MULTILINE)

    def execute(self, argv: Sequence[str]) -> int:
        """Run a script with its arguments in a fork of the process, and return its exit code."""
        self._log.write_text("")
        request = {"ranks": [[{}, list(argv)]], "log": str(self._log), "cwd": str(self.folder)}
        assert self._warm.stdin is not None and self._warm.stdout is not None
        print(json.dumps(request), file=self._warm.stdin)
        self._warm.stdin.flush()
        (code,) = json.loads(self._warm.stdout.readline())
        return int(code)

    def kill(self) -> None:
        """Kill all processes that the commands of this tree have started, and that still run."""
        mark = f"{MARK}={self.folder}\0".encode()
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != self._warm.pid:
                with suppress(OSError):  # it has ended, or belongs to another user
                    if mark in (process / "environ").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)

    def close(self) -> None:
        """End the process, and all that it has started."""
        assert self._warm.stdin is not None
        self._warm.stdin.close()
        self.kill()
        self._warm.wait()
