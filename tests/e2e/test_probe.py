"""A probe of a stage: three real steps, and their memory and rate, with the estimate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import TinyDataset
from tests.e2e.warm import Command

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGDSSM_TEST_LOGS", str(tmp_path))


def test_a_probe_prints_measured_and_estimated_sizes(tiny_pairs: TinyDataset, tmp_path: Path) -> None:
    config = ("--config", tiny_pairs.config, f"run.dir={tmp_path / 'run'}")
    done = Command("pretrain", *config, "--probe", "pretrain.steps=1000", ranks=2).wait()
    assert done.codes == [0, 0], done.log
    measured = re.search(r"measured in 3 steps: ([\d,]+) rows per second after the first step", done.log)
    assert measured is not None and int(measured[1].replace(",", "")) > 0
    assert re.search(r"measured peak memory of rank 0: [\d.,]+ [MG]B of the process", done.log)
    assert re.search(r"estimates, before a run:\n +[\d,]+ weights, .* 2 ranks", done.log)
    assert re.search(rf"1,000 steps: .* at {measured[1]} rows per second", done.log)
    assert "pretrain 3/3" in done.log, "the steps ran"
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not left, "a probe writes no run"


@pytest.mark.parametrize("option", [["--validate"], ["--resume", "auto"]])
def test_a_probe_is_a_new_run(tiny_pairs: TinyDataset, tmp_path: Path, option: list[str]) -> None:
    config = ("--config", tiny_pairs.config, f"run.dir={tmp_path / 'run'}")
    done = Command("pretrain", *config, "--probe", *option).wait()
    assert done.codes == [2]
    assert "--probe takes three steps of a new run, needs no --validate and no --resume" in done.log
