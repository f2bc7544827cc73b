"""Optimizers by name: their states are in checkpoints, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.config import load_config
from bigdssm.errors import ConfigError
from bigdssm.training.checks import check_stage

from . import small_run
from .spawn import Pool


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("optimizers"))


def run(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...], resume: bool) -> None:
    from . import outside  # noqa: F401, it registers an optimizer

    small_run.run(rank, world_size, config, run_dir, overrides, resume=resume)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero_stage"), [("muon", 0), pytest.param("heavy_ball", 1, marks=pytest.mark.slow)])
def test_a_stopped_run_is_the_one_that_was_not(
    name: str, zero_stage: int, config: Path, tmp_path: Path, outside_pools: dict[int, Pool]
) -> None:
    said = (f"pretrain.optimizer.name={name}", f"engine.zero_stage={zero_stage}", "pretrain.keep_checkpoints=9")
    whole, stopped = (*said, "pretrain.steps=8"), (*said, "pretrain.steps=8", "pretrain.save_every_steps=4")
    outside_pools[2].run(run, config, tmp_path / "whole", whole, False)
    outside_pools[2].run(run, config, tmp_path / "stopped", stopped, False)
    losses = [record["loss"] for record in small_run.records(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    folder = tmp_path / "stopped" / "pretrain" / "checkpoints"
    kept = CheckpointStore(folder, 9).newest_valid()
    assert kept is not None and kept.path.name == "step-00000008"
    shutil.rmtree(kept.path)
    (folder / "latest").unlink(missing_ok=True)
    outside_pools[2].run(run, config, tmp_path / "stopped", stopped, True)
    again = [record["loss"] for record in small_run.records(tmp_path / "stopped")]
    assert again == losses


def test_muon_needs_whole_matrices(config: Path, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", "pretrain.optimizer.name=muon", "engine.zero_stage=1"]
    with pytest.raises(ConfigError, match=r"engine\.zero_stage: got 1"):
        check_stage(load_config(config, overrides), "pretrain", 1)
    with pytest.raises(ConfigError, match=r"optimizer\.name: got adamv"):
        check_stage(load_config(config, [*overrides, "pretrain.optimizer.name=adamv"]), "pretrain", 1)
