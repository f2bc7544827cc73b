"""Mutation tests: plant the bugs of planted_bugs.py one at a time, and report which test catches each.

    python tools/checks/mutations.py [--only NAME …] [--jobs N] [--commit COMMIT]
    python tools/checks/mutations.py --find            # only check that all fragments and tests exist
    python tools/checks/mutations.py --random N --seed S [--jobs J] [--results FILE] [--quick] [--limit-s SECONDS]

A bug replaces a fragment in the source of one symbol. The symbol is looked up in the listed module, then by qualified
name in the whole package, and the test by name in all tests, so that both may move. All tests are first run without a
bug, and must pass. Prints one line per bug: caught, with the test, or SURVIVED. Exit code 1: a bug survived; 2: a
fragment is missing, or a test fails without a bug.

With --random, the bugs are random changes by syntax (random_mutants.py), and the tests of each are those that execute
the changed line, by the map of coverage_map.py. Prints a line per mutant and a table (mutant_runs.py); exit code 0. An
interrupted run continues with the same command.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from mutant_runs import RandomRun, run_random
from planted_bugs import BUGS, Bug
from trees import HERE, Tree, trees

ROOT = HERE.parents[1]
PACKAGE, EVIDENCE = "bigdssm", "tools/evidence"


class Mutation(NamedTuple):
    """A file with its planted bug."""

    file: Path  # relative to the tree
    planted: str  # content of the file with the bug


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="names of bugs or contracts (default: all)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="concurrent bugs (default: %(default)s)")
    parser.add_argument("--commit", default="HEAD", help="commit to test (default: %(default)s)")
    parser.add_argument("--find", action="store_true", help="only check that all fragments and tests exist")
    _add_random_options(parser)
    args = parser.parse_args()
    if args.random:
        options = RandomRun(
            number=args.random,
            seed=args.seed,
            commit=args.commit,
            coverage=args.coverage,
            results=args.results,
            jobs=args.jobs,
            limit_s=args.limit_s,
            with_slow=not args.quick,
            covered=args.covered,
        )
        return run_random(options)
    bugs = [bug for bug in BUGS if not args.only or {bug.name, bug.contract} & set(args.only)]
    with trees(args.commit, 1 if args.find else args.jobs) as copies:
        tests = {bug.test: find_test(copies[0], bug.test) for bug in bugs}
        mutations = {bug.name: find_mutation(copies[0], bug) for bug in bugs}
        lost = [f"{name}: {mutation}" for name, mutation in mutations.items() if isinstance(mutation, str)]
        lost += [f"{test}: no such test" for test, found in tests.items() if found is None]
        if lost or args.find:
            print("\n".join(lost) or f"{len(bugs)} bugs of {len({bug.contract for bug in bugs})} contracts are found")
            return 2 if lost else 0
        idle: SimpleQueue[Tree] = SimpleQueue()
        for copy in copies:
            idle.put(Tree(copy))
        code, failed = _run_tests(idle, None, sorted({str(found) for found in tests.values()}))
        if code:
            print(f"exit code {code} without a bug: {', '.join(failed) or 'no test failed'}")
            return 2

        def caught(bug: Bug) -> bool:
            mutation, started = mutations[bug.name], time.perf_counter()
            assert isinstance(mutation, Mutation)
            code, failed = _run_tests(idle, mutation, [str(tests[bug.test])])
            verdict = "SURVIVED" if code == 0 else f"caught by {failed[0]}" if failed else f"caught, exit code {code}"
            print(f"{bug.contract:14} {bug.name:44} {verdict}  ({time.perf_counter() - started:.0f} s)", flush=True)
            return code != 0

        with ThreadPoolExecutor(args.jobs) as threads:
            survived = [bug.name for bug, found in zip(bugs, threads.map(caught, bugs), strict=True) if not found]
    print(f"{len(bugs) - len(survived)} of {len(bugs)} caught" + "".join(f"; {name} survived" for name in survived))
    return int(bool(survived))


def _add_random_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("random mutants")
    coverage = ROOT / "build/coverage.jsonl"
    results = ROOT / "build/mutants.jsonl"
    group.add_argument("--random", type=int, default=0, metavar="N", help="number of mutants of executed functions")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument("--coverage", type=Path, default=coverage, help="from coverage_map.py (default: %(default)s)")
    group.add_argument("--results", type=Path, default=results, help="one JSON line per mutant (default: %(default)s)")
    group.add_argument("--limit-s", type=float, default=120.0, help="no test starts later (default: %(default)s)")
    group.add_argument("--covered", action="store_true", help="draw only from executed lines")
    selection = group.add_mutually_exclusive_group()
    selection.add_argument("--quick", action="store_true", help="without the tests that are marked slow")
    selection.add_argument("--full", action="store_true", help="all tests of the map (default)")


def find_mutation(tree: Path, bug: Bug) -> Mutation | str:
    """Plant a bug whose fragment occurs exactly once in its symbol; otherwise return the reason."""
    module, _, symbol = bug.symbol.partition(":")
    named = tree / PACKAGE / f"{module.replace('.', '/')}.py"
    others = sorted(path for folder in (PACKAGE, EVIDENCE) for path in (tree / folder).rglob("*.py") if path != named)
    found = []
    for path in [*([named] if named.exists() else []), *others]:
        if bug.old not in (text := path.read_text(encoding="utf-8")):
            continue
        found += [(path, text, *span) for span in _spans(text, symbol) if bug.old in text[slice(*span)]]
        if path == named and found:
            break
    if len(found) != 1:
        return f"{len(found)} occurrences of {bug.old!r} in {symbol}"
    path, text, first, end = found[0]
    if text[first:end].count(bug.old) != 1:
        return f"{bug.old!r} occurs several times in {symbol} of {path.relative_to(tree)}"
    planted = text[:first] + text[first:end].replace(bug.old, bug.new) + text[end:]
    compile(planted, str(path), "exec")
    return Mutation(path.relative_to(tree), planted)


def _spans(text: str, symbol: str) -> Iterator[tuple[int, int]]:
    """Yield [first, end) of the source of a function, class, method or assigned name."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    scopes: list[ast.AST] = [ast.parse(text)]
    *parents, last = symbol.split(".")
    for name in parents:
        scopes = [node for scope in scopes for node in ast.iter_child_nodes(scope) if getattr(node, "name", "") == name]
    for scope in scopes:
        for node in ast.iter_child_nodes(scope):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [getattr(node, "name", ""), *(getattr(target, "id", "") for target in targets)]
            if last in names:
                assert isinstance(node, ast.stmt) and node.end_lineno is not None
                yield starts[node.lineno - 1], starts[node.end_lineno] if node.end_lineno < len(starts) else len(text)


def find_test(tree: Path, test: str) -> str | None:
    """Return `FILE::NAME` of a test, which may have moved to another file; NAME may end in [parameters]."""
    file, _, name = test.partition("::")
    function = f"def {name.partition('[')[0]}("
    if (tree / file).exists() and function in (tree / file).read_text(encoding="utf-8"):
        return test
    found = [path for path in (tree / "tests").rglob("test_*.py") if function in path.read_text(encoding="utf-8")]
    return f"{found[0].relative_to(tree)}::{name}" if len(found) == 1 else None


def _run_tests(idle: SimpleQueue[Tree], mutation: Mutation | None, tests: Sequence[str]) -> tuple[int, list[str]]:
    """Run tests in an idle tree with a bug, or without one."""
    tree = idle.get()
    before = None if mutation is None else (tree.folder / mutation.file).read_bytes()
    try:
        if mutation is not None:
            (tree.folder / mutation.file).write_text(mutation.planted, encoding="utf-8")
        return tree.run(tests)
    finally:
        if mutation is not None and before is not None:
            (tree.folder / mutation.file).write_bytes(before)
        idle.put(tree)


if __name__ == "__main__":
    sys.exit(main())
