"""launch/seeds.py: a config with two seeds, both stages, and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import small_run

from .runs import ROOT, environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_two_seeds_with_one_command(tmp_path: Path) -> None:
    config, run_dir = small_run.write_dataset(tmp_path), tmp_path / "run"
    few = ("pretrain.steps=3", "sft.steps=2", "pretrain.save_every_steps=0")
    command = [sys.executable, "launch/seeds.py", "--config", str(config), "--seeds", "3", "5", "--ranks", "1"]
    done = subprocess.run(
        [*command, f"run.dir={run_dir}", *few, "--", "--split", "validation"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (3, 5):
        for stage in ("pretrain", "sft"):
            assert f"seed: {seed}\n" in (run_dir / f"seed-{seed}" / stage / "config.yaml").read_text()
    systems = {system["name"]: system for system in json.loads((run_dir / "report.json").read_text())}
    for name in ("FPS pretraining", "+ SFT"):
        first, second = (seed["mrr"] for seed in systems[name]["seeds"])
        assert first != second
        assert systems[name]["mrr"] == pytest.approx((first + second) / 2, abs=2e-6)
    assert "validation" in done.stdout and "2 seeds" in done.stdout
    refused = subprocess.run(
        [*command, "run.dri=x"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2 and "run.dri" in refused.stderr
    for words, sentence in (
        (("--seeds", "3", "3"), "--seeds 3 3: contains a seed twice"),
        (("--ranks", "0"), "--ranks 0"),
    ):
        refused = subprocess.run([*command, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert refused.returncode == 2 and sentence in refused.stderr
