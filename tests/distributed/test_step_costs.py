"""Communication of a step in addition to its loss: one small gather, for any chunks; counted on real ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import bigdssm

from . import small_run
from .spawn import Pool

PACKAGE = f"{Path(bigdssm.__file__).parent}/"
STEPS = 3


def sent_between_steps(rank: int, world_size: int, config: Path, run_dir: Path, chunk_tokens: int) -> list[list[str]]:
    """Return, for every step except the last, the callers of collectives until the next step, without DeepSpeed's."""
    from bigdssm import distributed
    from bigdssm.training import trainer

    original, dist, steps = trainer.train_step, distributed.dist, []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            function = getattr(dist, name)
            if not name.startswith(("all_", "barrier", "broadcast", "reduce", "gather")):
                return function

            def called(*args: Any, **kwargs: Any) -> Any:
                frame: Any = sys._getframe(1)
                while frame.f_code.co_filename == distributed.__file__:
                    frame = frame.f_back
                if steps:
                    steps[-1].append(frame.f_code.co_filename.removeprefix(PACKAGE))
                return function(*args, **kwargs)

            return called

    def counting(*args: Any, **kwargs: Any) -> Any:
        steps.append([])
        return original(*args, **kwargs)

    trainer.train_step, distributed.dist = counting, Spy()  # type: ignore[assignment]
    try:
        overrides = (
            f"engine.chunk_tokens={chunk_tokens}", f"pretrain.steps={STEPS}", "pretrain.save_every_minutes=60",
            "pretrain.validate_every_steps=0",
        )  # fmt: skip
        small_run.run(rank, world_size, config, run_dir, overrides)
    finally:
        trainer.train_step, distributed.dist = original, dist
    return steps[:-1]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("small"))


def test_a_step_makes_one_gather_outside_the_loss(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    whole, cut = (pools[2].run(sent_between_steps, config, tmp_path / str(n), n) for n in (0, 60))
    assert whole == cut, "chunks change nothing of it"
    for steps in cut:
        assert len(steps) == STEPS - 1
        for callers in steps:
            assert any(caller.startswith("losses/") for caller in callers)
            assert [c for c in callers if not c.startswith("losses/")] == ["training/step.py"]
