"""Record which test executes which lines of the package, in all processes of the test.

    python tools/checks/coverage_map.py --out build/coverage.jsonl [pytest's arguments]

The map is used by `mutations.py --random`. Its first line has the sources and their checksums, each further one a test
or a shared fixture. A second call with the same sources adds the tests that are missing, so that an interrupted call is
continued. Lines are recorded by sys.settrace in every Python process that inherits PYTHONPATH (tracing/), also in ranks
that are killed, which lose the data of the package `coverage`. Not recorded: Python with -S, -I or another environment,
and code that ran once in a process that serves several tests (imports, caches, the start of a pool of ranks), except in
the first test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TRACING = Path(__file__).resolve().parent / "tracing"
PACKAGE = "bigdssm"


class CoveringTest(NamedTuple):
    """A test that executes a line."""

    name: str  # pytest's node id
    seconds: float
    fixture_seconds: float
    is_direct: bool  # the test itself and not only one of its shared fixtures


class CoverageMap:
    """The passing tests of a map, and the lines of each."""

    def __init__(self, path: Path, *, with_slow: bool = True) -> None:
        with path.open(encoding="utf-8") as file:
            header, *records = [json.loads(row) for row in file]
        self.files: dict[str, dict[str, Any]] = header["files"]
        self._fixtures = {record["fixture"]: record for record in records if "fixture" in record}
        tests = [record for record in records if "test" in record]
        passed = [record for record in tests if record["outcome"] == "passed"]
        self._tests = [record for record in passed if with_slow or not record["slow"]]
        self._by_line: dict[int, list[CoveringTest]] = {}
        self._executed = bytearray(header["size"])
        for record in [*self._tests, *self._used_fixtures()]:
            bounds = record["lines"]
            for first, last in zip(bounds[::2], bounds[1::2], strict=True):
                self._executed[first : last + 1] = b"\1" * (last + 1 - first)

    def __len__(self) -> int:
        return len(self._tests)

    def is_executed(self, file: str, line: int) -> bool:
        """Return whether any test executes a line."""
        return bool(self._executed[self.files[file]["offset"] + line])

    def tests(self, file: str, line: int) -> list[CoveringTest]:
        """Return the tests that execute a line."""
        byte = self.files[file]["offset"] + line
        if byte not in self._by_line:
            self._by_line[byte] = list(self._covering(byte))
        return self._by_line[byte]

    def _covering(self, byte: int) -> Iterator[CoveringTest]:
        through = {name for name, record in self._fixtures.items() if _has(record["lines"], byte)}
        for record in self._tests:
            is_direct = _has(record["lines"], byte)
            if is_direct or through.intersection(record["fixtures"]):
                fixture_seconds = sum(self._fixtures[name]["seconds"] for name in record["fixtures"])
                yield CoveringTest(record["test"], record["seconds"], fixture_seconds, is_direct)

    def _used_fixtures(self) -> list[dict[str, Any]]:
        names = {name for record in self._tests for name in record["fixtures"]}
        return [self._fixtures[name] for name in sorted(names)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/coverage.jsonl", help="default: %(default)s")
    args, pytest_arguments = parser.parse_known_args()
    header = map_header(ROOT)
    out = args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        with out.open(encoding="utf-8") as file:
            same = json.loads(file.readline()) == header
        if not same:
            print(f"{out} is the map of other sources: remove it, or choose another --out", file=sys.stderr)
            return 2
    else:
        out.write_text(json.dumps(header) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="bigdssm-lines-") as folder:
        rows = [f"{entry['offset']}\t{ROOT / file}" for file, entry in header["files"].items()]
        Path(folder, "files.tsv").write_text("\n".join(rows))
        lines = Path(folder, "lines")
        lines.write_bytes(bytes(header["size"]))
        variables = {
            **os.environ,
            "BIGDSSM_TRACED_LINES": str(lines),
            "BIGDSSM_COVERAGE_MAP": str(out),
            "PYTHONPATH": os.pathsep.join([str(TRACING), str(ROOT)]),
        }
        command = [sys.executable, "-m", "pytest", "-p", "line_recorder", "-p", "no:cacheprovider", *pytest_arguments]
        code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    covered = CoverageMap(out)
    print(f"{len(covered)} passing tests in {out}; pytest's exit code {code}")
    return code


def map_header(root: Path) -> dict[str, Any]:
    """Return the sources of the package, their checksums, and the first byte of each in the map of lines."""
    files = {}
    size = 0
    for path in sorted((root / PACKAGE).rglob("*.py")):
        content = path.read_bytes()
        files[str(path.relative_to(root))] = {"offset": size, "sha256": hashlib.sha256(content).hexdigest()}
        size += content.count(b"\n") + 2  # lines count from 1
    return {"size": size, "files": files}


def _has(bounds: list[int], line: int) -> bool:
    """Return whether a line is within one of the ranges [first, last]."""
    index = bisect_left(bounds, line)
    return index < len(bounds) and (index % 2 == 1 or bounds[index] == line)


if __name__ == "__main__":
    sys.exit(main())
