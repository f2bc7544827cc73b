"""Count the modules and functions of the package that a training step, a resume, a request or a table runs through.

    python tools/checks/call_paths.py [step resume request ingest] [--functions] [--repository FOLDER]

Runs the README's config on one rank without loader processes under Python's profiler, on the tables of
docs/tutorials/tables.md. step: functions whose calls grow with the number of steps, between runs of 20 and 40;
request: with the number of served requests, between 2 and 4; resume and ingest: all functions of the command, without
those of a command that only reads the config (`bigdssm config`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

PATHS = ("step", "resume", "request", "ingest")
Calls = Counter[str]  # "module.py:function" → calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", choices=[*PATHS, []], help="paths to count (default: all)")
    parser.add_argument("--functions", action="store_true", help="list the functions")
    parser.add_argument("--repository", type=Path, default=Path.cwd(), metavar="FOLDER", help="checkout to count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = _Runs(args.repository.resolve(), Path(folder))
        for path in args.paths or PATHS:
            functions = sorted(runs.functions(path))
            modules = {name.split(":")[0] for name in functions}
            print(f"{path}: {len(modules)} modules, {len(functions)} functions")
            if args.functions:
                print("".join(f"    {name}\n" for name in functions), end="")


class _Runs:
    """Runs of commands under the profiler, in a folder with the tutorial's tables."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        blocks = {
            title: text
            for page in ("docs/tutorials/tables.md", "README.md")
            for title, text in re.findall(
                r'```\w+ title="([\w.]+)"\n(.*?)```', (repository / page).read_text(), flags=re.DOTALL
            )
        }
        (folder / "my.yaml").write_text(blocks["my.yaml"])
        subprocess.run([sys.executable, "-c", blocks["make.py"]], cwd=folder, check=True)
        tables = "--interactions", "events.csv", "--items", "items.csv"
        self.ingest = self.calls("tools/make_shards.py", "interactions", "--config", "my.yaml", *tables)

    def functions(self, path: str) -> set[str]:
        """Return the functions on a path."""
        if path == "step":
            return _growing(self.pretrain("short", 20), self.pretrain("long", 40))
        if path == "request":
            self.pretrain("served", 20)
            model = "runs/served/pretrain/best"
            self.calls("tools/embed.py", "--model", model, "--data", "datasets/shop", "--out", "vectors")
            self.calls("tools/build_index.py", "--vectors", "vectors", "--out", "index")
            return _growing(*(self.requests(model, number) for number in (2, 4)))
        started = set(self.calls("tools/config.py", "--config", "my.yaml"))
        if path == "ingest":
            return set(self.ingest) - started
        self.pretrain("resumed", 20)
        return set(self.pretrain("resumed", 20, "--resume", "auto")) - started

    def pretrain(self, run: str, steps: int, *options: str) -> Calls:
        """Train for a number of steps, with one validation at the end."""
        settings = f"run.dir=runs/{run}", "data.num_workers=0", f"pretrain.steps={steps}"
        return self.calls("launch/pretrain.py", "--config", "my.yaml", *options, *settings)

    def requests(self, model: str, number: int) -> Calls:
        """Send requests to the application that `bigdssm serve` runs."""
        program = f"""
import bigdssm
from bigdssm.serving.app import make_app
from bigdssm.serving.searcher import Searcher
from fastapi.testclient import TestClient
searcher = Searcher.open({model!r}, "index", data="datasets/shop")
with TestClient(make_app(searcher)) as client:
    for turn in range({number}):
        answer = client.post("/api/search", json={{"events": [{{"item": "i1"}}, {{"item": f"i{{turn}}"}}], "top": 5}})
        assert answer.status_code == 200, answer.text
"""
        (self.folder / "requests.py").write_text(program)
        return self.calls(str(self.folder / "requests.py"))

    def calls(self, *argv: str) -> Calls:
        """Run a script of the repository, or at an absolute path, and return the calls of the package's functions."""
        counts = self.folder / "calls.json"
        variables = {
            **os.environ, "PYTHONPATH": str(self.repository), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        script = str(self.repository / argv[0])
        command = [sys.executable, __file__, "--trace", str(counts), str(self.repository), script, *argv[1:]]
        subprocess.run(command, cwd=self.folder, env=variables, check=True, stdout=subprocess.DEVNULL)
        return Counter(json.loads(counts.read_text()))


def _growing(few: Calls, many: Calls) -> set[str]:
    return {name for name, calls in many.items() if calls > few[name]}


def _trace(counts: str, repository: str, script: str, *argv: str) -> None:
    """Run a script under the profiler and write its calls to the file `counts`."""
    import atexit
    import runpy
    import threading
    from types import CodeType, FrameType

    package = str(Path(repository) / "bigdssm") + os.sep
    calls: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    def write() -> None:
        sys.setprofile(None)
        named: Calls = Counter()
        for code, number in calls.items():
            # class bodies, comprehensions and modules are no functions
            if code.co_filename.startswith(package) and not code.co_name.startswith("<") and code.co_flags & 2:
                name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
                named[f"{code.co_filename.removeprefix(package)}:{name}"] += number
        Path(counts).write_text(json.dumps(named))

    atexit.register(write)
    threading.setprofile(count)
    sys.setprofile(count)
    sys.argv = [script, *argv]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _trace(*sys.argv[2:]) if sys.argv[1:2] == ["--trace"] else main()
