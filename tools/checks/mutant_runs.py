"""Run the tests that cover random mutants, and count the mutants that no test kills.

Verdicts: `killed`, with the test that fails; `killed (timeout)`; `survived`, with the number of tests that were not run
within the limit; `uncovered`: no test executes the line; `error`: pytest itself failed. A test that kills for the first
time is repeated without the mutant: if it fails there too, it is left out. Mutants whose result the file has already
are not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from coverage_map import CoverageMap, CoveringTest, map_header
from random_mutants import KINDS, Mutant, Statements, draw
from trees import HERE, Tree, trees

FIRST_SECONDS, FIRST_FILES = 5.0, 5  # the first round: most mutants end in it, after few imports
TIMEOUT_S, TIMEOUT_FACTOR = 30, 5  # of a test: the factor is that of its recorded seconds
IMPORT_S = 120  # on top of the limit, before the whole process is killed
INTERNAL_ERROR = 3  # pytest's exit code
BUCKETS = (0.1, 1.0, 10.0)  # cheaper tests first; within a bucket by file, as files have fixtures


class RandomRun(NamedTuple):
    """The options of a run of random mutants."""

    number: int
    seed: int
    commit: str
    coverage: Path
    results: Path
    jobs: int = 1
    limit_s: float = 120.0
    with_slow: bool = True
    covered: bool = False  # draw only from executed lines


class Verdict(NamedTuple):
    """The result of the tests of one mutant."""

    name: str
    test: str = ""
    message: str = ""
    not_run: int = 0


def run_random(options: RandomRun) -> int:
    """Draw mutants, run their tests, append the results to a file, and print a table; return the exit code."""
    commit = subprocess.run(
        ["git", "rev-parse", options.commit], cwd=HERE, check=True, capture_output=True, text=True
    ).stdout.strip()
    coverage = CoverageMap(options.coverage, with_slow=options.with_slow)
    with trees(commit, options.jobs) as copies:
        mutants = _drawn(copies[0], coverage, options)
        results = _read_results(options.results)
        left = [mutant for mutant in mutants if _key(mutant) not in results]
        print(f"{len(mutants)} mutants, {len(mutants) - len(left)} of them with a result in {options.results}")
        runner = _Runner([Tree(copy) for copy in copies], coverage, options.limit_s)

        def run(mutant: Mutant) -> None:
            started = time.perf_counter()
            verdict = runner.verdict(mutant)
            record = {
                **_key_fields(mutant),
                "line": mutant.line,
                "verdict": verdict.name,
                "test": verdict.test,
                "not_run": verdict.not_run,
                "seconds": round(time.perf_counter() - started, 1),
                "message": verdict.message,
                "commit": commit,
                "seed": options.seed,
            }
            with options.results.open("ab", buffering=0) as file:
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            results[_key(mutant)] = record
            print(_line(record), flush=True)

        try:
            with ThreadPoolExecutor(options.jobs) as threads:
                list(threads.map(run, left))
        finally:
            runner.close()
    print(table([results[_key(mutant)] for mutant in mutants]))
    return 0


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return counts of verdicts by kind and by package."""
    rows: dict[str, Counter[str]] = {"total": Counter()}
    kinds = [kind for kind in KINDS if any(record["kind"] == kind for record in records)]
    packages = sorted({_package(record) for record in records})
    for name in (*kinds, *packages):
        rows[name] = Counter()
    for record in records:
        verdict = record["verdict"].partition(" ")[0]
        for name in ("total", record["kind"], _package(record)):
            rows[name][verdict] += 1
            if record["not_run"]:
                rows[name]["partly"] += 1
    lines = [f"{'':24}{'killed':>10}{'survived':>10}{'uncovered':>11}{'error':>7}   survived with tests not run"]
    for name, counts in rows.items():
        numbers = f"{counts['killed']:10}{counts['survived']:10}{counts['uncovered']:11}{counts['error']:7}"
        lines.append(f"{name:24}{numbers}   {counts['partly']}")
    return "\n".join(lines)


def _drawn(tree: Path, coverage: CoverageMap, options: RandomRun) -> list[Mutant]:
    """Return mutants of functions that a test executes, of the files that the map describes."""
    files = map_header(tree)["files"]
    same = [file for file in files if file in coverage.files and _sha(coverage.files, file) == _sha(files, file)]
    sources = {file: (tree / file).read_text(encoding="utf-8") for file in same}
    functions: dict[tuple[str, str], bool] = {}
    for file, source in sources.items():
        for site in Statements(file, source).sites:
            is_executed = coverage.is_executed(file, site.line)
            functions[file, site.function] = functions.get((file, site.function), False) or is_executed
    executed = {function for function, is_executed in functions.items() if is_executed}
    print(f"{len(coverage)} tests execute {len(executed)} of {len(functions)} functions")
    if len(same) < len(files):
        print(f"left out: {len(files) - len(same)} files that have changed since the map was made")
    mutants = draw(
        sources,
        options.seed,
        is_drawn=lambda site: (site.file, site.function) in executed,
        is_selected=lambda mutant: not options.covered or coverage.is_executed(mutant.file, mutant.line),
    )
    return list(islice(mutants, options.number))


class _Runner:
    """Trees in which mutants are tested, several at a time."""

    def __init__(self, trees: Sequence[Tree], coverage: CoverageMap, limit_s: float) -> None:
        self._trees = trees
        self._coverage = coverage
        self._limit_s = limit_s
        self._idle: SimpleQueue[Tree] = SimpleQueue()
        self._passes: dict[str, bool] = {}  # of tests without a mutant
        for tree in trees:
            self._idle.put(tree)

    def verdict(self, mutant: Mutant) -> Verdict:
        tests = _ordered(mutant, self._coverage.tests(mutant.file, mutant.line))
        if not tests:
            return Verdict("uncovered")
        tree = self._idle.get()
        try:
            while True:
                verdict = self._run(tree, mutant, tests)
                if not verdict.test or self._passes_unchanged(tree, verdict.test, tests):
                    return verdict
                tests = [test for test in tests if test.name != verdict.test]
                if not tests:
                    return Verdict("uncovered", message="the only test fails without the mutant too")
        finally:
            self._idle.put(tree)

    def close(self) -> None:
        for tree in self._trees:
            tree.close()

    def _run(self, tree: Tree, mutant: Mutant | None, tests: Sequence[CoveringTest]) -> Verdict:
        """Return the verdict of the tests on the changed tree, or without a mutant on the tree as it is."""
        end = time.monotonic() + self._limit_s
        not_run = len(tests)
        with _changed(tree, mutant):
            for part in _rounds(tests, self._limit_s):
                limit_s = end - time.monotonic()
                if limit_s <= 0:
                    break
                verdict = self._run_round(tree, part, limit_s)
                if verdict.name != "survived":
                    return verdict
                not_run -= len(part) - verdict.not_run
            return Verdict("survived", not_run=not_run)

    def _run_round(self, tree: Tree, tests: Sequence[CoveringTest], limit_s: float) -> Verdict:
        """Run tests in one pytest process."""
        selection = tree.folder.with_suffix(".tests")
        result_path = tree.folder.with_suffix(".result")
        timeouts = {test.name: _timeout_s(test) for test in tests}
        selection.write_text(json.dumps({"tests": timeouts, "limit_s": limit_s}), encoding="utf-8")
        result_path.unlink(missing_ok=True)
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            tree.kill()

        timer = threading.Timer(IMPORT_S + limit_s + max(timeouts.values()), end)
        timer.start()
        try:
            code = tree.execute([str(HERE / "selected_tests.py"), str(selection), str(result_path)])
        finally:
            timer.cancel()
            tree.kill()
        result: dict[str, Any] = {"failed": "", "running": "", "message": "", "finished": 0}
        if result_path.exists():
            result = json.loads(result_path.read_text(encoding="utf-8"))
        is_complete = not result["failed"] and not result["running"]
        if code in (0, 2, 5) and is_complete:  # 2: stopped at the limit; 5: no test started
            return Verdict("survived", not_run=len(tests) - result["finished"])
        test = result["failed"] or result["running"] or tests[0].name
        message = result["message"].strip() or f"exit code {code}"
        if code == INTERNAL_ERROR and not result["failed"]:
            return Verdict("error", message=tree.log[-1000:])
        is_timeout = "Timeout (>" in message or is_late.is_set()
        return Verdict("killed (timeout)" if is_timeout else "killed", test, message.partition("\n")[0][:300])

    def _passes_unchanged(self, tree: Tree, name: str, tests: Sequence[CoveringTest]) -> bool:
        """Return whether a test, or the first one of a file that could not be imported, passes without a mutant."""
        if name not in self._passes:
            one = [test for test in tests if test.name == name]
            one = one or [test for test in tests if test.name.startswith(f"{name}::")][:1]
            verdict = self._run(tree, None, one or tests[:1])
            self._passes[name] = verdict.name == "survived" and not verdict.not_run
            if not self._passes[name]:
                print(f"left out, fails without a mutant: {name}: {verdict.message}", flush=True)
        return self._passes[name]


@contextmanager
def _changed(tree: Tree, mutant: Mutant | None) -> Iterator[None]:
    """Write the source of a mutant into a tree, and restore it."""
    if mutant is None:
        yield
        return
    path = tree.folder / mutant.file
    original = path.read_bytes()
    path.write_text(mutant.source, encoding="utf-8")
    try:
        yield
    finally:
        path.write_bytes(original)


def _ordered(mutant: Mutant, tests: Sequence[CoveringTest]) -> list[CoveringTest]:
    """Return the tests in the order in which they are run: direct ones, cheap ones, and those of the package first."""
    package = _package({"file": mutant.file})

    def key(test: CoveringTest) -> tuple[Any, ...]:
        seconds = test.seconds + (0.0 if test.is_direct else test.fixture_seconds)
        bucket = sum(seconds > bound for bound in BUCKETS)
        file = test.name.partition("::")[0]
        return not test.is_direct, bucket, f"/{package}/" not in file, file, seconds, test.name

    return sorted(tests, key=key)


def _rounds(tests: Sequence[CoveringTest], limit_s: float) -> list[Sequence[CoveringTest]]:
    """Divide tests into a short first round of few files, and the rest, as far as the limit allows."""
    files: set[str] = set()
    seconds = 0.0
    first = 0
    end = 0
    for test in tests:
        files.add(test.name.partition("::")[0])
        is_short = len(files) <= FIRST_FILES and seconds + test.seconds <= FIRST_SECONDS
        if first == end and (is_short or not first):
            first += 1
        if seconds > limit_s:
            break
        seconds += test.seconds
        end += 1
    parts = [tests[:first], tests[first:end]]
    return [part for part in parts if part]


def _timeout_s(test: CoveringTest) -> float:
    return TIMEOUT_S + TIMEOUT_FACTOR * (test.seconds + test.fixture_seconds)


def _key_fields(mutant: Mutant) -> dict[str, Any]:
    names = ("file", "function", "kind", "line", "column", "before", "after")
    return {name: getattr(mutant, name) for name in names}


def _key(source: Mutant | dict[str, Any]) -> str:
    fields = source if isinstance(source, dict) else _key_fields(source)
    return json.dumps([fields[name] for name in ("file", "function", "kind", "line", "column", "before", "after")])


def _read_results(path: Path) -> dict[str, dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as file:
        records = [json.loads(row) for row in file if row.endswith("\n")]
    return {_key(record): record for record in records}


def _sha(files: dict[str, dict[str, Any]], file: str) -> str:
    return str(files[file]["sha256"])


def _package(record: dict[str, Any]) -> str:
    """Return the folder of a file within the package; the package itself for its own modules."""
    parts = Path(record["file"]).parts
    return parts[1] if len(parts) > 2 else parts[0]


def _line(record: dict[str, Any]) -> str:
    change = f"{record['before']!r} → {record['after']!r}"
    more = record["test"] or (f"{record['not_run']} tests not run" if record["not_run"] else "")
    where = f"{record['file']}:{record['line']} {record['function']}"
    return f"{record['verdict']:10} {record['kind']:11} {where}: {change}  {more}  ({record['seconds']:.0f} s)"


if __name__ == "__main__":
    sys.exit("run mutations.py --random")
