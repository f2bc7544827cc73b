"""Run command lines of one commit in forks of this process, which has imported the required libraries.

Reads one JSON object per line: {"ranks": [[ENVIRONMENT, ARGV], …], "log": FILE, "cwd": FOLDER}; ARGV is a script with
its arguments. Writes the exit codes of the ranks as a JSON list. The package itself is imported only after the fork.
The arguments of this script are further modules to import.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any

LIBRARIES = (
    "numpy", "pyarrow.parquet", "pyarrow.compute", "pyarrow.dataset", "torch", "deepspeed", "transformers", "duckdb",
    "scipy.sparse", "omegaconf", "yaml", "safetensors.torch", "tokenizers", "faiss", "rich.progress", "webdataset",
)  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries, also of their import, out of the answers
    for library in (*LIBRARIES, *sys.argv[1:]):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    for line in sys.stdin:
        request = json.loads(line)
        children = [_fork(request, variables, argv) for variables, argv in request["ranks"]]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


def _fork(request: dict[str, Any], variables: dict[str, str], argv: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(variables)
        os.chdir(request["cwd"])
        sys.argv = argv
        sys.path[0] = os.path.dirname(argv[0])
        code = _run(argv[0])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(script: str) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
