"""Run two commits on this machine and compare their outputs: dataset contents, losses bit by bit, search results.

    python tools/checks/compare_commits.py BASE COMMIT [--only CASE …] [--work FOLDER] [--jobs N]

Prints one line per case of cases.yaml: equal; intended, with the reason; or DIFFERS, with the first difference. Exit
code 1: an unintended difference; 2: a case failed. Results depend on the instruction set, so both commits run here, in
separate worktrees and with the installed libraries. Results are stored per commit in --work; a commit compared with
itself runs twice. `$(git stash create)` names a working tree with its changes.

Cases use only command lines, config keys and files of the package. If a commit has other names, its
tools/checks/names.yaml maps them, and lists the intended differences with reasons (see there).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml
from leaves import digest, leaves
from tables import write_tables

HERE = Path(__file__).resolve().parent
WORK = Path("/tmp/bigdssm-compare")
NAMES = "tools/checks/names.yaml"
Config = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("commit", help="commit to compare")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CASE", help="run these cases and their dependencies (default: all)"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="FOLDER", help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="concurrent cases (default: %(default)s)")
    args = parser.parse_args()
    table = yaml.safe_load((HERE / "cases.yaml").read_text())
    if unknown := set(args.only) - set(table["cases"]):
        parser.error(f"unknown case {', '.join(sorted(unknown))}, needs one of {', '.join(table['cases'])}")
    chosen = args.only or list(table["cases"])
    write_tables(args.work.resolve() / "tables")
    started = time.perf_counter()
    base = Commit(args.base, args.work.resolve(), table, args.jobs)
    other = Commit(args.commit, args.work.resolve(), table, args.jobs, again=base.hash)
    before, after = base.results(chosen), other.results(chosen)
    verdicts = [_compared(before[case], after[case], case, other.names) for case in chosen]
    for case, (verdict, text) in zip(chosen, verdicts, strict=True):
        print(f"{case:22} {verdict:9} {text}")
    print(f"{base.hash[:12]} and {other.hash[:12]}: {len(chosen)} cases in {time.perf_counter() - started:.0f} s")
    outcomes = {verdict for verdict, _ in verdicts}
    return 2 if "FAILED" in outcomes else int("DIFFERS" in outcomes)


def _compared(base: Result, other: Result, case: str, names: Config) -> tuple[str, str]:
    """Return the verdict of a case and its explanation."""
    for result in (base, other):
        if result.failed:
            return "FAILED", result.failed
    differing = [place for place in base.leaves if base.leaves[place] != other.leaves.get(place)]
    differing += [place for place in other.leaves if place not in base.leaves]
    intended = [one for one in names.get("intended", []) if re.fullmatch(one["case"], case)]
    unexplained = [place for place in differing if not any(re.search(one["leaf"], place) for one in intended)]
    if unexplained:
        first = unexplained[0]
        return "DIFFERS", (
            f"{len(unexplained)} of {len(base.leaves)} leaves, first {first}: "
            f"{base.leaves.get(first, 'nothing')} → {other.leaves.get(first, 'nothing')}"
        )
    if differing:
        why = {one["why"] for one in intended if any(re.search(one["leaf"], place) for place in differing)}
        return "intended", f"{len(differing)} of {len(base.leaves)} leaves: {'; '.join(sorted(why))}"
    same = sum(other.files.get(name) == content for name, content in base.files.items())
    stale = ", though listed as intended to differ" if intended else ""
    return "equal", f"{len(base.leaves)} leaves; {same} of {len(base.files)} files byte for byte{stale}"


@dataclass(frozen=True)
class Result:
    """Output of a case in the names of cases.yaml: leaves and checksums of files; or the reason of its failure."""

    leaves: dict[str, Any]
    files: dict[str, str]
    failed: str = ""


class Commit:
    """A commit in a separate worktree, and the results of its cases."""

    def __init__(self, name: str, work: Path, table: Config, jobs: int, again: str = "") -> None:
        self.hash = _git("rev-parse", "--verify", f"{name}^{{commit}}").strip()
        folder = self.hash[:12] + ("-again" if self.hash == again else "")
        self.work, self.tree = work / folder, work / "trees" / folder
        self._table, self._jobs, self._tables = table, jobs, work / "tables"
        listed = _git("ls-tree", "--full-tree", "--name-only", self.hash, NAMES).strip()
        self.names: Config = yaml.safe_load(_git("show", f"{self.hash}:{NAMES}")) if listed else {}
        self._unstable = yaml.safe_load((HERE / "names.yaml").read_text())["unstable"] + self.names.get("unstable", [])
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()

    def results(self, cases: list[str]) -> dict[str, Result]:
        """Return the results of `cases`; stored results are reused."""
        order: list[str] = []
        for case in cases:
            self._add(case, order)
        if all(map(self._is_done, order)):
            return {case: self._result(case) for case in cases}
        if not self.tree.exists():
            _git("worktree", "add", "--detach", "--force", str(self.tree), self.hash)
        processes = [self._warm() for _ in range(self._jobs)]
        for process in processes:
            self._idle.put(process)
        try:
            with ThreadPoolExecutor(self._jobs) as threads:  # submitted after their dependencies
                futures: dict[str, Future[None]] = {}
                for case in order:
                    futures[case] = threads.submit(self._run, case, {need: futures[need] for need in self._needs(case)})
        finally:
            for process in processes:
                process.stdin.close()  # type: ignore[union-attr]
                process.wait()
            _git("worktree", "remove", "--force", str(self.tree))
        return {case: self._result(case) for case in cases}

    def _needs(self, case: str) -> list[str]:
        text = json.dumps(self._table["cases"][case])
        return [name for name in self._table["cases"] if f"{{{name}}}" in text or f'"data": "{name}"' in text]

    def _add(self, case: str, order: list[str]) -> None:
        for need in self._needs(case):
            self._add(need, order)
        if case not in order:
            order.append(case)

    def _key(self, case: str) -> str:
        """Return a checksum of everything but the commit that determines a case's results."""
        one = self._table["cases"][case]
        parts = [one, self._config_of(one), self.names.get("renames", []), [self._key(n) for n in self._needs(case)]]
        probes = re.findall(r"\{checks\}/(\w+\.py)", json.dumps(one))
        code = [(HERE / name).read_text() for name in ("leaves.py", "tables.py", "warm.py", *probes)]
        return digest(json.dumps([parts, code, self._table["spark"]], sort_keys=True).encode())

    def _is_done(self, case: str) -> bool:
        done = self.work / case / "done.json"
        return done.exists() and json.loads(done.read_text())["key"] == self._key(case)

    def _run(self, case: str, needs: dict[str, Future[None]]) -> None:
        for future in needs.values():
            future.result()
        folder = self.work / case
        if self._is_done(case):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        failed = next((f"needs {need}, which failed" for need in needs if self._result(need).failed), "")
        one = self._table["cases"][case]
        places = {name: str(self.work / name) for name in self._table["cases"]}
        places |= {"here": str(folder), "tables": str(self._tables), "checks": str(HERE)}
        places["config"] = str(folder / "config.yaml")
        if "config" in one:
            (folder / "config.yaml").write_text(yaml.safe_dump(self._config(one, case, places), sort_keys=False))
        for command in one["run"] if not failed else []:
            words = shlex.split(command.replace("{spark}", self._table["spark"]))
            argv = self._argv([word.format(**places) for word in words])
            code = self._call(argv, one.get("ranks", 1) if command.startswith("launch/") else 1, folder)
            if code:
                failed = f"exit code {code} of {shlex.join(argv)[:200]}; see {folder / 'log'}"
                break
        found, files = ({}, {}) if failed else self._written(folder, one["compare"], places)
        done = {"key": self._key(case), "leaves": found, "files": files, "failed": failed}
        (folder / "done.json").write_text(json.dumps(done))

    def _result(self, case: str) -> Result:
        done = json.loads((self.work / case / "done.json").read_text())
        stable = {
            place: value for place, value in done["leaves"].items()
            if not any(re.search(one["leaf"], place) for one in self._unstable)
        }  # fmt: skip
        return Result(stable, done["files"], done["failed"])

    def _written(self, folder: Path, patterns: list[str], places: dict[str, str]) -> tuple[Config, dict[str, str]]:
        """Return leaves and checksums of all files that match the patterns, in the names of cases.yaml."""
        lines, files = [], {}
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
            name = path.relative_to(folder).as_posix()
            files[self._renamed("output", name)] = digest(path.read_bytes())
            lines += [f"{place}={json.dumps(value)}" for place, value in leaves(path, name)]
        text = "\n".join(lines).replace(str(self.work), "WORK").replace(str(self._tables), "TABLES")
        pairs = (line.partition("=") for line in self._renamed("output", text).split("\n") if line)
        return {place: json.loads(value) for place, _, value in pairs}, files

    def _renamed(self, where: str, text: str) -> str:
        for one in self.names.get("renames", []):
            if one["where"] == where:
                text = re.sub(one["from"], one["to"], text, flags=re.MULTILINE)
        return text

    def _config_of(self, one: Config) -> Config:
        def whole(name: str) -> Config:
            config = dict(self._table["configs"][name])
            return _merged(whole(config.pop("extends")), config) if "extends" in config else config

        return whole(one["config"]) if "config" in one else {}

    def _config(self, one: Config, case: str, places: dict[str, str]) -> Config:
        """Return the config of a case in this commit's names."""
        config = self._config_of(one)
        dataset = Path(places[one.get("data", case)]) / "dataset"
        settings = {"run.dir": f"{places['here']}/run", "data.dir": str(dataset), **one.get("set", {})}
        for place, value in settings.items():
            config = _merged(config, _nested([(place, value)]))
        lines = [f"{place}={json.dumps(value)}" for place, value in _settings(config)]
        lines = self._renamed("config", "\n".join(lines)).split("\n")
        pairs = [line.partition("=")[::2] for line in lines if line]
        return _nested([(place, json.loads(value)) for place, value in pairs], places)

    def _argv(self, words: list[str]) -> list[str]:
        return [
            self._renamed("config", word) if re.match(r"[a-z_]+\.[a-z_.]+=", word) else word
            for word in self._renamed("command", "\n".join(words)).split("\n")
        ]

    def _warm(self) -> subprocess.Popen[str]:
        variables = {
            **os.environ, "PYTHONPATH": str(self.tree), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYSPARK_PYTHON": sys.executable,
            "PYTHONHASHSEED": "0",
        }  # fmt: skip
        pipe = subprocess.PIPE
        command = [sys.executable, str(HERE / "warm.py")]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables, cwd=self.tree)

    def _call(self, argv: list[str], ranks: int, folder: Path) -> int:
        """Run a command on `ranks` ranks and return the first exit code other than 0."""
        group: list[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            group = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        argv = [str(self.tree / argv[0]), *argv[1:]]
        processes = [[variables, argv] for variables in group]
        request = {"ranks": processes, "log": str(folder / "log"), "cwd": str(self.tree)}
        process = self._idle.get()
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            assert process.stdout is not None
            codes: list[int] = json.loads(process.stdout.readline())
        finally:
            self._idle.put(process)
        return next((code for code in codes if code), 0)


def _merged(under: Config, over: Config) -> Config:
    both = {key: _merged(under[key], over[key]) for key in under if _is_dict(under[key]) and _is_dict(over.get(key))}
    return {**under, **over, **both}


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _settings(config: Config, place: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a config; lists are leaves."""
    settings = []
    for key, value in config.items():
        at = f"{place}.{key}" if place else key
        settings += _settings(value, at) if isinstance(value, dict) and value else [(at, value)]
    return settings


def _nested(settings: list[tuple[str, Any]], places: dict[str, str] | None = None) -> Config:
    """Return the nested config of dotted keys; {names} in strings are replaced by `places`."""
    config: Config = {}
    for place, value in settings:
        *parents, last = place.split(".")
        inside = config
        for key in parents:
            inside = inside.setdefault(key, {})
        inside[last] = value.format(**places) if places and isinstance(value, str) else value
    return config


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
