"""Pytest plugin: append the lines, outcome and seconds of each test to a coverage map.

A fixture of a module or of the session runs during the first test that requests it, but the others depend on its lines
too. So its lines are a record of their own, to which all tests that use it refer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sitecustomize

MAP_VARIABLE = "BIGDSSM_COVERAGE_MAP"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", {}).get("workerid", "")
    if not worker and config.getoption("numprocesses", None):
        return  # the processes of xdist record
    lines = Path(os.environ[sitecustomize.VARIABLE])
    if worker:
        own = lines.with_name(worker)
        shutil.copyfile(lines, own)
        os.environ[sitecustomize.VARIABLE] = str(own)
        lines = own
    config.pluginmanager.register(Recorder(str(lines), Path(os.environ[MAP_VARIABLE])))


class Recorder:
    """Records of the tests of one pytest process."""

    def __init__(self, lines: str, path: Path) -> None:
        self._lines = sitecustomize.start(lines)
        self._path = path
        self._numbers = count()
        self._fixtures: dict[Any, str] = {}  # names of records by fixture definition
        self._used: list[str] = []
        self._seconds = 0.0
        self._fixture_seconds = 0.0
        self._failed = False
        self._passed = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the tests that the map has."""
        with self._path.open(encoding="utf-8") as file:
            recorded = {json.loads(row).get("test") for row in file}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in recorded])
        items[:] = [item for item in items if item.nodeid not in recorded]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._used = []
        self._seconds = 0.0
        self._fixture_seconds = 0.0
        self._failed = False
        self._passed = False
        self._take()
        result = yield
        outcome = "failed" if self._failed else "passed" if self._passed else "skipped"
        record = {
            "test": item.nodeid,
            "outcome": outcome,
            "seconds": round(max(0.0, self._seconds - self._fixture_seconds), 3),
            "slow": item.get_closest_marker("slow") is not None,
            "fixtures": self._used,
            "lines": _ranges(self._take()),
        }
        self._append(record)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.when == "call":
            self._passed = report.passed
        self._failed = self._failed or report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: Any) -> None:
        request = getattr(item, "_request", None)
        definitions = request._fixture_defs.values() if request else ()
        self._used = [self._fixtures[definition] for definition in definitions if definition in self._fixtures]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        before = self._take()
        started = time.perf_counter()
        counted = self._fixture_seconds
        try:
            return (yield)
        finally:
            seconds = time.perf_counter() - started
            self._fixture_seconds = counted + seconds  # with the fixtures that it requested itself
            name = f"{fixturedef.baseid}::{fixturedef.argname} {os.getpid()}-{next(self._numbers)}"
            self._fixtures[fixturedef] = name
            self._append({"fixture": name, "seconds": round(seconds, 3), "lines": _ranges(self._take())})
            for line in before:
                self._lines[line] = 1

    def _take(self) -> list[int]:
        """Return the executed lines, and clear them."""
        content = self._lines[:]
        self._lines[:] = bytes(len(content))
        return [match.start() for match in re.finditer(b"\1", content)]

    def _append(self, record: dict[str, Any]) -> None:
        row = json.dumps(record) + "\n"
        with self._path.open("ab", buffering=0) as file:  # whole rows, also of concurrent processes
            file.write(row.encode())


def _ranges(lines: Sequence[int]) -> list[int]:
    """Return the first and last line of each run of consecutive lines."""
    bounds: list[int] = []
    for line in lines:
        if bounds and bounds[-1] == line - 1:
            bounds[-1] = line
        else:
            bounds += (line, line)
    return bounds
