"""Optimizers by name: their states are in checkpoints, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.config import OPTIMIZERS, EngineConfig, load_config
from bigdssm.errors import ConfigError
from bigdssm.training.checks import check_stage
from bigdssm.training.optimizers import AdamW

from . import small_run
from .spawn import Pool


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("optimizers"))


def run(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...], resume: bool) -> None:
    from . import outside  # noqa: F401, it registers an optimizer

    small_run.run(rank, world_size, config, run_dir, overrides, resume=resume)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_stopped_run_is_the_one_that_was_not(
    zero_stage: int, config: Path, tmp_path: Path, outside_pools: dict[int, Pool]
) -> None:
    said = ("pretrain.optimizer.name=heavy_ball", f"engine.zero_stage={zero_stage}", "pretrain.keep_checkpoints=9")
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


@dataclass(frozen=True)
class WholeMatrices(AdamW):
    """An optimizer of a plugin that needs whole matrices."""

    whole_tensors: ClassVar[bool] = True

    name: str = "whole_matrices"


def test_an_optimizer_of_whole_matrices_needs_stage_0(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS.classes, "whole_matrices", WholeMatrices)
    overrides = [f"run.dir={tmp_path / 'run'}", "pretrain.optimizer.name=whole_matrices", "engine.zero_stage=1"]
    with pytest.raises(ConfigError, match=r"engine\.zero_stage: got 1"):
        check_stage(load_config(config, overrides), "pretrain", 1)
    with pytest.raises(ConfigError, match=r"optimizer\.name: got adamv"):
        check_stage(load_config(config, [*overrides, "pretrain.optimizer.name=adamv"]), "pretrain", 1)


class Counting(torch.optim.SGD):
    """An optimizer with a state of its groups."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1


@dataclass(frozen=True)
class Undeclared(AdamW):
    """Optimizers whose state differs from that of AdamW."""

    kind: str = ""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.kind == "amsgrad":
            return torch.optim.AdamW(groups, amsgrad=True)
        if self.kind == "counting":
            return Counting(groups)
        return torch.optim.Adafactor(groups) if self.kind == "adafactor" else torch.optim.SGD(groups)

    def state_of(self, group: str) -> tuple[str, ...]:
        return {"amsgrad": super().state_of(group), "sgd": ("momentum_buffer",)}.get(
            self.kind, ("row_var", "col_var") if self.kind == "adafactor" and group == "matrices" else ()
        )


def first_step(rank: int, world_size: int, stage: int, kind: str) -> str:
    from bigdssm.training.engine import Engine

    engine = Engine(torch.nn.Linear(3, 2, bias=False), EngineConfig(zero_stage=stage), Undeclared(kind=kind), 1)  # type: ignore[arg-type]
    try:
        engine.deepspeed.backward(engine.deepspeed(torch.ones(2, 3)).sum())
        engine.step(1.0)
    except ConfigError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize(
    ("kind", "stages", "words"),
    [
        ("amsgrad", (0, 1, 3), "AdamW: got the states {'exp_avg': .*, 'max_exp_avg_sq': .* needs those of state_of, {"),
        ("sgd", (0, 2), "SGD: got the states {} after a step, .* {'momentum_buffer': "),
        ("adafactor", (0,), r"'row_var': '\[2, 1\]', .* state_of, {'row_var': '\[2, 3\]'"),
        ("counting", (0, 1), "changes taken of a parameter group"),
    ],
)
def test_a_state_that_a_checkpoint_would_lack_ends_the_first_step(
    kind: str, stages: tuple[int, ...], words: str, pools: dict[int, Pool]
) -> None:
    for stage in stages:
        (message,) = pools[1].run(first_step, stage, kind)
        assert re.search(words, message), message
