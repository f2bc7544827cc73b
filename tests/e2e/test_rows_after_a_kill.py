"""A run on two ranks, killed at a random time: resumed on 1 or 2 ranks, its row ids are those of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from bigdssm.loader.stream import PairStream
from tests.distributed import small_run
from tests.e2e.runs import Run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 30
ARGUMENTS = (
    f"pretrain.steps={STEPS}", "pretrain.save_every_steps=3", "debug.log_row_ids=true", "data.num_workers=2",
    "pretrain.validate_every_steps=0",
)  # fmt: skip


def rows(folder: Path) -> dict[int, list[int]]:
    """Return the row ids per step, of all ranks of all starts."""
    steps: dict[int, list[int]] = {}
    for path in (folder / "pretrain").glob("row_ids-*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                record = json.loads(line)
                steps.setdefault(record["step"], []).extend(record["row_ids"])
    return {step: sorted(ids) for step, ids in steps.items()}


def test_a_killed_run_resumes_with_the_rows_of_an_unbroken_run(tmp_path: Path) -> None:
    config, folder = small_run.write_dataset(tmp_path), tmp_path / "run"
    run = Run(folder, config, *ARGUMENTS)
    upto = random.randint(7, STEPS - 4)  # saving step 6 has waited for the checkpoint of step 3
    deadline = time.monotonic() + 180
    while not folder.exists() or upto not in rows(folder):
        assert run.process.poll() is None and time.monotonic() < deadline, run.log
        time.sleep(0.02)
    run.end()  # launcher, ranks and loader processes
    run.process.wait()
    stream = PairStream(tmp_path / "dataset", rows_global=96, lanes=6)
    expected = {step: sorted(next(stream).row_ids.tolist()) for step in range(1, STEPS + 1)}
    seen = rows(folder)
    assert all(seen[step] == expected[step] for step in range(1, upto)), f"killed at {upto}"
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    for place, command in ((folder, None), (alone, [sys.executable])):
        again = Run(place, config, *ARGUMENTS, "--resume", "auto", command=command)
        assert again.wait() == 0, again.log
        assert "continues from" in again.log
        assert rows(place) == expected, f"killed at {upto}"
