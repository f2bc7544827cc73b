"""A run with a moving average of its weights: best/ holds the average, and a resumed run is bit-identical."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigdssm.config import load_config
from bigdssm.errors import ConfigError
from bigdssm.training.checks import check_stage

from . import small_run
from .compared_runs import common
from .spawn import Pool


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("averaging"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pretrain" / "best" / "model.safetensors")


@pytest.mark.slow
def test_best_contains_the_average_and_a_stopped_run_resumes_it(
    config: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    said = ("pretrain.steps=8", "pretrain.optimizer.warmup_steps=0", "pretrain.save_every_steps=4")
    averaged = (*said, "pretrain.weight_average=0.9")
    pools[2].run(small_run.run, config, tmp_path / "plain", said)
    pools[2].run(small_run.run, config, tmp_path / "whole", averaged)
    plain, whole = weights(tmp_path / "plain"), weights(tmp_path / "whole")
    losses = [[record["loss"] for record in small_run.records(tmp_path / name)] for name in ("plain", "whole")]
    assert losses[0] == losses[1]  # it does not affect training
    assert max(float((whole[name] - plain[name]).abs().max()) for name in plain) > 1e-4
    kept = common(tmp_path / "whole", 8)
    assert int(kept["average.updates"]) == 8
    assert all(torch.equal(whole[name], kept[f"average.{name}"]) for name in whole)
    pools[2].run(small_run.run, config, tmp_path / "stopped", averaged)
    checkpoints = tmp_path / "stopped" / "pretrain" / "checkpoints"
    for file in (checkpoints / "step-00000008").iterdir():
        file.unlink()  # damaged: the run continues from step 4
    pools[2].run(small_run.run, config, tmp_path / "stopped", averaged, "pretrain", True)
    again = weights(tmp_path / "stopped")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_whole_weights_are_needed(config: Path, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "pretrain.weight_average=0.9", "engine.zero_stage=3"]
    with pytest.raises(ConfigError, match=r"weight_average: got 0\.9"):
        check_stage(load_config(config, overrides), "pretrain", 1)
