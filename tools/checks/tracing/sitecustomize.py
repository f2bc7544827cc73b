"""Record the executed lines of the package in a memory-mapped file, one byte per line.

Python imports this module at its start when the folder is the first of PYTHONPATH. The file is shared by all processes
of a test run, so that forks, killed processes and processes that outlive a test need no end at which they save data.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import mmap
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = str(Path(__file__).resolve().parent)
VARIABLE = "BIGDSSM_TRACED_LINES"  # the memory-mapped file; files.tsv beside it has the first byte of each source


def start(path: str) -> mmap.mmap:
    """Record the lines that this process executes from now on, in all threads, and return the shared bytes."""
    with open(path, "r+b") as file:
        lines = mmap.mmap(file.fileno(), 0)
    tracers = {}
    for row in Path(path).with_name("files.tsv").read_text().splitlines():
        offset, _, source = row.partition("\t")
        tracers[source] = _tracer(lines, int(offset))

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return tracers.get(frame.f_code.co_filename)

    threading.settrace(trace)
    sys.settrace(trace)
    return lines


def _tracer(lines: mmap.mmap, offset: int) -> Any:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        lines[offset + frame.f_lineno] = 1
        return trace

    return trace


def _trace_replaced_paths() -> None:
    """Add this folder to the environment of a child process whose PYTHONPATH a test has replaced."""
    original = subprocess.Popen.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        env = options.get("env")
        env = dict(os.environ if env is None else env)
        folders = env.get("PYTHONPATH", "").split(os.pathsep)
        if VARIABLE in env and FOLDER not in folders:
            env["PYTHONPATH"] = os.pathsep.join([FOLDER, *folders])
            options["env"] = env
        original(self, *arguments, **options)

    subprocess.Popen.__init__ = init  # type: ignore[method-assign]


def _import_hidden() -> None:
    """Execute the sitecustomize that this one hides."""
    folders = [folder for folder in sys.path if folder != FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", folders)
    if spec is not None and spec.loader is not None:
        with suppress(ModuleNotFoundError):  # raised by one that finds no other, which Python ignores
            spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":
    _import_hidden()
    if os.path.exists(os.environ.get(VARIABLE, "")):
        _trace_replaced_paths()
        start(os.environ[VARIABLE])
