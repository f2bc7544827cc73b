"""Contents of items have a period of their own: several times an epoch, without texts or columns of the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bigdssm
from bigdssm.cluster.metrics import read_stage
from bigdssm.config import StageConfig
from bigdssm.training.refresh import contents_period


@pytest.mark.parametrize(
    ("stage", "period"),
    [
        (StageConfig(epochs=3), 200), (StageConfig(epochs=0.5), 100), (StageConfig(steps=60), 6),
        (StageConfig(steps=3), 1), (StageConfig(steps=9000), 200), (StageConfig(refresh_contents_every_steps=7), 7),
    ],
)  # fmt: skip
def test_contents_are_computed_ten_times_an_epoch_or_in_a_shorter_stage(stage: StageConfig, period: int) -> None:
    assert contents_period(stage, 2000) == period


@pytest.mark.parametrize(
    ("options", "steps"), [([], [*range(0, 20, 2)]), (["refresh_contents_every_steps=7"], [0, 7, 14])]
)
def test_a_stage_computes_contents_in_their_period(
    tiny_interactions: Any, tmp_path: Path, options: list[str], steps: list[int]
) -> None:
    run = ["rows_global=24", "steps=20", "log_every_steps=1", "validate_every_steps=0", *options]
    overrides = [f"run.dir={tmp_path}", "run.trackers=[]", "model.query.history.items=both"]
    bigdssm.pretrain(tiny_interactions.config, [*overrides, *(f"pretrain.{option}" for option in run)])
    seconds = [record["seconds"] for record in read_stage(tmp_path / "pretrain") if "loss" in record]
    assert len(seconds) == 20
    assert [step for step, spans in enumerate(seconds) if "contents of items" in spans] == steps
