"""Run listed tests in the listed order until one fails, for mutations.py.

Arguments: a JSON file with the tests {NODE_ID: TIMEOUT_S} and `limit_s`; the JSON file of the result. No test starts
after `limit_s`. The result is written after each test, so that it exists even if this process is killed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest


class Selection:
    """Pytest plugin: order, time limits, and the result."""

    def __init__(self, seconds: dict[str, float], limit_s: float, path: Path) -> None:
        self._seconds = seconds
        self._path = path
        self._end = time.monotonic() + limit_s
        self._result: dict[str, Any] = {"failed": "", "message": "", "running": "", "finished": 0}
        self._write()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {name: number for number, name in enumerate(self._seconds)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])
        for item in items:
            item.add_marker(pytest.mark.timeout(self._seconds[item.nodeid]), append=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if time.monotonic() < self._end:
            return None
        item.session.shouldstop = "the limit of seconds"
        return True  # not run

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._result["running"] = nodeid
        self._write()

    def pytest_runtest_logfinish(self) -> None:
        self._result["finished"] += 1
        self._result["running"] = ""
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._record(report)

    def _record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self._result["failed"]:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._result["failed"] = report.nodeid
            self._result["message"] = crash.message if crash else str(report.longrepr)[-1000:]
            self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps(self._result), encoding="utf-8")


def main() -> int:
    selection = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    plugin = Selection(selection["tests"], selection["limit_s"], Path(sys.argv[2]))
    del sys.path[0]  # of this folder, whose modules are not part of the tests' environment
    files = sorted({name.partition("::")[0] for name in selection["tests"]})
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed", "0"]
    return int(pytest.main([*options, *files], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
