"""Every command that writes is killed at random times, started again, and ends with the files of an uninterrupted run.

Other tests kill ingestion (test_make_shards_killed), training (test_survival) and publications (test_stores).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.tolerances import assert_scores_close
from tests.unit.commands.forgetting import checksums, item, trained, user

pytestmark = pytest.mark.slow
NUM_KILLS = 3
# Answers each line [command, arguments, seconds] with [exit status, seconds] of a fork, which is killed after so long.
SCRIPT = """
import importlib, json, os, signal, sys, time
from pathlib import Path
NAMES = sys.argv[1:]
modules = {name: importlib.import_module(f"bigdssm.commands.{name}") for name in NAMES}
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    name, arguments, seconds = json.loads(line)
    started = time.perf_counter()
    child = os.fork()
    if not child:
        log = os.open(os.devnull if seconds else "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(modules[name].main(arguments) or 0)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, time.perf_counter() - started]), flush=True)
"""
MODEL, INDEX = "--model {shop}/run/pretrain/best", "--index {shop}/flat-index"
DATA, SMALL = "--data {shop}/data", "--rows-per-shard 20"
GIVEN = "--given {shop}/given.parquet --query-column user_id --positive-column item_id --column items"
COMMANDS = {
    "embed": f"{MODEL} {DATA} --out {{out}}/vectors {SMALL} --format parquet fvecs",
    "build_index": "--vectors {shop}/vectors --out {out}/index --type hnsw",
    "mine_negatives": f"{MODEL} {DATA} --out {{out}}/hard.npy --first 0 --last 4",
    "list_candidates": f"{DATA} {GIVEN} --out {{out}}/candidates.npy",
    "score_pairs": f"{MODEL} {DATA} --mined {{shop}}/negatives.npy --out {{out}}/scored.npy {SMALL}",
    "embed_teacher": f"{MODEL} {DATA} --out {{out}}/teacher {SMALL}",
    "recommend": f"{MODEL} {INDEX} --users --out {{out}}/found {SMALL}",
    "search": f"{MODEL} {INDEX} {DATA} --user {{user}} --out {{out}}/found.csv --overwrite",
    "convert_checkpoint": f"{MODEL} --out {{out}}/export",
    "forget": "--data {out}/data --vectors {out}/vectors --index {out}/flat-index --negatives {out}/negatives.npy "
    "--run {out}/run --user {user} --item {item}",
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trained(tmp_path_factory.mktemp("killed") / "shop", 60, 100)
    rows = pd.DataFrame({"user_id": [user(n) for n in range(60)], "item_id": [item(n) for n in range(60)]})
    rows["items"] = [[item(n + 1), item(n + 2)] for n in range(60)]
    rows.to_parquet(folder / "given.parquet")
    return folder


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=tmp_path_factory.mktemp("forks"), env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None and json.loads(process.stdout.readline()) == "ready"
    yield process
    process.communicate()
    assert process.returncode == 0


def put_inputs(name: str, shop: Path, out: Path) -> None:
    """Make the folder in which a command writes; `forget` changes a copy of the shop."""
    shutil.rmtree(out, ignore_errors=True)
    if name == "forget":
        shutil.copytree(shop, out)
    else:
        out.mkdir()


def assert_same_scores(resumed: Path, scores: np.ndarray) -> None:
    """A resumed teacher encodes documents in other batches, which changes the last bits."""
    again = np.load(resumed)
    assert all((again[field] == scores[field]).all() for field in ("query", "window"))
    assert_scores_close(again["teacher"], scores["teacher"], width=8)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_with_the_files_of_an_uninterrupted_one(
    name: str, shop: Path, forks: subprocess.Popen[str], tmp_path: Path
) -> None:
    def run(seconds: float = 0) -> Any:
        if (tmp_path / "out/teacher").exists():  # embed_teacher refuses a finished folder
            return 0, 0.0
        arguments = COMMANDS[name].format(shop=shop, out=tmp_path / "out", user=user(3), item=item(5)).split()
        assert forks.stdin is not None and forks.stdout is not None
        forks.stdin.write(json.dumps([name, arguments, seconds]) + "\n")
        forks.stdin.flush()
        return json.loads(forks.stdout.readline())

    start = partial(put_inputs, name, shop, tmp_path / "out")
    start()
    status, seconds = run()
    assert status == 0
    expected, scored = checksums(tmp_path / "out"), tmp_path / "out/scored.npy"
    scores = np.load(scored) if name == "score_pairs" else None
    random, num_killed = Random(name), 0
    start()
    for _ in range(2 * NUM_KILLS):
        status, taken = run(seconds * random.uniform(0.2, 0.8))
        num_killed += status == -9
        assert status in (0, -9)
        if status == 0:  # faster than the runs before: the next kill is earlier
            seconds = min(seconds, taken)
        renamed = (tmp_path / "out/teacher").exists()  # after a kill, too; it may then have the job's own files
        if renamed:
            assert expected.items() <= checksums(tmp_path / "out").items()
        if renamed or status == 0:
            start()
        if num_killed == NUM_KILLS:
            break
    assert num_killed
    status, _ = run()
    found = checksums(tmp_path / "out")
    if scores is not None:
        assert_same_scores(scored, scores)
        found = dict.fromkeys(found, expected[str(scored)])
    assert status == 0 and found == expected
